"""`make gpu`: all that a GPU is asked, in one command with a deadline.

    python tests/gpu/stages.py run [--out FOLDER] [--seconds 535] [STAGE ...]
    python tests/gpu/stages.py record FOLDER ...
    python tests/gpu/stages.py list

Each stage is a process of its own group with a limit: at the limit it gets SIGINT, and SIGKILL five seconds later. So a
stage that fails, hangs or crashes costs its own time alone. If the rest of the time is less than the limits of the
stages that are left, later ones are shortened. Output goes to at most eight files at once, and the last lines of
stdout are a summary. This module needs no torch. docs/kernels.md describes the stages.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import stage_processes

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SEEN = ROOT / "fasthyper" / "seen.json"
CARRIED = ROOT / "build" / "carried"
"""What `make gpu-carry` made: `compiled`, a folder of libraries, and `triton.tar.xz`, Triton's cache."""
WORK = ROOT / "build" / "gpu"
"""Where this program unpacks Triton's cache, and builds the libraries that were not carried."""
PYTHON, SECONDS_LEFT, OUT = "{python}", "{seconds}", "{out}"
"""Arguments that stand for this Python, the seconds that a stage may plan with, and the folder of its further files."""
SECONDS = 535.0
RERUN_SECONDS = 175.0
GRACE = 5.0
"""Seconds between SIGINT and SIGKILL."""
LEAST = 4.0
"""A stage is left out if it would have fewer seconds."""
MOST_LINES = 40


class Stage(NamedTuple):
    """A process to run.

    Args:
        name: for the command line and the summary.
        limit: seconds.
        file: gets the process's output; a table's file gets stdout alone, and env.txt the rest.
        command: the program and its arguments.
    """

    name: str
    limit: float
    file: str
    command: tuple[str, ...]


def _script(name: str, *arguments: str) -> tuple[str, ...]:
    return (PYTHON, str(HERE / f"{name}.py"), *arguments)


def _sanitized(tool: str, *arguments: str) -> tuple[str, ...]:
    return ("compute-sanitizer", "--error-exitcode", "9", "--tool", tool, *_script("sanitized", *arguments))


_COUNTERS = (
    "gpu__time_duration.sum,sm__throughput.avg.pct_of_peak_sustained_elapsed,"
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active,lts__t_bytes.sum,dram__bytes.sum,"
    "smsp__warp_issue_stalled_barrier_per_warp_active.pct,smsp__warp_issue_stalled_long_scoreboard_per_warp_active.pct,"
    "launch__registers_per_thread,launch__waves_per_multiprocessor"
)
_PROFILER = ("ncu", "--csv", "--page", "raw", "--profile-from-start", "off", "--clock-control", "none")
_BENCH = ("--studies", "workloads", "--dtypes", "bfloat16", "--modes", "forward + backward", "--eager", "--no-report")

# compute-sanitizer's memcheck has misreported wgmma, and racecheck and synccheck do not know mbarriers: only memcheck
# runs the kernels for sm_90a.
STAGES = (
    Stage("env", 25, "env.txt", _script("machine", "look")),
    Stage("build", 150, "env.txt", _script("machine", "build")),
    Stage("smoke-cuda", 25, "smoke.txt", _script("smoke", "cuda")),
    Stage("smoke-triton", 30, "smoke.txt", _script("smoke", "triton")),
    Stage("fresh", 25, "smoke.txt", _script("smoke", "fresh")),
    Stage("tests-cuda", 60, "tests.txt", _script("run_tests", "cuda")),
    Stage("tests-triton", 45, "tests.txt", _script("run_tests", "triton")),
    Stage("kernels", 90, "kernels.csv", _script("time_kernels")),
    Stage("eager", 35, "eager.csv", _script("time_eager")),
    Stage("ncu", 80, "ncu.csv", (*_PROFILER, "--metrics", _COUNTERS, *_script("profiled"))),
    Stage("memcheck", 25, "sanitizer.txt", _sanitized("memcheck")),
    Stage("racecheck", 20, "sanitizer.txt", _sanitized("racecheck", "--no-hopper")),
    Stage("synccheck", 15, "sanitizer.txt", _sanitized("synccheck", "--no-hopper")),
    Stage(
        "bench",
        125,
        "env.txt",
        (*_script("time_workloads"), "--out", OUT, "--budget", SECONDS_LEFT, *_BENCH),
    ),
)


