"""The functions that the processes of test_distributed run; they import this module by name."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from fasthyper.experiments.distributed import Group, torchrun


def conversation(group: Group) -> str:
    """Use all methods of a group, and return their results as text."""
    gathered = group.gather(f"r{group.rank}")
    add = group.counter("heard")
    for _ in range(10):
        add(1)
    group.gather(None)
    return f"of {group.size} {gathered} {add(0)}"


def talk(group, progress, folder):
    Path(folder, str(group.rank)).write_text(f"0 {conversation(group)}")
    time.sleep(group.rank)
    for number in range(10):
        progress(group.rank, number)
    os._exit(0)


def second_fails(group, progress, folder):
    Path(folder, str(group.rank)).write_text(str(os.getpid()))
    group.gather(None)
    if group.rank == 1:
        raise RuntimeError("the second worker fails")
    time.sleep(600)


def second_fails_and_leaves_slowly(group, progress):
    if group.rank == 1:
        leave = dist.destroy_process_group
        dist.destroy_process_group = lambda: (leave(), time.sleep(3))
        raise RuntimeError("the second worker fails")
    group.gather(None)


def first_exits(group, progress):
    if group.rank == 0:
        os._exit(7)
    group.gather(None)


def write_threads_at_exit(group, progress, folder):
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # imports more of torch.distributed
    group.gather("x")
    assert gloo_threads()
    atexit.register(lambda: Path(folder, str(group.rank)).write_text(str(gloo_threads())))


def gloo_threads():
    """Return the names of the threads that gloo has started in this process."""
    names = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]


def end(process):
    """Kill a process and its process group, and wait for it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in filter(None, (process.stdout, process.stderr)):
        pipe.close()


def main(folder, mode):
    """Join two groups; `own`: with a fingerprint that differs in each process; `restart`: fail once after the first."""
    fingerprint = f"a comparison {os.environ['RANK'] if mode == 'own' else ''}"
    for _ in range(2):
        with torchrun("cpu", fingerprint) as group, Path(folder, str(group.rank)).open("a") as file:
            file.write(f"{group.rank} {conversation(group)}\n")
        if mode == "restart" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
