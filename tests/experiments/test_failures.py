"""The reason why a process failed, in one line: for a worker, a process of torchrun, and a single process."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace

import parallel
import pytest
from tiny_experiment import comparison_of, lines

from fasthyper.experiments import Measure, WorkerFailed, run_comparison
from fasthyper.experiments.distributed import launch

HERE = os.path.dirname(parallel.__file__)
OPTIONS = ["--depths", "2", "--seeds", "2", "--methods", "hypernetwork,embedding", "--device", "cpu"]
REASONS = {
    "ValueError": "ValueError: two lines",
    "RuntimeError": "RuntimeError: no more",
    "MemoryError": "MemoryError",
    "exit": "ended with exit code 3",
    "SIGKILL": "killed by SIGKILL (perhaps out of memory)",
    "SIGSEGV": "killed by SIGSEGV",
    "SIGABRT": "killed by SIGABRT",
}
pytestmark = pytest.mark.usefixtures("plain_figures")


def compare(out, fault, *options, under=()):
    """Run the command line in a new process; its last run has the fault."""
    command = [sys.executable, *under, "-m", "tiny_experiment", "compare", "tiny", *OPTIONS, *options, "--out", out]
    env = {**os.environ, "PYTHONPATH": HERE, "TINY_FAULT": fault, "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, env=env, timeout=600)


@pytest.mark.parametrize("fault", ["ValueError", "MemoryError", "SIGSEGV", "SIGABRT"])
def test_what_a_worker_dies_of_is_one_exception(tmp_path, monkeypatch, fault):
    """It is the error of the first worker that fails; the others fail because the first has ended."""
    monkeypatch.setenv("TINY_FAULT", fault)
    with pytest.raises(WorkerFailed) as caught:
        run_comparison(comparison_of(depths="2"), tmp_path, workers=2)
    failure = caught.value
    assert (failure.size, failure.run, failure.reason) == (2, "embedding, seed 1", REASONS[fault])
    assert str(failure) == f"worker {failure.rank + 1} of 2, in embedding, seed 1: {REASONS[fault]}"
    assert ("in fail\n" in failure.details) == fault.endswith("Error")
    assert failure.__cause__ is failure.__context__ is None
    monkeypatch.delenv("TINY_FAULT")
    kept = b"".join(path.read_bytes() for path in tmp_path.glob("runs*.jsonl")).splitlines()
    run_comparison(comparison_of(depths="2"), tmp_path)
    assert len(lines(tmp_path)) == 4
    assert set(kept) <= set((tmp_path / "runs.jsonl").read_bytes().splitlines())


@pytest.mark.parametrize("fault", ["ValueError", "SIGKILL", "exit"])
def test_what_a_worker_dies_of_is_one_line_of_the_command(tmp_path, fault):
    done = compare(tmp_path, fault, "--workers", 2)
    assert done.returncode == 1
    line = (
        rf"error: tiny: worker [12] of 2, in embedding, seed 1: {re.escape(REASONS[fault])}; finished runs are kept in "
    )
    assert re.fullmatch(line + rf"{tmp_path}; the same command goes on from there\n", done.stderr)


@pytest.mark.parametrize("fault", ["RuntimeError", "MemoryError"])
def test_what_the_only_process_dies_of_is_one_line(tmp_path, fault):
    done = compare(tmp_path, fault, "--workers", 1)
    assert done.returncode == 1
    kept = f"finished runs are kept in {tmp_path}; the same command goes on from there"
    assert done.stderr == f"error: tiny: {REASONS[fault]}; {kept}\n"


def test_the_process_of_torchrun_that_fails_says_so_in_one_line(tmp_path):
    under = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    done = compare(tmp_path, "ValueError", under=under)
    assert done.returncode != 0
    line = "error: tiny: worker [12] of 2, in embedding, seed 1: ValueError: two lines; finished runs are kept in "
    assert len(re.findall(f"^{line}", done.stderr, re.MULTILINE)) == 1
    assert not re.search(r'File ".*/fasthyper/', done.stderr)  # no traceback except that of torchrun itself


def test_the_first_failure_is_raised_and_not_those_that_follow_from_it():
    with pytest.raises(WorkerFailed, match=r"^worker 2 of 2: RuntimeError: the second worker fails$"):
        launch(parallel.second_fails_and_leaves_slowly, 2, "cpu", lambda *what: None)


def test_where_a_worker_was_is_not_known_before_it_has_told():
    with pytest.raises(WorkerFailed) as caught:
        launch(parallel.first_exits, 2, "cpu", lambda *what: None)
    assert str(caught.value) == "worker 1 of 2: ended with exit code 7"


def test_a_failure_goes_from_process_to_process():
    failure = pickle.loads(pickle.dumps(WorkerFailed(1, 4, "film, seed 2", "MemoryError", "a traceback")))
    assert str(failure) == "worker 2 of 4, in film, seed 2: MemoryError"
    assert failure.details == "a traceback"


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("named", [{"measure": Measure("mae", "error")}, {"levels": (("guess", "guessing"),)}])
def test_a_measure_that_the_task_lacks_is_an_error_of_the_first_run(tmp_path, named, workers):
    found = comparison_of()
    wrong = replace(found, studies=tuple(replace(study, claims=(), **named) for study in found.studies))
    name = "mae" if "measure" in named else "guess"
    kind = ValueError if workers == 1 else WorkerFailed
    with pytest.raises(kind, match=rf"task: expected measures or levels {name}, got apart, error, zero$"):
        run_comparison(wrong, tmp_path, workers=workers)
    assert not (tmp_path / "runs.jsonl").exists() or not (tmp_path / "runs.jsonl").read_text()
