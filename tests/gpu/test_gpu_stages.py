"""`make gpu`: a stage that fails, hangs or crashes costs only itself; the deadline holds; every stage runs."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import stage_processes
import stages
import torch
from stages import PYTHON, Done, Stage

from fasthyper import compiled, seen

MACHINE = {
    "device": "a GPU",
    "arch": "sm_90",
    "date": "2026-01-02",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "commit": "abc",
}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Keep Triton's cache and built libraries of this machine out of the tests."""
    monkeypatch.setattr(stages, "WORK", tmp_path / "work")
    monkeypatch.setattr(stages, "CARRIED", tmp_path / "carried")


def python(name: str, code: str, limit: float = 20, file: str = "tests.txt") -> Stage:
    return Stage(name, limit, file, (PYTHON, "-c", code))


def stages_of(out: Path) -> dict[str, Done]:
    return {end.name: end for end in stages.ends_of(out)}


HANG = "import time; print('begun', flush=True); time.sleep(600)"
IGNORE = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); " + HANG
GOOD = "print('done'); import sys; print('RESULT {\"number\": 3}', file=sys.stderr); print('SAID a word')"


def test_a_broken_stage_costs_only_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stages, "GRACE", 2.0)
    monkeypatch.setattr(stages, "LEAST", 0.5)
    broken = (
        python("hangs", HANG, 2),
        python("ignores", IGNORE, 2),
        python("crashes", "import os; os.abort()"),
        python("fails", "raise SystemExit('no such luck')"),
        Stage("missing", 5, "ncu.csv", ("no-such-tool", PYTHON, "-c", GOOD)),
        python("good", GOOD),
    )
    start = time.monotonic()
    assert stages.run([], tmp_path, 60, broken) == 5
    assert time.monotonic() - start < 40
    ends = stages_of(tmp_path)
    assert list(ends) == [stage.name for stage in broken]
    assert [end.cut for end in ends.values()] == [True, True, False, False, False, False]
    assert (ends["crashes"].status, ends["fails"].status, ends["missing"].status) == (-6, 1, None)
    assert "SIGINT did not stop it" in ends["ignores"].note
    assert ends["good"].passed
    assert ends["good"].result == {"number": 3}
    assert ends["good"].lines == ("a word",)
    text = (tmp_path / "tests.txt").read_text()
    assert text.count("begun") == 2  # output of a stage that was killed is kept
    assert "no such luck" in text
    printed = capsys.readouterr().out
    assert "hangs            " in printed
    assert "no-such-tool cannot be run" in printed
    assert "good: a word" in printed


