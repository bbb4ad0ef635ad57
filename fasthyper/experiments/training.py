"""Training: the loop that all experiments share, the measures on the test examples, and the cost of a step."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fasthyper.backends import use_backend
from fasthyper.experiments.experiment import Batch, Examples, Experiment, Run, Task, stream
from fasthyper.experiments.methods import METHODS, counts
from fasthyper.experiments.setting import Setting
from fasthyper.measure import clock, interleaved_seconds, peak_temporary_bytes
from fasthyper.nn import Hypernetwork

TEST_BATCH = 1000
TIMED_STEPS = 15
COSTS = ("peak_temporary_bytes", "fused_seconds", "materialised_seconds", "materialised_bytes")


@dataclass(frozen=True)
class Metrics:
    """The results of one run.

    Attributes:
        measures: the measures of the task, averaged over the examples of the run's split after the last epoch, and the
            levels of the task.
        train_loss: mean loss over the last steps, as many as an epoch has.
        context_parameters: N_f or N_e, trainable parameters of f or e.
        primary_parameters: N_g, weights that f generates, or N_q, trainable parameters of q.
        trainable_parameters: all that is trained.
        steps: training steps.
        training_flops: flops of all steps: forward and backward, with generated weights counted as if written out.
        step_seconds: median time of a step: forward, loss, backward and update, without drawing the batch.
        run_seconds: time of the whole run.
        peak_temporary_bytes: temporary memory of a forward and backward pass, without outputs and gradients. This and
            the rest is measured by runs of results with seed 0, since it would take a large part of a short run; None
            for others.
        fused_seconds: median time of a hypernetwork's step, taken in turns with `materialised_seconds`; None for other
            methods, as are the next two.
        materialised_seconds: the same for steps that write the weights of each instance out.
        materialised_bytes: `peak_temporary_bytes` of such a step.
    """

    measures: dict[str, float]
    train_loss: float
    context_parameters: int
    primary_parameters: int
    trainable_parameters: int
    steps: int
    training_flops: int
    step_seconds: float
    run_seconds: float
    peak_temporary_bytes: int | None
    fused_seconds: float | None
    materialised_seconds: float | None
    materialised_bytes: int | None


def train(
    experiment: Experiment, run: Run, dataset: Any, on_epoch: Callable[[float], None] = lambda share: None
) -> Metrics:
    """Train one model and evaluate it once, after the last epoch, on the examples of the run's split.

    The seed decides the initial weights, the order of the examples, and all random values in them. The last two do not
    depend on the method, so methods with the same seed can be compared in pairs.

    Args:
        experiment: the experiment.
        run: the run.
        dataset: the result of `experiment.load`.
        on_epoch: called before every epoch and at the end, with the fraction of the run that is done.

    Raises:
        ValueError: the run is one of the validation split, and the task has none.
    """
    begin = time.perf_counter()
    device = torch.device(run.device)
    task = experiment.task(run, dataset)
    _evaluated(run, task)  # fail here, before training, if there are none
    trainer = Trainer(build(experiment, run).to(device), task, run.setting, device)
    per_epoch = math.ceil(task.train.count / run.setting.batch_size)
    generator = torch.Generator().manual_seed(stream(run.seed, "order"))
    steps = steps_of(experiment, run, task, per_epoch * run.setting.epochs)
    seconds, losses = trainer.train(endless_batches(run, task, generator), steps, per_epoch, on_epoch)
    measures = evaluate(run, task, trainer.model)
    sizes = counts(trainer.model)
    cost = cost_of(trainer, task, run) if costs_are_measured(run) else dict.fromkeys(COSTS)
    return Metrics(
        measures={**measures, **task.levels},
        train_loss=losses.mean().item(),
        context_parameters=sizes.context,
        primary_parameters=sizes.primary,
        trainable_parameters=sizes.trainable,
        steps=steps,
        training_flops=steps * step_flops(trainer.model, task, run),
        step_seconds=seconds,
        run_seconds=time.perf_counter() - begin,
        **cost,
    )


class Trainer:
    """A model and its optimizer."""

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

    def train(
        self, batches: Iterator[Batch], steps: int, per_epoch: int, on_epoch: Callable[[float], None]
    ) -> tuple[float, Tensor]:
        """Do all training steps. With the cosine schedule, the learning rate falls to 0 over them.

        Returns:
            The median seconds of a step, without drawing the batch, and the losses of the last `per_epoch` steps,
            stacked.
        """
        if self.cosine:
            self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        seconds: list[float] = []
        losses: deque[Tensor] = deque(maxlen=per_epoch)
        for step in range(steps):
            if step % per_epoch == 0:
                on_epoch(step / steps)
            batch = next(batches)
            start = clock(self.device)
            losses.append(self.step(batch))
            seconds.append(clock(self.device) - start)
        on_epoch(1.0)
        return statistics.median(seconds), torch.stack(tuple(losses))

    def step(self, batch: Batch) -> Tensor:
        """Do one training step: forward, loss, backward, update. Returns the loss, or those of models side by side."""
        self.optimizer.zero_grad()
        loss = self.task.loss(self.model(batch.x, batch.cond), batch.target)
        loss.backward(torch.ones_like(loss))
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return loss.detach()


def build(experiment: Experiment, run: Run, method: str | None = None) -> nn.Module:
    """Return the model of a run, on the CPU, initialised from its seed. Torch's global generator does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(run.seed, "weights"))
        setting = run.setting
        sizes = replace(experiment.architecture(run), size=setting.size, initialisation=setting.initialisation)
        return METHODS[method or run.method].model(sizes)


