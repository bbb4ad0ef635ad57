"""Train the examples of `training_examples.py` in several ways: seconds until a loss is reached, and memory of a step.

Each way trains the same network from the same weights on the same batches. The ways differ in the backend, and in
whether they write out W once per step and keep it. They take turns, one step each, so that other load on the machine
affects all of them. As they compute the same sums, their losses after a step agree up to rounding.
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
from fasthyper.measure import peak_temporary_bytes

from .context import Context
from .records import TRAINING_STEP, Record
from .training_examples import EXAMPLES, Batch, Example


class TrainingWay(NamedTuple):
    """The backend, the role in the records, and whether W is written out once per step and kept."""

    backend: str
    role: str
    kept: bool = False


WAYS = {
    "fasthyper": TrainingWay("auto", "ours"),
    "materialised": TrainingWay("materialised", "peer"),
    "materialised once": TrainingWay("materialised", "peer", kept=True),
}


def ways(example: Example) -> list[str]:
    """Return the names of an example's ways. W is kept only in a network that uses it several times per step."""
    return [name for name, way in WAYS.items() if not way.kept or hasattr(example.network, "kept")]


class Trainer:
    """The network and optimizer of one way, and the total seconds of its steps."""

    def __init__(self, example: Example, way: str, device: torch.device, dtype: torch.dtype) -> None:
        self.name, self.way, self.device, self.dtype = way, WAYS[way], device, dtype
        self.network = copy.deepcopy(example.network).to(device, torch.promote_types(dtype, torch.float32))
        if self.way.kept:
            self.network.kept = True
        # A fused optimizer allocates no temporaries, which would count as the step's.
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=example.rate, fused=True)
        self.seconds = 0.0

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean squared error on a batch."""
        *given, target = batch
        casting = torch.autocast(self.device.type, self.dtype, enabled=self.dtype == torch.bfloat16)
        with fasthyper.use_backend(self.way.backend), casting:
            return F.mse_loss(self.network(*given).to(target.dtype), target)

    def step(self, batch: Batch) -> None:
        """Take a step without timing it."""
        self.optimizer.zero_grad()
        self.loss(batch).backward()
        self.optimizer.step()

    def timed_step(self, batch: Batch) -> None:
        """Take a step and add its seconds."""
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
    """Return the peak temporary bytes of a step: the second step of a network that is then discarded."""
    trainer = Trainer(example, way, device, dtype)
    batch = placed(example.batch(0), device, dtype)
    trainer.step(batch)
    trainer.optimizer.zero_grad()
    return peak_temporary_bytes(lambda: trainer.step(batch), device)


def placed(batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    """Return a batch on the network's device, in the dtype of its parameters."""
    parameters = torch.promote_types(dtype, torch.float32)
    return tuple(t.to(device, parameters if t.is_floating_point() else None) for t in batch)


def train(
    example: Example, context: Context, deadline: float, device: torch.device, dtype: torch.dtype
) -> list[Record]:
    """Train an example in all ways, in turns, until all steps are taken or `time.perf_counter()` passes the deadline.

    Returns:
        A record for each way and each measurement of the loss. If time was up, the last ones have a note.
    """
    temporary = {way: temporary_bytes(example, way, device, dtype) for way in ways(example)}
    trainers = [Trainer(example, way, device, dtype) for way in ways(example)]
    held_out = placed(example.held_out, device, dtype)
    records = []
    for step in range(1, example.steps + 1):
        batch = placed(example.batch(step), device, dtype)
        first = step % len(trainers)
        for trainer in (*trainers[first:], *trainers[:first]):
            trainer.timed_step(batch)
        late = time.perf_counter() > deadline and step < example.steps
        if not (step % example.every == 0 or step == example.steps or late):
            continue
        for trainer in trainers:
            with torch.no_grad():
                loss = trainer.loss(held_out).item()
            records.append(
                Record(
                    study="training",
                    workload=example.name,
                    **dict(zip("BNRIO", example.sizes, strict=True)),
                    dtype=str(dtype).removeprefix("torch."),
                    mode=TRAINING_STEP,
                    way=trainer.name,
                    role=trainer.way.role,
                    median=trainer.seconds,
                    rounds=1,
                    temporary=temporary[trainer.name],
                    note=f"stopped after {step} of {example.steps} steps: time was up" if late else "",
                    step=step,
                    loss=loss,
                    context=context,
                )
            )
        if late:
            break
    return records


def train_all(
    context: Context, seconds: float, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Iterator[list[Record]]:
    """Train every example in every way. An example whose data are not installed is left out, with a message.

    Args:
        context: for the records.
        seconds: for all examples together; each may take an equal share, and stops with a note when it is used up.
        device: `"cpu"` or `"cuda"`.
        dtype: float32; bfloat16, by autocast; or float64.

    Raises:
        ValueError: for any other dtype.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(f"dtype must be float32, bfloat16 or float64 for training, not {dtype}")
    target = torch.device(device)
    for make in EXAMPLES[target.type]:
        try:
            example = make()
        except ImportError as error:
            print(f"training example left out: {error}")
            continue
        yield train(example, context, time.perf_counter() + seconds / len(EXAMPLES[target.type]), target, dtype)
