"""The one training loop, the measures after the last epoch, and what a step costs."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fasthyper import use_backend
from fasthyper.experiments.experiment import Batch, Examples, Experiment, Run, Setting, Task, stream
from fasthyper.experiments.methods import METHODS, counts
from fasthyper.measure import clock, interleaved_seconds, peak_temporary_bytes
from fasthyper.nn import Hypernetwork

TEST_BATCH = 1000
TIMED_STEPS = 15


@dataclass(frozen=True)
class Metrics:
    """What one run found.

    Attributes:
        measures: what the task measures, averaged over the test examples after the last epoch, and its levels.
        train_loss: mean loss over the last steps, as many as an epoch has.
        context_parameters: N_f or N_e, trainable parameters of f or e.
        primary_parameters: N_g, weights that f generates, or N_q, trainable parameters of q.
        trainable_parameters: all that is trained.
        steps: training steps.
        step_seconds: median over them: forward, loss, backward and update, without drawing the batch.
        run_seconds: the whole run.
        peak_temporary_bytes: of one forward and backward: see `measure`; outputs and gradients do not count.
        fused_seconds: of a hypernetwork, as is; median of steps in turns with `materialised_seconds`.
        materialised_seconds: the same steps with each instance's weights written out; None for other methods.
        materialised_bytes: `peak_temporary_bytes` then.
    """

    measures: dict[str, float]
    train_loss: float
    context_parameters: int
    primary_parameters: int
    trainable_parameters: int
    steps: int
    step_seconds: float
    run_seconds: float
    peak_temporary_bytes: int
    fused_seconds: float | None
    materialised_seconds: float | None
    materialised_bytes: int | None


def train(
    experiment: Experiment, run: Run, source: Any, on_epoch: Callable[[float], None] = lambda share: None
) -> Metrics:
    """Train one model and test it once, after the last epoch.

    The seed decides everything: the initial weights, the order of the examples, and all that is drawn. The
    latter two do not depend on the method, so that all methods with one seed are compared in pairs.

    Args:
        experiment: what is compared.
        run: which point of it.
        source: what `experiment.load` gave.
        on_epoch: called after every epoch with the share of the run that is done.
    """
    begin = time.perf_counter()
    device = torch.device(run.device)
    task = experiment.task(run, source)
    trainer = Trainer(build(experiment, run).to(device), task, run.setting, device)
    per_epoch = math.ceil(task.train.count / run.setting.batch_size)
    generator = torch.Generator().manual_seed(stream(run.seed, "order"))
    steps = _steps(experiment, run, task, per_epoch * run.setting.epochs)
    trainer.schedule(steps)
    seconds: list[float] = []
    losses: deque[Tensor] = deque(maxlen=per_epoch)
    batches = _endless(run, task, generator)
    for step in range(steps):
        if step % per_epoch == 0:
            on_epoch(step / steps)
        batch = next(batches)
        start = clock(device)
        losses.append(trainer.step(batch))
        seconds.append(clock(device) - start)
    on_epoch(1.0)
    measures = evaluate(run, task, trainer.model)
    size = counts(trainer.model)
    cost = _cost(trainer, task, run)
    return Metrics(
        measures={**measures, **task.levels},
        train_loss=torch.stack(tuple(losses)).mean().item(),
        context_parameters=size.context,
        primary_parameters=size.primary,
        trainable_parameters=size.trainable,
        steps=steps,
        step_seconds=statistics.median(seconds),
        run_seconds=time.perf_counter() - begin,
        **cost,
    )


class Trainer:
    """A model, its optimizer, and one step of training."""

    def __init__(self, model: nn.Module, task: Task, setting: Setting, device: torch.device) -> None:
        self.model, self.task, self.device, self.cosine = model, task, device, setting.schedule == "cosine"
        parameters = list(model.parameters())
        self.optimizer: torch.optim.Optimizer
        if setting.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(parameters, lr=setting.lr, momentum=setting.momentum, fused=True)
        elif setting.optimizer == "adam":
            self.optimizer = torch.optim.Adam(parameters, lr=setting.lr, fused=True)
        else:
            self.optimizer = torch.optim.Adadelta(parameters, lr=setting.lr)
        self.scheduler: torch.optim.lr_scheduler.LRScheduler | None = None

    def schedule(self, steps: int) -> None:
        """Let the learning rate fall over this many steps, where the setting says so."""
        if self.cosine:
            self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def step(self, batch: Batch) -> Tensor:
        """Forward, loss, backward, update; returns the loss."""
        self.optimizer.zero_grad()
        loss = self.task.loss(self.model(batch.x, batch.cond), batch.target)
        loss.backward()
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return loss.detach()


def build(experiment: Experiment, run: Run, method: str | None = None) -> nn.Module:
    """The model of a run, on the CPU, in the initial state of its seed; torch's own seed stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(run.seed, "weights"))
        return METHODS[method or run.method].build(experiment.architecture(run))


