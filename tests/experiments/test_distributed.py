from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import parallel
import pytest
import torch
from tiny_experiment import BOTH, comparison_of, lines, numbers, tuned_of

from fasthyper.experiments import ROTATION, Comparison, WorkerFailed, run_comparison
from fasthyper.experiments.distributed import Group, launch, torchrun

HERE = os.path.dirname(parallel.__file__)


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
STARTED = []
pytestmark = pytest.mark.usefixtures("plain_figures")


@pytest.fixture(autouse=True)
def nothing_survives():
    """End all processes that a test has started."""
    yield
    while STARTED:
        parallel.end(STARTED.pop())


def python(*command):
    """Start a module, in a process group of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": HERE},
        start_new_session=True,
    )
    STARTED.append(process)
    return process


def torchrun_of(*command):
    """Start a module in two processes under torchrun."""
    options = [command[0], command[1]] if str(command[0]).startswith("--") else []
    return python(
        "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *options, "-m", *command[len(options) :]
    )


def ignore(problem):
    """Accept problems: a kill may tear a line."""


def wait_for(condition, process=None):
    """Wait until the condition is true; fail if the process ends before."""
    deadline = time.monotonic() + 60
    while not condition():
        assert process is None or process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


GONE = (FileNotFoundError, ProcessLookupError)  # also a process that ends between the opening of its file and the read


def children(pid):
    """Return the child processes of a process, except the resource tracker of multiprocessing."""
    try:
        found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except GONE:
        return []
    return [child for child in found if "resource_tracker" not in command_of(child)]


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except GONE:
        return ""


def alive(pid):
    """Return whether a process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except GONE:
        return False


def test_alone_a_process_gathers_and_counts_for_itself():
    group = Group()
    assert (group.rank, group.size) == (0, 1)
    assert group.gather(3) == [3]
    one, other = group.counter("one"), group.counter("other")
    assert [one(1), one(1), other(5), one(-2)] == [1, 2, 5, 0]


def test_without_torchrun_a_process_is_alone():
    with torchrun("cpu", "a comparison") as group:
        assert group == Group()
    assert not torch.distributed.is_initialized()


def test_workers_gather_count_and_are_heard(tmp_path):
    heard = []
    launch(parallel.talk, 2, "cpu", lambda *what: heard.append(what), tmp_path)
    found = [(tmp_path / str(rank)).read_text() for rank in (0, 1)]
    assert found == ["0 of 2 ['r0', 'r1'] 20"] * 2
    # All messages arrive, including the last ones of a process that ends at once.
    assert sorted(heard) == [(rank, number) for rank in (0, 1) for number in range(10)]


@linux
def test_the_first_that_fails_ends_all_and_is_heard_of(tmp_path):
    with pytest.raises(WorkerFailed, match=r"^worker 2 of 2: RuntimeError: the second worker fails$"):
        launch(parallel.second_fails, 2, "cpu", lambda *what: None, tmp_path)
    first = int((tmp_path / "0").read_text())
    assert not alive(first)


@linux
def test_no_thread_of_the_group_outlives_it(tmp_path):
    """Such a thread may abort a process whose interpreter ends."""
    launch(parallel.write_threads_at_exit, 2, "cpu", lambda *what: None, tmp_path)
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["[]", "[]"]


def test_torchrun_twice_in_the_same_processes(tmp_path):
    """Two groups, one after the other, as in `compare all`: the second shares nothing with the first."""
    process = torchrun_of("parallel", tmp_path, "same")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    for rank in (0, 1):
        assert (tmp_path / str(rank)).read_text() == f"{rank} of 2 ['r0', 'r1'] 20\n" * 2


def test_torchrun_restarted_meets_nothing_of_the_first_start(tmp_path):
    process = torchrun_of("--max-restarts", 1, "parallel", tmp_path, "restart")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    for rank in (0, 1):
        assert (tmp_path / str(rank)).read_text() == f"{rank} of 2 ['r0', 'r1'] 20\n" * 3


