"""The examples trained, with W written out and without: the time to a loss, and the memory of a step.

All ways are the same network of the same layers (`examples.py`) with the same weights at the start, on the same
batches: what differs is `fasthyper.use_backend`, and whether W, once written out, is kept for what else needs it in a
step. They take turns, a step each, so that what else a machine does meets all. As they compute the same sums, their
losses at a step agree to rounding, and whoever takes its steps in less time is earlier at any loss.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fasthyper
from fasthyper.experiments.measure import peak_temporary_bytes

from .examples import EXAMPLES, Batch, Example
from .records import Context, Record


class Way(NamedTuple):
    """How a network is run: the backend, the role in the records, whether W is kept from one use to the next."""

    backend: str
    role: str
    kept: bool = False


WAYS = {
    "fasthyper": Way("auto", "ours"),
    "materialised": Way("materialised", "peer"),
    "materialised once": Way("materialised", "peer", kept=True),
}


def ways(example: Example) -> list[str]:
    """Names of the ways in which an example can be run: none keeps W where it is used once."""
    return [name for name, way in WAYS.items() if not way.kept or hasattr(example.network, "kept")]


class Run:
    """One way's network and optimizer, and the seconds that its steps took."""

    def __init__(self, example: Example, way: str, device: torch.device, dtype: torch.dtype) -> None:
        self.name, self.way, self.device, self.dtype = way, WAYS[way], device, dtype
        self.network = copy.deepcopy(example.network).to(device, torch.promote_types(dtype, torch.float32))
        if self.way.kept:
            self.network.kept = True
        # Fused, it has no temporaries of its own, which would be counted as the step's.
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=example.rate, fused=True)
        self.seconds = 0.0

    def loss(self, batch: Batch) -> Tensor:
        """The squared error on a batch."""
        *given, target = batch
        casting = torch.autocast(self.device.type, self.dtype, enabled=self.dtype == torch.bfloat16)
        with fasthyper.use_backend(self.way.backend), casting:
            return F.mse_loss(self.network(*given).to(target.dtype), target)

    def step(self, batch: Batch) -> None:
        """Take a step, off the clock."""
        self.optimizer.zero_grad()
        self.loss(batch).backward()
        self.optimizer.step()

    def timed_step(self, batch: Batch) -> None:
        """Take a step."""
        synchronise(self.device)
        start = time.perf_counter()
        self.step(batch)
        synchronise(self.device)
        self.seconds += time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def temporary_bytes(example: Example, way: str, device: torch.device, dtype: torch.dtype) -> int:
    """Peak temporary bytes of a step: the second of a network that is thrown away, which warms up the others."""
    run = Run(example, way, device, dtype)
    batch = placed(example.batch(0), device, dtype)
    run.step(batch)
    run.optimizer.zero_grad()
    return peak_temporary_bytes(lambda: run.step(batch), device)


def placed(batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    """A batch where the network is, in the type of its parameters."""
    kind = torch.promote_types(dtype, torch.float32)
    return tuple(t.to(device, kind if t.is_floating_point() else None) for t in batch)


def train(example: Example, here: Context, deadline: float, device: torch.device, dtype: torch.dtype) -> list[Record]:
    """Train an example in all ways, in turns, until its steps are taken or `time.perf_counter()` passes the deadline.

    Returns:
        A record for each way and each look at the loss; the last ones have a note where time was up.
    """
    temporary = {way: temporary_bytes(example, way, device, dtype) for way in ways(example)}
    runs = [Run(example, way, device, dtype) for way in ways(example)]
    held_out = placed(example.held_out, device, dtype)
    records = []
    for step in range(1, example.steps + 1):
        batch = placed(example.batch(step), device, dtype)
        first = step % len(runs)
        for run in (*runs[first:], *runs[:first]):
            run.timed_step(batch)
        late = time.perf_counter() > deadline and step < example.steps
        if not (step % example.every == 0 or step == example.steps or late):
            continue
        for run in runs:
            with torch.no_grad():
                loss = run.loss(held_out).item()
            records.append(
                Record(
                    study="training",
                    workload=example.name,
                    **dict(zip("BNRIO", example.sizes, strict=True)),
                    dtype=str(dtype).removeprefix("torch."),
                    mode="training step",
                    way=run.name,
                    role=run.way.role,
                    median=run.seconds,
                    rounds=1,
                    temporary=temporary[run.name],
                    note=f"stopped after {step} of {example.steps} steps: time was up" if late else "",
                    step=step,
                    loss=loss,
                    context=here,
                )
            )
        if late:
            break
    return records


def measure(
    context: Context, seconds: float, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Iterator[list[Record]]:
    """Train every example in every way; one whose data are not installed is left out, and printed.

    Args:
        context: of the records.
        seconds: for all, of which each example may take an equal share; it stops with a note where that is too little.
        device: `"cpu"` or `"cuda"`.
        dtype: float32; bfloat16, by autocast; or float64.

    Raises:
        ValueError: for any other dtype.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(f"dtype: training is in float32, bfloat16 or float64, not in {dtype}")
    where = torch.device(device)
    for make in EXAMPLES[where.type]:
        try:
            example = make()
        except ImportError as error:
            print(f"left out: {error}")
            continue
        yield train(example, context, time.perf_counter() + seconds / len(EXAMPLES[where.type]), where, dtype)