def batches(run: Run, examples: Examples, generator: torch.Generator) -> Iterator[Batch]:
    """One epoch: every example once, in random order, the last batch as small as it comes."""
    for chosen in torch.randperm(examples.count, generator=generator).split(run.setting.batch_size):
        yield _on(run.device, examples.draw(chosen, generator))


@torch.no_grad()
def evaluate(run: Run, task: Task, model: nn.Module) -> dict[str, float]:
    """Means over the test examples; what is drawn for them depends on the seed alone."""
    generator = torch.Generator().manual_seed(stream(run.seed, "test"))
    training = model.training
    model.eval()
    sums: dict[str, float] = {}
    for chosen in torch.arange(task.test.count).split(TEST_BATCH):
        batch = _on(run.device, task.test.draw(chosen, generator))
        for name, values in task.measure(model(batch.x, batch.cond), batch.target).items():
            sums[name] = sums.get(name, 0.0) + values.double().sum().item()
    model.train(training)
    return {name: total / task.test.count for name, total in sums.items()}


def _endless(run: Run, task: Task, generator: torch.Generator) -> Iterator[Batch]:
    while True:
        yield from batches(run, task.train, generator)


def _steps(experiment: Experiment, run: Run, task: Task, steps: int) -> int:
    """As many steps as were asked for, or as many as fit into another method's training time."""
    other = METHODS[run.method].as_long_as
    if other is None:
        return steps
    device = torch.device(run.device)
    batch = _first(run, task)
    trainers = [Trainer(build(experiment, run, m).to(device), task, run.setting, device) for m in (other, run.method)]
    its, own = interleaved_seconds([lambda t=t: t.step(batch) for t in trainers], TIMED_STEPS, device)  # type: ignore[misc]
    return max(1, round(steps * its / own))


def _cost(trainer: Trainer, task: Task, run: Run) -> dict[str, Any]:
    """Memory of a step, and for a hypernetwork time and memory with and without weights written out."""
    batch = _first(run, task)
    trainer.optimizer.zero_grad()
    model = trainer.model

    def peak(context: AbstractContextManager[Any]) -> int:
        def step() -> Tensor:
            y = model(batch.x, batch.cond)
            task.loss(y, batch.target).backward()
            return y

        with context:
            step()  # what a first call sets up
            for parameter in model.parameters():
                parameter.grad = None
            return peak_temporary_bytes(step, run.device)

    def step(context: Callable[[], AbstractContextManager[Any]]) -> None:
        with context():
            trainer.step(batch)

    found: dict[str, Any] = dict.fromkeys(("fused_seconds", "materialised_seconds", "materialised_bytes"))
    found["peak_temporary_bytes"] = peak(nullcontext())
    if isinstance(model, Hypernetwork):
        found["materialised_bytes"] = peak(use_backend("materialised"))
        trainer.scheduler = None
        for group in trainer.optimizer.param_groups:
            group["lr"] = 0.0  # these steps cost what others do and change nothing
        ways = (nullcontext, lambda: use_backend("materialised"))
        found["fused_seconds"], found["materialised_seconds"] = interleaved_seconds(
            [lambda way=way: step(way) for way in ways],  # type: ignore[misc]
            TIMED_STEPS,
            trainer.device,
        )
    return found


def _first(run: Run, task: Task) -> Batch:
    """A batch as training sees it, to measure on."""
    chosen = torch.arange(min(run.setting.batch_size, task.train.count))
    return _on(run.device, task.train.draw(chosen, torch.Generator().manual_seed(0)))


def _on(device: str, batch: Batch) -> Batch:
    return Batch(*(tensor.to(device) for tensor in batch))