def test_torchrun_of_different_comparisons_is_refused(tmp_path):
    process = torchrun_of("parallel", tmp_path, "own")
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "torchrun: this process was started with another comparison, device or version than process 0" in output


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return the results of the tiny comparison with three seeds, trained in this process alone, on one thread."""
    out = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fasthyper.experiments.runner._cores", lambda: 1)
        patch.setattr("fasthyper.experiments.report.panels", lambda results: ("a figure",))
        run_comparison(comparison_of(3), out)
    return numbers(lines(out))


def line_counts(out):
    """Return the number of lines of each file of runs."""
    with suppress(FileNotFoundError):  # `check_writable` makes and removes the folder
        return {path.name: path.read_bytes().count(b"\n") for path in out.glob("runs*.jsonl")}
    return {}


def begun(monkeypatch, tmp_path):
    """Log the configurations of the runs that start from now on, in all processes."""
    log = tmp_path / "log"
    monkeypatch.setenv("TINY_LOG", str(log))
    return lambda: log.read_text().splitlines() if log.exists() else []


@pytest.fixture(scope="module")
def tuned_alone(tmp_path_factory):
    """Return the results of the tuned comparison with three seeds, trained in this process alone, on one thread."""
    out = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fasthyper.experiments.runner._cores", lambda: 1)
        patch.setattr("fasthyper.experiments.report.panels", lambda results: ("a figure",))
        run_comparison(tuned_of(3), out)
    return numbers(lines(out))


@linux
@pytest.mark.parametrize(("held", "finished"), [("validation 4", 3), ("test 2", 12)])
def test_workers_killed_while_rates_are_chosen_or_after_it(tmp_path, monkeypatch, tuned_alone, held, finished):
    """Of the 18 runs, the first 12 choose rates. Each process finishes 3 of these at most, or 1 of the others."""
    out, trained = tmp_path / "out", begun(monkeypatch, tmp_path)
    monkeypatch.setenv("TINY_HELD", held)
    process = python("tiny_experiment", out, "--seeds", 3, "--workers", 2, "--tuned")
    wait_for(lambda: sum(line_counts(out).values()) >= finished, process)
    workers = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(map(alive, workers)))
    assert sum(line_counts(out).values()) < 18
    monkeypatch.delenv("TINY_HELD")
    seen = []
    run_comparison(tuned_of(3), out, workers=2, progress=lambda *what: seen.append(what), notify=ignore)
    assert len(trained()) <= 18 + 2
    assert line_counts(out) == {"runs.jsonl": 18}
    assert numbers(lines(out)) == tuned_alone
    done = [share for share, _, _ in seen]
    assert done == sorted(done)
    assert seen[-1][0] == seen[-1][1]


def test_torchrun_chooses_the_same_rates_in_all_processes(tmp_path, monkeypatch, tuned_alone):
    trained = begun(monkeypatch, tmp_path)
    process = torchrun_of("tiny_experiment", tmp_path / "out", "--seeds", 3, "--tuned")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert len(trained()) == 18
    assert line_counts(tmp_path / "out") == {"runs.jsonl": 18}
    assert numbers(lines(tmp_path / "out")) == tuned_alone


@linux
def test_workers_killed_with_their_parent_and_started_again(tmp_path, monkeypatch, uninterrupted):
    out, trained = tmp_path / "out", begun(monkeypatch, tmp_path)
    monkeypatch.setenv("TINY_HELD", "test 4")  # each process finishes three runs at most
    process = python("tiny_experiment", out, "--seeds", 3, "--workers", 2)
    wait_for(lambda: sum(line_counts(out).values()) >= 3, process)
    workers = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(workers) >= 2
    wait_for(lambda: not any(map(alive, workers)))
    assert sum(line_counts(out).values()) < 12
    monkeypatch.delenv("TINY_HELD")
    seen = []
    run_comparison(comparison_of(3), out, workers=2, progress=lambda *what: seen.append(what), notify=ignore)
    assert len(trained()) <= 12 + 2
    assert line_counts(out) == {"runs.jsonl": 12}
    assert numbers(lines(out)) == uninterrupted
    done, totals = [share for share, _, _ in seen], {total for _, total, _ in seen}
    assert done == sorted(done)
    assert totals == {done[-1]}


@linux
def test_workers_whose_parent_is_killed_while_they_start_train_nothing(tmp_path, monkeypatch):
    trained = begun(monkeypatch, tmp_path)
    process = python("tiny_experiment", tmp_path / "out", "--seeds", 3, "--workers", 2)
    wait_for(lambda: sum("spawn_main" in command_of(pid) for pid in children(process.pid)) == 2, process)
    workers = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(map(alive, workers)))
    assert trained() == []


@linux
def test_torchrun_killed_and_gone_on_alone(tmp_path, monkeypatch, uninterrupted):
    out, trained = tmp_path / "out", begun(monkeypatch, tmp_path)
    monkeypatch.setenv("TINY_HELD", "test 4")  # each process finishes three runs at most
    process = torchrun_of("tiny_experiment", out, "--seeds", 3)
    wait_for(lambda: len(line_counts(out)) == 2 and min(line_counts(out).values()) > 0, process)
    workers = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)  # kills only torchrun: its workers must notice
    process.wait()
    wait_for(lambda: not any(map(alive, workers)))
    kept = line_counts(out)
    assert set(kept) == {"runs.jsonl", "runs.1.jsonl"}
    assert sum(kept.values()) < 12
    before = len(trained())
    monkeypatch.delenv("TINY_HELD")
    run_comparison(comparison_of(3), out, notify=ignore)
    assert len(trained()) - before == 12 - sum(kept.values())
    assert line_counts(out) == {"runs.jsonl": 12}
    assert numbers(lines(out)) == uninterrupted


def test_the_command_under_torchrun(tmp_path):
    options = {"depths": "2", "seeds": 2, "epochs": 1, "methods": BOTH, "device": "cpu"}
    command = ["fasthyper", "compare", "rotation", "--depths", 2, "--seeds", 2, "--epochs", 1, "--device", "cpu"]
    process = torchrun_of(*command, "--methods", ",".join(BOTH), "--out", tmp_path / "out")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert output.count("Report: ") == 1
    assert sorted(os.listdir(tmp_path / "out")) == ["report.html", "runs.jsonl", "summary.csv"]
    run_comparison(Comparison.of(ROTATION, **options), tmp_path / "alone")
    found, alone = numbers(lines(tmp_path / "out")), numbers(lines(tmp_path / "alone"))
    assert found.keys() == alone.keys()
    for name, metrics in found.items():  # the numbers of threads differ, and with them the last digits
        assert metrics["measures"]["error"] == pytest.approx(alone[name]["measures"]["error"], abs=0.004)
        assert metrics["train_loss"] == pytest.approx(alone[name]["train_loss"], rel=1e-4)


def test_numbers_of_a_run_count_once():
    record = {"config": {"seed": 0}, "metrics": {"steps": 3, "run_seconds": 1.0}}
    assert list(numbers([record]).values()) == [{"steps": 3}]
    with pytest.raises(AssertionError):
        numbers([record, record])