def batches(run: Run, examples: Examples, generator: torch.Generator) -> Iterator[Batch]:
    """Yield the batches of one epoch: every example once, in random order. The last batch may be smaller."""
    for chosen in torch.randperm(examples.count, generator=generator).split(run.setting.batch_size):
        yield _to_device(run.device, examples.draw(chosen, generator))


@torch.no_grad()
def evaluate(run: Run, task: Task, model: nn.Module) -> dict[str, float]:
    """Return the means of the measures over the examples of the run's split.

    Random values for these examples depend only on the seed. The means are NaN if an output is not finite: a classifier
    without numbers would have an error of its own.
    """
    examples = _evaluated(run, task)
    generator = torch.Generator().manual_seed(stream(run.seed, "test"))
    training = model.training
    model.eval()
    sums: dict[str, float] = {}
    for chosen in torch.arange(examples.count).split(TEST_BATCH):
        batch = _to_device(run.device, examples.draw(chosen, generator))
        y = model(batch.x, batch.cond)
        known = 0.0 if y.isfinite().all() else math.nan
        for name, values in task.measure(y, batch.target).items():
            sums[name] = sums.get(name, 0.0) + known + values.double().sum().item()
    model.train(training)
    return {name: total / examples.count for name, total in sums.items()}


def _evaluated(run: Run, task: Task) -> Examples:
    """Return the examples that a run is evaluated on."""
    if run.split == "test":
        return task.test
    if task.validation is None:
        raise ValueError(f"validation: the task of {run.experiment} has no such examples to choose learning rates on")
    return task.validation


def endless_batches(run: Run, task: Task, generator: torch.Generator) -> Iterator[Batch]:
    """Yield the batches of one epoch after the other."""
    while True:
        yield from batches(run, task.train, generator)


def steps_of(experiment: Experiment, run: Run, task: Task, steps: int) -> int:
    """Return the given number of training steps, or as many as fit into the training flops of another method."""
    other = METHODS[run.method].flops_of
    if other is None:
        return steps
    theirs, own = (step_flops(build(experiment, run, m).to(run.device), task, run) for m in (other, run.method))
    return max(1, round(steps * theirs / own))


def step_flops(model: nn.Module, task: Task, run: Run) -> int:
    """Return the flops of forward and backward of a training batch. Deletes the gradients."""
    batch = _sample_batch(run, task)
    with FlopCounterMode(display=False) as counter:
        task.loss(model(batch.x, batch.cond), batch.target).backward()
    model.zero_grad()
    return int(counter.get_total_flops())


def costs_are_measured(run: Run) -> bool:
    """Return whether a run measures its costs: that of seed 0, for all seeds of its setting."""
    return (run.split, run.seed) == ("test", 0)


def cost_of(trainer: Trainer, task: Task, run: Run) -> dict[str, Any]:
    """Measure the memory of a step, and for a hypernetwork time and memory with and without writing weights out."""
    batch = _sample_batch(run, task)
    trainer.optimizer.zero_grad()
    model = trainer.model

    def peak(backend: AbstractContextManager[Any]) -> int:
        def forward_backward() -> Tensor:
            y = model(batch.x, batch.cond)
            task.loss(y, batch.target).backward()
            return y

        with backend:
            forward_backward()  # a first call may allocate memory that stays
            for parameter in model.parameters():
                parameter.grad = None
            return peak_temporary_bytes(forward_backward, run.device)

    def step(backend: Callable[[], AbstractContextManager[Any]]) -> None:
        with backend():
            trainer.step(batch)

    cost: dict[str, Any] = dict.fromkeys(COSTS)
    cost["peak_temporary_bytes"] = peak(nullcontext())
    if isinstance(model, Hypernetwork):
        cost["materialised_bytes"] = peak(use_backend("materialised"))
        trainer.scheduler = None
        for param_group in trainer.optimizer.param_groups:
            param_group["lr"] = 0.0  # timed steps must not change the weights
        backends = (nullcontext, lambda: use_backend("materialised"))
        cost["fused_seconds"], cost["materialised_seconds"] = interleaved_seconds(
            [lambda backend=backend: step(backend) for backend in backends],  # type: ignore[misc]
            TIMED_STEPS,
            trainer.device,
        )
    return cost


def _sample_batch(run: Run, task: Task) -> Batch:
    """Return a training batch to measure on."""
    chosen = torch.arange(min(run.setting.batch_size, task.train.count))
    return _to_device(run.device, task.train.draw(chosen, torch.Generator().manual_seed(0)))


def _to_device(device: str, batch: Batch) -> Batch:
    return Batch(*(tensor.to(device) for tensor in batch))
