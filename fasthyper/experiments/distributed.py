"""Processes that share the runs of a comparison: workers of one machine, or processes that torchrun has started."""

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

# At the end, a process waits until the others have finished their last runs, however long these take.
_TIMEOUT = timedelta(days=7)
_STARTUP_TIMEOUT = timedelta(minutes=10)
_JOINED = itertools.count()
"""Numbers the groups that this process has joined."""


class WorkerFailed(RuntimeError):
    """One of several processes raised an error or was killed.

    Attributes:
        rank: the number of the process, from 0.
        size: the number of processes.
        run: the name of its current run; None if there is none, or if it is unknown.
        reason: the error, the signal or the exit code that it ended with, in one line.
        details: its traceback; empty if there is none.
    """

    def __init__(self, rank: int, size: int, run: str | None, reason: str, details: str = "") -> None:
        super().__init__(rank, size, run, reason, details)  # all arguments, so that it can be pickled
        self.rank, self.size, self.run, self.reason, self.details = rank, size, run, reason, details

    def __str__(self) -> str:
        place = "" if self.run is None else f", in {self.run}"
        return f"worker {self.rank + 1} of {self.size}{place}: {self.reason}"


def in_one_line(error: BaseException) -> str:
    """Return the type and the message of an error in one line."""
    return ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split()))))


@dataclass(frozen=True)
class Group:
    """The processes that share the runs of a comparison, from the view of one of them.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
        store: their key-value store; None if this process is alone.
    """

    rank: int = 0
    size: int = 1
    store: dist.Store | None = None

    @property
    def alone(self) -> bool:
        """Whether this process works alone."""
        return self.store is None

    def gather(self, mine: Any) -> list[Any]:
        """Return the values `mine` of all processes, by rank. All of them must call it."""
        if self.store is None:
            return [mine]
        held: list[Any] = [None] * self.size
        dist.all_gather_object(held, mine)
        return held

    def counter(self, name: str) -> Callable[[int], int]:
        """Return a function that adds to a number shared by all processes and returns the sum."""
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
def torchrun(device: str, fingerprint: str) -> Iterator[Group]:
    """Join the group of processes that torchrun started, with NCCL on GPUs, otherwise gloo. Alone without torchrun.

    Args:
        device: `"cpu"` or `"cuda"`.
        fingerprint: a text that must be the same in all processes.

    Raises:
        ValueError: the fingerprint differs from that of process 0, or a machine has fewer GPUs than processes.
    """
    if not dist.is_torchelastic_launched():
        yield Group()
        return
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=_TIMEOUT)))
    # torchrun may keep one store for several groups and restarts: give each its own keys.
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"fasthyper {restart} {next(_JOINED)}", store)
    if rank == 0:
        store.set("fingerprint", fingerprint)
    store.wait(["fingerprint"], _STARTUP_TIMEOUT)
    if store.get("fingerprint").decode() != fingerprint:
        raise ValueError("torchrun: this process was started with another comparison, device or version than process 0")
    if device == "cuda":
        if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise ValueError(f"torchrun: --nproc-per-node may be {torch.cuda.device_count()} at most, one for each GPU")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with _process_group(store, rank, size, "nccl" if device == "cuda" else "gloo") as group:
        yield group


def launch(fn: Callable[..., Any], workers: int, device: str, progress: Callable[..., None], *arguments: Any) -> None:
    """Call `fn(group, progress, *arguments)` in new processes, and pass their progress to `progress` in this one.

    The last argument of each progress message is the name of the current run. If one process fails, all are stopped;
    they are stopped as well if this process ends.

    Raises:
        WorkerFailed: one of them raised an error or was killed.
    """
    messages = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="fasthyper-") as folder:
        store = str(Path(folder) / "store")
        worker_arguments = (os.getpid(), workers, device, store, messages, fn, arguments)
        spawned = torch.multiprocessing.spawn(_work, worker_arguments, nprocs=workers, join=False)
        codes: list[int | None] = [None] * workers
        last_runs: dict[int, str] = {}
        failures: list[WorkerFailed] = []
        try:
            while None in codes:
                running = [p.sentinel for p, code in zip(spawned.processes, codes, strict=True) if code is None]
                connection.wait(running, timeout=0.1)
                codes = [process.exitcode for process in spawned.processes]
                while not messages.empty():
                    rank, message = messages.get()
                    if isinstance(message, WorkerFailed):
                        failures.append(message)
                    else:
                        last_runs[rank] = str(message[-1])
                        progress(*message)
                if any(codes):
                    raise _root_cause(codes, failures, last_runs)
        except BaseException:
            for process in spawned.processes:
                process.terminate()
            for process in spawned.processes:
                process.join()
            raise


def _root_cause(
    codes: Sequence[int | None], failures: Sequence[WorkerFailed], last_runs: dict[int, str]
) -> WorkerFailed:
    """Return the failure of a process that ended without a message, else the first message: it may cause the others."""
    senders = [failure.rank for failure in failures]
    for rank, code in enumerate(codes):
        if code and rank not in senders:
            return WorkerFailed(rank, len(codes), last_runs.get(rank), _exit_reason(code))
    return failures[0]


def _exit_reason(code: int) -> str:
    if code > 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
    return f"killed by {name}" + (" (perhaps out of memory)" if name == "SIGKILL" else "")


def _work(
    rank: int,
    parent: int,
    size: int,
    device: str,
    path: str,
    messages: Any,
    fn: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    # From here on torch ends this process together with its parent. The parent may have been killed before.
    if os.getppid() != parent:
        return
    # The processes use gloo: several of them may share a GPU, which NCCL does not allow.
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    # Send an error before leaving the group: the others fail when a process leaves.
    with (
        _errors_sent(rank, size, messages),
        _process_group(dist.FileStore(path, size), rank, size, "gloo") as group,
        _errors_sent(rank, size, messages),
    ):
        fn(group, lambda *message: messages.put((rank, message)), *arguments)


@contextmanager
def _errors_sent(rank: int, size: int, messages: Any) -> Iterator[None]:
    """Send an error to the parent, and end this process."""
    try:
        yield
    except Exception as error:
        run, reason = (error.run, error.reason) if isinstance(error, WorkerFailed) else (None, in_one_line(error))
        messages.put((rank, WorkerFailed(rank, size, run, reason, traceback.format_exc())))
        sys.exit(1)


@contextmanager
def _process_group(store: dist.Store, rank: int, size: int, backend: str) -> Iterator[Group]:
    # Imported later, by torch's optimizers, this module keeps the group as the default of its functions. The group's
    # threads then outlive it, and may abort the process: they need the interpreter to free the last tensors.
    import torch.distributed.nn  # noqa: F401

    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    try:
        yield Group(rank, size, store)
    finally:
        dist.destroy_process_group()