class Done(NamedTuple):
    """What became of a stage.

    Args:
        name: of the stage.
        seconds: that it took.
        limit: the seconds that it had.
        status: its exit status, negative for a signal; None if it did not run.
        cut: whether it was stopped at its limit.
        note: why it did not run, or what was not as it should be.
        result: what it printed in its last line that begins with `RESULT`.
        lines: those that it printed with `SAID`, or else, if it did not pass, its last ones.
        kernels: kernels that were new in Triton's cache after it.
        launchers: other new folders there, such as the launchers of kernels.
    """

    name: str
    seconds: float
    limit: float
    status: int | None
    cut: bool
    note: str
    result: dict[str, Any]
    lines: tuple[str, ...]
    kernels: int
    launchers: int

    @property
    def passed(self) -> bool:
        return self.status == 0 and not self.cut

    def describe(self) -> str:
        """Return a line of the summary."""
        end = "left out" if self.status is None else "ok" if self.passed else f"FAILED (exit {self.status})"
        text = f"{self.name:<13}{self.seconds:5.0f} s of {self.limit:3.0f}  {'CUT' if self.cut else end}"
        new = f"{self.kernels} kernels, {self.launchers} launchers compiled" if self.kernels or self.launchers else ""
        short = ", ".join(f"{k} {v}" for k, v in self.result.items() if isinstance(v, int | float | str))
        return "; ".join(filter(None, (text, self.note, short, new)))


def share(stages: Sequence[Stage], remaining: float) -> float:
    """Return the seconds of the first of the stages that are left.

    It has all of its limit if a third of theirs is then left for the later ones, and at least its proportional part.
    """
    first, later = stages[0].limit + GRACE, stages[1:]
    part = first * remaining / (first + sum(stage.limit + GRACE for stage in later))
    kept = sum(stage.limit / 3 + GRACE for stage in later)
    return min(first, max(part, remaining - kept)) - GRACE


def run_stage(stage: Stage, limit: float, out: Path, prefix: Sequence[str] = ()) -> Done:
    """Run a stage; `prefix` are arguments of Python before the script."""
    values = {PYTHON: sys.executable, SECONDS_LEFT: f"{max(1.0, limit - GRACE):.0f}", OUT: str(out / "bench")}
    command = [values.get(argument, argument) for argument in stage.command]
    at = command.index(sys.executable) + 1
    command[at:at] = prefix
    log, table = out / "env.txt", stage.file.endswith(".csv")
    files = [out / stage.file, *([log] if table else [])]
    before, others, start, begins = _cached(), stage_processes.children(), time.monotonic(), [0] * len(files)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with files[0].open("ab") as to, files[-1].open("ab") as errors:
            if not table:
                to.write(f"== {stage.name}, at most {limit:.0f} s\n".encode())
                to.flush()
            begins = [path.stat().st_size for path in files]
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=to, stderr=errors, env=_environment(),
                preexec_fn=stage_processes.prepare,
            )  # fmt: skip
            status, cut, note = stage_processes.wait(process, limit, GRACE)
    except OSError as error:
        status, cut, note = None, False, f"{error.filename or out} cannot be run or written ({error.strerror})"
    finally:
        stage_processes.stop_new_children(others)
    lines = [line for path, begin in zip(files, begins, strict=True) for line in stage_processes.written(path, begin)]
    results = [line.removeprefix("RESULT ") for line in lines if line.startswith("RESULT ")]
    kernels, launchers = (after - b for after, b in zip(_cached(), before, strict=True))
    said = [line.removeprefix("SAID ") for line in lines if line.startswith("SAID ")]
    if not said and (status != 0 or cut):
        said = [line for line in lines if line.strip() and not line.startswith("RESULT ")][-3:]
    shown = tuple(line[:180] for line in said[:MOST_LINES])
    return Done(
        stage.name, time.monotonic() - start, limit, status, cut, note, _parsed(results), shown, kernels, launchers
    )