@pytest.mark.parametrize("apart", [False, True], ids=["same group", "own session"])
def test_what_a_stage_started_is_stopped_with_it(tmp_path, monkeypatch, apart):
    monkeypatch.setattr(stages, "GRACE", 1.5)
    options = f"start_new_session={apart}"
    child = f"import subprocess, sys; print(subprocess.Popen(['sleep', '600'], {options}).pid, flush=True)"
    stage_processes.adopt_orphans()
    for stage in (python("ends", child), python("hangs", f"{child}; {HANG}", 2)):
        done = stages.run_stage(stage, stage.limit, tmp_path)
        pid = int(next(line for line in (tmp_path / "tests.txt").read_text().splitlines()[::-1] if line.isdigit()))
        assert done.cut == (stage.name == "hangs")
        deadline = time.monotonic() + 10
        while _runs(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _runs(pid)


@pytest.mark.parametrize("file", ["env.txt", "tests.txt"])
def test_a_line_without_an_end_hides_nothing(file, tmp_path):
    both = (python("dots", f"{GOOD}; print('..', end='')", file=file), python("good", GOOD, file=file))
    assert stages.run([], tmp_path, 60, both) == 0
    assert [(name, end.result) for name, end in stages_of(tmp_path).items()] == [
        ("dots", {"number": 3}),
        ("good", {"number": 3}),
    ]


def test_the_end_of_long_output_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(stage_processes, "MOST_OUTPUT", 1000)
    done = stages.run_stage(python("long", f"print('first'); print('x' * 5000); {GOOD}"), 20, tmp_path)
    assert (done.result, done.lines) == ({"number": 3}, ("a word",))
    text = (tmp_path / "tests.txt").read_text()
    assert len(text) < 1100
    assert "first" in text
    assert "bytes were here" in text


def test_a_stage_writes_no_huge_file(tmp_path, monkeypatch):
    monkeypatch.setattr(stage_processes, "LARGEST_FILE", 1 << 20)
    endless = python("endless", "import os\nwhile True: os.write(1, bytes(1 << 16))")
    assert stages.run([], tmp_path, 60, (endless, python("good", GOOD, file="smoke.txt"))) == 1
    ends = stages_of(tmp_path)
    assert not ends["endless"].cut
    assert (tmp_path / "tests.txt").stat().st_size < 2 << 20


@pytest.mark.parametrize("change", [shutil.rmtree, lambda out: (out / "smoke.txt").mkdir()], ids=["gone", "a folder"])
def test_a_file_that_cannot_be_written_costs_its_stage(change, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    change(out)
    two = (python("first", GOOD, file="smoke.txt"), python("second", GOOD))
    failed = int(out.exists())
    assert stages.run([], out, 60, two) == failed
    ends = stages_of(out)
    assert ends["second"].passed
    assert ("smoke.txt cannot be run or written" in ends["first"].note) == bool(failed)


def test_results_that_cannot_be_recorded_are_printed(tmp_path, capsys):
    (tmp_path / "env.txt").mkdir()
    assert stages.run([], tmp_path, 60, (python("good", GOOD), python("better", GOOD))) == 0
    printed = capsys.readouterr().out
    assert printed.count("cannot be recorded") == 2
    assert "better: a word" in printed


def _archive(path: Path) -> bytes:
    path.parent.mkdir()
    with tarfile.open(path, "w:xz") as archive:
        for name in ("one/a.cubin", "two/b.cubin"):
            member = tarfile.TarInfo(name)
            member.size = 100_000
            archive.addfile(member, io.BytesIO(os.urandom(member.size)))
    return path.read_bytes()


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:-50_000] + bytes(50_000), lambda b: b""])
def test_a_damaged_cache_is_not_used(damage, tmp_path):
    path = stages.CARRIED / "triton.tar.xz"
    whole = _archive(path)
    path.write_bytes(damage(whole))
    assert "no kernels of Triton were carried" in stages._unpack()
    assert stages._cached() == (0, 0)
    path.write_bytes(whole)
    assert stages._unpack().startswith("2 kernels of Triton are there")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_stages_share_the_time_that_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "GRACE", 1.0)
    two = (python("first", HANG, 9), python("second", HANG, 19))
    assert stages.share(two, 1000) == 9
    assert stages.share(two, 20) == 9  # a third of 19, and what SIGINT may take, is left
    assert stages.share(two, 15) == pytest.approx(15 - (19 / 3 + 1) - 1)
    assert stages.share(two, 6) == pytest.approx(6 * 10 / 30 - 1)
    assert stages.share(two[1:], 10) == pytest.approx(9)
    assert stages.share(stages.STAGES, stages.SECONDS) == stages.STAGES[0].limit
    assert sum(stage.limit + 5 for stage in stages.STAGES if stage.name != "build") > stages.SECONDS * 0.9


def test_the_deadline_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "GRACE", 1.0)
    monkeypatch.setattr(stages, "LEAST", 1.0)
    hanging = tuple(python(f"stage{i}", HANG, 100) for i in range(3))
    start = time.monotonic()
    assert stages.run([], tmp_path, 9, hanging) == 3
    assert time.monotonic() - start < 12
    ends = stages_of(tmp_path)
    assert all(end.limit < 4 for end in ends.values())
    assert stages.run([], tmp_path / "late", 1.5, hanging) == 3
    assert {end.note for end in stages_of(tmp_path / "late").values()} == {"no time was left"}


def test_a_table_has_only_its_rows(tmp_path):
    code = "import sys; print('a,b'); print('SAID beside it', file=sys.stderr); print('a warning', file=sys.stderr)"
    done = stages.run_stage(python("table", code, file="kernels.csv"), 20, tmp_path)
    assert (tmp_path / "kernels.csv").read_text() == "a,b\n"
    assert done.lines == ("beside it",)
    assert "a warning" in (tmp_path / "env.txt").read_text()


def test_the_summary_has_forty_lines():
    said = tuple(f"line {i}" for i in range(50))
    ends = [Done(s.name, 1.0, 2.0, 0, False, "", {"passed": 1}, said, 2, 1) for s in stages.STAGES]
    lines = stages.summary(ends, ["late"], "none were carried")
    assert len(lines) == 40
    assert f"{2 * len(ends)} were compiled here, and {len(ends)} launchers" in lines[0]
    for stage in stages.STAGES:
        assert any(line.startswith(f"   {stage.name}: line 0") for line in lines)


def test_eight_files():
    """What a stage writes beside its file is in one more: bench's records."""
    files = {stage.file for stage in stages.STAGES}
    assert len(files) == 7
    assert len({stage.name for stage in stages.STAGES}) == len(stages.STAGES)


def _write(out: Path, **failed: int) -> Path:
    out.mkdir()
    names = ("env", "smoke-cuda", "smoke-triton", "fresh", "tests-cuda", "tests-triton")
    ends = [
        Done(n, 1.0, 2.0, failed.get(n.replace("-", "_"), 0), False, "", MACHINE if n == "env" else {}, (), 0, 0)
        for n in names
    ]
    (out / "env.txt").write_text("".join(f"STAGE {json.dumps(end._asdict())}\n" for end in ends))
    return out


