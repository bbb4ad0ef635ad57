"""Several processes on one sweep, by torch's own distributed engine: of one machine, or torchrun's of several."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A process waits for the others' last runs, which may take as long as a run does.
_PATIENCE = timedelta(days=7)
_MEETING = timedelta(minutes=10)
_SWEEPS = itertools.count()


class WorkerFailed(RuntimeError):
    """One of the processes that share a sweep raised an error, or was ended.

    Attributes:
        rank: which process, from 0.
        size: how many there were.
        run: the run that it was in; None where that is not known, or it was in none.
        reason: the error, or the signal or exit code that it ended with, in one line.
        details: its traceback; empty where it left none.
    """

    def __init__(self, rank: int, size: int, run: str | None, reason: str, details: str = "") -> None:
        super().__init__(rank, size, run, reason, details)  # so that it can go from process to process
        self.rank, self.size, self.run, self.reason, self.details = rank, size, run, reason, details

    def __str__(self) -> str:
        place = "" if self.run is None else f", in {self.run}"
        return f"worker {self.rank + 1} of {self.size}{place}: {self.reason}"


def in_one_line(error: BaseException) -> str:
    """The type of an error and what it says."""
    return ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split()))))


@dataclass(frozen=True)
class Group:
    """This process among those that share a sweep; alone, without `store`."""

    rank: int = 0
    size: int = 1
    store: dist.Store | None = None

    def gather(self, mine: Any) -> list[Any]:
        """What each has, in all of them, by rank."""
        if self.store is None:
            return [mine]
        held: list[Any] = [None] * self.size
        dist.all_gather_object(held, mine)
        return held

    def counter(self, name: str) -> Callable[[int], int]:
        """A number that all share: add to it, get the sum."""
        if self.store is not None:
            store = self.store
            return lambda amount: store.add(name, amount)
        total = 0

        def add(amount: int) -> int:
            nonlocal total
            total += amount
            return total

        return add


@contextmanager
def torchrun(device: str, sweep: str) -> Iterator[Group]:
    """The group that torchrun started this process in: gloo, or NCCL for a sweep on GPUs; alone without torchrun.

    Raises:
        ValueError: a process has another sweep than process 0, or a machine has fewer GPUs than processes.
    """
    if not dist.is_torchelastic_launched():
        yield Group()
        return
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=_PATIENCE)))
    # One store may serve several sweeps, and several starts: none may meet what another has left there.
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"fasthyper {restart} {next(_SWEEPS)}", store)
    if rank == 0:
        store.set("sweep", sweep)
    store.wait(["sweep"], _MEETING)
    if store.get("sweep").decode() != sweep:
        raise ValueError("torchrun: this process was started with another comparison, device or version than process 0")
    if device == "cuda":
        if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise ValueError(f"torchrun: --nproc-per-node may be {torch.cuda.device_count()} at most, one for each GPU")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with _joined(store, rank, size, "nccl" if device == "cuda" else "gloo") as group:
        yield group


def launch(fn: Callable[..., Any], workers: int, device: str, progress: Callable[..., None], *arguments: Any) -> None:
    """Call `fn(group, progress, *arguments)` in new processes; what they tell `progress` is told here.

    The first that fails ends all of them, and so does the end of this one. Where it was is what it told last, by the
    last word of that.

    Raises:
        WorkerFailed: one of them raised an error, or was ended.
    """
    told = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="fasthyper-") as folder:
        store = str(Path(folder) / "store")
        given = (os.getpid(), workers, device, store, told, fn, arguments)
        context = torch.multiprocessing.spawn(_enter, given, nprocs=workers, join=False)
        codes: list[int | None] = [None] * workers
        places: dict[int, str] = {}
        failures: list[WorkerFailed] = []
        try:
            while None in codes:
                running = [p.sentinel for p, code in zip(context.processes, codes, strict=True) if code is None]
                connection.wait(running, timeout=0.1)
                codes = [process.exitcode for process in context.processes]
                while not told.empty():
                    rank, what = told.get()
                    if isinstance(what, WorkerFailed):
                        failures.append(what)
                    else:
                        places[rank] = str(what[-1])
                        progress(*what)
                if any(codes):
                    raise _first(codes, failures, places)
        except BaseException:
            for process in context.processes:
                process.terminate()
            for process in context.processes:
                process.join()
            raise


def _first(codes: Sequence[int | None], failures: Sequence[WorkerFailed], places: dict[int, str]) -> WorkerFailed:
    """Who ended without a word, since the others may have failed for want of it; else who spoke first."""
    spoke = [failure.rank for failure in failures]
    for rank, code in enumerate(codes):
        if code and rank not in spoke:
            return WorkerFailed(rank, len(codes), places.get(rank), _end(code))
    return failures[0]


def _end(code: int) -> str:
    if code > 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
    return f"killed by {name}" + (" (perhaps out of memory)" if name == "SIGKILL" else "")


def _enter(
    rank: int,
    parent: int,
    size: int,
    device: str,
    path: str,
    told: Any,
    fn: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    # torch ends a process with its parent from here on; a parent that was killed before left nobody to work for.
    if os.getppid() != parent:
        return
    # Processes of one machine may share a GPU, where NCCL wants one for each: they talk through gloo.
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    # What it was is told before the group is left, which makes the others fail.
    with (
        _heard(rank, size, told),
        _joined(dist.FileStore(path, size), rank, size, "gloo") as group,
        _heard(rank, size, told),
    ):
        fn(group, lambda *what: told.put((rank, what)), *arguments)


@contextmanager
def _heard(rank: int, size: int, told: Any) -> Iterator[None]:
    """Tell the parent of an error, and end."""
    try:
        yield
    except Exception as error:
        run, reason = (error.run, error.reason) if isinstance(error, WorkerFailed) else (None, in_one_line(error))
        told.put((rank, WorkerFailed(rank, size, run, reason, traceback.format_exc())))
        sys.exit(1)


@contextmanager
def _joined(store: dist.Store, rank: int, size: int, backend: str) -> Iterator[Group]:
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    try:
        yield Group(rank, size, store)
    finally:
        dist.destroy_process_group()