def _parsed(results: Sequence[str]) -> dict[str, Any]:
    try:
        found = json.loads(results[-1]) if results else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _environment() -> dict[str, str]:
    """Return the variables of all stages. Tiles are the predicted ones: to time them would compile three of each."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    given = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "FASTHYPER_AUTOTUNE": "0",
        "FASTHYPER_TEST_DEVICE": "cuda",
        "TRITON_CACHE_DIR": str(WORK / "triton"),
        "FASTHYPER_CACHE": str(WORK / "cache"),
    }
    if (commit := CARRIED / "commit.txt").exists():
        given["FASTHYPER_COMMIT"] = commit.read_text(errors="replace").strip()
    if not os.environ.get("FASTHYPER_COMPILED"):
        folders = [path for path in (WORK / "compiled", CARRIED / "compiled") if (path / "cuda.so").exists()]
        given |= {"FASTHYPER_COMPILED": str(folders[0])} if folders else {}
    return {**os.environ, **given}


def _cached() -> tuple[int, int]:
    """Return the numbers of folders with a kernel, and of other folders, in Triton's cache."""
    folders = [path for path in (WORK / "triton").glob("*") if path.is_dir()]
    kernels = sum(any(path.glob("*.cubin")) for path in folders)
    return kernels, len(folders) - kernels


def _unpack() -> str:
    """Fill Triton's cache with what was carried; return a line about it."""
    cache, unpacked = WORK / "triton", WORK / "unpacked"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tarfile.open(CARRIED / "triton.tar.xz") as archive:
            archive.extractall(unpacked, filter="data")
        for folder in unpacked.iterdir():
            if not (cache / folder.name).exists():
                folder.replace(cache / folder.name)
    except Exception as error:  # a damaged archive raises errors of several modules
        return f"no kernels of Triton were carried ({type(error).__name__})"
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    return f"{_cached()[0]} kernels of Triton are there, some of them carried"


def run(names: Sequence[str], out: Path, seconds: float, stages: Sequence[Stage], prefix: Sequence[str] = ()) -> int:
    """Run the stages of these names, or all, in order; print the summary; return how many did not pass."""
    deadline = time.monotonic() + seconds
    if unknown := set(names) - {stage.name for stage in stages}:
        raise SystemExit(
            f"unknown stage: {', '.join(sorted(unknown))}; choose from {', '.join(s.name for s in stages)}"
        )
    left = [stage for stage in stages if not names or stage.name in names]
    carried, done = _unpack(), []
    stage_processes.adopt_orphans()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        while left:
            limit = share(left, deadline - time.monotonic())
            stage = left.pop(0)
            if limit < LEAST:
                end = Done(stage.name, 0.0, max(0.0, limit), None, False, "no time was left", {}, (), 0, 0)
            else:
                end = run_stage(stage, limit, out, prefix)
            done.append(end)
            print(end.describe(), flush=True)
            _enter(end, out)
    except KeyboardInterrupt:
        print("interrupted")
    print(*summary(done, [stage.name for stage in left], carried), sep="\n", flush=True)
    return sum(not end.passed for end in done) + len(left)