@pytest.mark.parametrize(
    ("failed", "right"),
    [
        ({}, ["triton", "cuda"]),
        ({"fresh": 1}, ["triton"]),
        ({"smoke_triton": 3}, ["cuda"]),
        ({"tests_cuda": -9, "tests_triton": 1}, []),
    ],
)
def test_a_record(tmp_path, failed, right, monkeypatch):
    file = tmp_path / "seen.json"
    file.write_text("[]")
    run = _write(tmp_path / "run", **failed)
    assert stages.record([run], file) == {**MACHINE, "right": right}
    monkeypatch.setattr(seen, "FILE", file)
    seen._read.cache_clear()
    try:
        assert seen.is_right("cuda", "sm_90") == ("cuda" in right)
        assert ("passed on a GPU, 2026-01-02" in seen.describe("triton")) == ("triton" in right)
    finally:
        seen._read.cache_clear()


def test_a_rerun_replaces_what_it_ran_and_a_day_has_one_record(tmp_path):
    file = tmp_path / "seen.json"
    file.write_text("[]")
    run, again = _write(tmp_path / "run", tests_cuda=1), _write(tmp_path / "again")
    stages.record([run], file)
    assert stages.record([run, again], file)["right"] == ["triton", "cuda"]
    assert len(json.loads(file.read_text())) == 1
    other = MACHINE | {"commit": "def"}
    (again / "env.txt").write_text((again / "env.txt").read_text().replace(json.dumps(MACHINE), json.dumps(other)))
    with pytest.raises(ValueError, match="several machines, versions or commits"):
        stages.record([run, again], file)


@pytest.mark.parametrize("damaged", ["STAGE {", "STAGE", "STAGE {}", "STAGE [1]", 'STAGE {"name": "env"}'])
def test_damaged_lines_do_not_count(damaged, tmp_path):
    out = _write(tmp_path / "run")
    whole = stages.ends_of(out)
    with (out / "env.txt").open("a") as file:
        file.write(f"{damaged}\n")
    assert stages.ends_of(out) == whole


def test_a_record_needs_a_run(tmp_path):
    (tmp_path / "env.txt").write_text("== env\n")
    with pytest.raises(ValueError, match=r"out: no stage `env` in .* names device"):
        stages.record([tmp_path])


def test_unknown_stages(tmp_path):
    with pytest.raises(SystemExit, match="unknown stage: sleep; choose from env, build"):
        stages.run(["sleep"], tmp_path, 10, stages.STAGES)


@pytest.mark.skipif(compiled.load("cuda_emulated") is not None, reason="the emulator is not built")
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch knows real GPUs")
def test_dry_run(tmp_path, monkeypatch):
    """The pretended GPU and the emulator are in the GPU's place; the tools only run what they are to watch."""
    for name in ("ncu", "compute-sanitizer"):
        tool = tmp_path / "tools" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f'#!/bin/sh\necho watched\nwhile [ "$1" != "{sys.executable}" ]; do shift; done\nexec "$@"\n')
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    for variable in ("EMULATED", "GPU_SMALL"):
        monkeypatch.setenv(f"FASTHYPER_{variable}", "1")
    out = tmp_path / "out"
    pretended = [str(stages.HERE / "pretended_run.py")]
    stages.run([], out, 600, stages.STAGES, pretended)
    ends = stages_of(out)
    assert list(ends) == [stage.name for stage in stages.STAGES]
    failed = {name: end.lines for name, end in ends.items() if not end.passed and "triton" not in name}
    assert not failed
    assert ends["smoke-triton"].lines == ends["tests-triton"].lines
    assert "triton is left out: triton is not installed" in ends["smoke-triton"].lines[0]
    assert ends["smoke-cuda"].result == {"passed": 10, "bad": 0}
    assert ends["tests-cuda"].result["passed"] == 4
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) == 8
    assert all(path.stat().st_size for path in files)
    tables = {path.name: path.read_text().splitlines() for path in out.glob("*.csv")}
    assert len(tables["kernels.csv"]) == 1 + 6 * 3 * 3  # problems, parts and ways, without Triton's
    assert len(tables["eager.csv"]) == 1 + 4 * 2 * 2
    (tmp_path / "seen.json").write_text("[]")
    assert stages.record([out], tmp_path / "seen.json")["right"] == ["cuda"]


def test_the_command_line():
    listed = subprocess.run([sys.executable, str(stages.HERE / "stages.py"), "list"], capture_output=True, text=True)
    assert [line.split()[0] for line in listed.stdout.splitlines()] == [stage.name for stage in stages.STAGES]