def _enter(end: Done, out: Path) -> None:
    """Write what became of a stage, for `record`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (out / "env.txt").open("a") as file:
            file.write(f"STAGE {json.dumps(end._asdict())}\n")
    except OSError as error:
        print(f"{end.name} cannot be recorded in {out} ({error.strerror})", flush=True)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def summary(done: Sequence[Done], left: Sequence[str], carried: str) -> list[str]:
    """Return at most `MOST_LINES` lines: one for each stage, then what the stages have to say, fairly divided."""
    kernels, launchers = sum(d.kernels for d in done), sum(d.launchers for d in done)
    lines = [f"-- summary; {carried}, {kernels} were compiled here, and {launchers} launchers"]
    lines += [end.describe()[:200] for end in done]
    lines += [f"not reached: {', '.join(left)}"] if left else []
    said = [[f"   {d.name}: {line}" for line in d.lines] for d in done]
    while len(lines) < MOST_LINES and any(said):
        for texts in said:
            if texts and len(lines) < MOST_LINES:
                lines.append(texts.pop(0)[:200])
    return lines[:MOST_LINES]


def ends_of(out: Path) -> list[Done]:
    """Return what became of the stages of the runs in a folder, in order; lines that are damaged do not count."""
    lines = (out / "env.txt").read_text(errors="replace").splitlines()
    found = [_parsed([line.removeprefix("STAGE ")]) for line in lines if line.startswith("STAGE ")]
    return [Done(**{**end, "lines": tuple(end["lines"])}) for end in found if end.keys() == set(Done._fields)]


def record(outs: Sequence[Path], seen: Path = SEEN) -> dict[str, Any]:
    """Add the run in a folder, and its reruns in others, to seen.json; return the record.

    A backend is right if its tests passed, and its part of the smoke test. Of a stage in several runs, the last counts.

    Raises:
        ValueError: if no run has the stage env, or the runs are of several machines or commits.
    """
    ends = [end for out in outs for end in ends_of(out)]
    last = {end.name: end for end in ends}
    machine = last["env"].result if "env" in last else {}
    wanted = ("device", "arch", "date", "torch", "triton", "commit")
    if missing := [name for name in wanted if not isinstance(machine.get(name), str)]:
        folders = ", ".join(map(str, outs))
        raise ValueError(f"out: no stage `env` in {folders} names {', '.join(missing)}: run make gpu first")
    same = [end.result for end in ends if end.name == "env" and end.result]
    if any(other.get(name) != machine[name] for other in same for name in wanted if name != "date"):
        raise ValueError("out: the runs are of several machines, versions or commits")
    right = [backend for backend in ("triton", "cuda") if _is_right(backend, last)]
    found = {name: machine[name] for name in wanted} | {"right": right}
    runs = json.loads(seen.read_text())
    runs = [other for other in runs if (other["arch"], other["date"]) != (found["arch"], found["date"])] + [found]
    seen.write_text(json.dumps(runs, indent=2) + "\n")
    return found


def _is_right(backend: str, last: dict[str, Done]) -> bool:
    needed = [f"smoke-{backend}", f"tests-{backend}", *(["fresh"] if backend == "cuda" else [])]
    return all(name in last and last[name].passed for name in needed)


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser("stages.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run all stages, or those that are named")
    running.add_argument("stages", nargs="*", metavar="STAGE")
    running.add_argument("--out", type=Path, default=WORK.with_name("gpu-results"))
    running.add_argument(
        "--seconds", type=float, help=f"of all; {SECONDS:.0f}, or {RERUN_SECONDS:.0f} for a few stages"
    )
    recording = commands.add_parser("record", help="add a run to fasthyper/seen.json")
    recording.add_argument("out", type=Path, nargs="+", help="the folder of a run, then those of its reruns")
    commands.add_parser("list", help="print the stages")
    args = parser.parse_args(given)
    if args.command == "list":
        print(*(f"{s.name:<13}{s.limit:4.0f} s  {s.file}" for s in STAGES), sep="\n")
    elif args.command == "record":
        try:
            print(json.dumps(record(args.out)))
        except (OSError, ValueError) as error:
            raise SystemExit(f"nothing is recorded: {error}") from error
    else:
        seconds = args.seconds or (RERUN_SECONDS if args.stages else SECONDS)
        names = ["env", "build", *args.stages] if args.stages else []  # a fresh machine has to build, if need be
        return min(run(names, args.out.resolve(), seconds, STAGES), 100)
    return 0


if __name__ == "__main__":
    sys.exit(main())
