"""Seeds side by side: runs that differ in their seed only, trained as one run of S models.

On a GPU, a step of a small network is bound by the launches of its kernels. Here one kernel computes an operation for
all S models: their parameters are stacked along a leading dimension, and `torch.func.vmap` runs the network over it, as
for the ensembles of `torch.func.stack_module_state`. A fused op is one call for all models.

Each seed keeps the initial weights, the examples, their order and all random values that `training.train` gives it.
The optimizers are elementwise: SGD, Adam and Adadelta change each entry of a parameter by the gradients of this entry
alone, so one optimizer of the stacked parameters does what S optimizers would do. The results therefore equal those of
separate runs to rounding, and a seed that diverges changes nothing for the others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from fasthyper.experiments.experiment import Batch, Experiment, Run, Task, stream
from fasthyper.experiments.methods import counts
from fasthyper.experiments.training import (
    COSTS,
    Metrics,
    Trainer,
    build,
    cost_of,
    costs_are_measured,
    endless_batches,
    evaluate,
    step_flops,
    steps_of,
)

LARGEST = 16
"""The most seeds of a group: all of them have their models and their examples in memory at the same time."""


def groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Return groups of runs that differ in their seed only, `LARGEST` at most, in the order of their first runs."""
    by_rest: dict[Run, list[Run]] = {}
    for run in runs:
        by_rest.setdefault(replace(run, seed=0), []).append(run)
    position = {run: number for number, run in enumerate(runs)}
    found = [same[n : n + LARGEST] for same in by_rest.values() for n in range(0, len(same), LARGEST)]
    return sorted(found, key=lambda group: position[group[0]])


def name(group: Sequence[Run]) -> str:
    """Return the name of a group, for messages."""
    first, *others = group
    if first.split == "validation":
        return f"{first.method}, learning rate {first.setting.lr:.3g}"
    return f"{first.method}, " + (f"seeds {first.seed} to {others[-1].seed}" if others else f"seed {first.seed}")


class SideBySide(nn.Module):
    """S models of equal sizes as one model, whose parameters, inputs and outputs have a leading dimension of S.

    Args:
        models: at least one. Their parameters are copied.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> models = [nn.Bilinear(3, 2, 4) for _ in range(5)]
        >>> together = SideBySide(models)
        >>> x, cond = torch.randn(5, 8, 3), torch.randn(5, 8, 2)
        >>> y = together(x, cond)
        >>> y.shape, torch.allclose(y[1], models[1](x[1], cond[1]), atol=1e-6)
        (torch.Size([5, 8, 4]), True)
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        parameters, self._buffers_of_models = stack_module_state(list(models))
        self._names = list(parameters)
        self._template = (models[0],)  # in a tuple: as a submodule, its own parameters would be trained, too
        self.stacked = nn.ParameterList(parameters.values())

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Return `(S, B, *, O)` for x `(S, B, *, I)` and cond `(S, B, C)`."""
        parameters = dict(zip(self._names, self.stacked, strict=True))
        return vmap(self._call)(parameters, self._buffers_of_models, x, cond)

    def _call(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, cond: Tensor) -> Tensor:
        return functional_call(self._template[0], (parameters, buffers), (x, cond))

    @torch.no_grad()
    def copy_to(self, models: Sequence[nn.Module]) -> None:
        """Copy the parameters to S separate models."""
        for number, model in enumerate(models):
            own = dict(model.named_parameters())
            for name, stacked in zip(self._names, self.stacked, strict=True):
                own[name].copy_(stacked[number])


def train_side_by_side(
    experiment: Experiment, runs: Sequence[Run], dataset: Any, on_epoch: Callable[[float], None] = lambda share: None
) -> list[Metrics]:
    """Train runs that differ in their seed only at the same time, and test each once, after the last epoch.

    Of the metrics, `step_seconds` and `run_seconds` are the share of one run: the time of all divided by S. The other
    costs (`peak_temporary_bytes`, `fused_seconds`, `materialised_seconds`, `materialised_bytes`) are those of a step of
    one model alone, measured for the run of results with seed 0, and None for others. All other metrics equal those of
    `training.train` to rounding.

    Args:
        experiment: the experiment.
        runs: at least one run.
        dataset: the result of `experiment.load`.
        on_epoch: called before every epoch and at the end, with the fraction that is done.

    Returns:
        The metrics of each run.

    Raises:
        ValueError: there is no run, the runs differ in more than their seed, or their tasks have different numbers of
            training examples.
    """
    begin = time.perf_counter()
    if len({replace(run, seed=0) for run in runs}) != 1:
        raise ValueError(f"runs: expected runs that differ in their seed only, got {list(runs)}")
    first, device = runs[0], torch.device(runs[0].device)
    tasks = [experiment.task(run, dataset) for run in runs]
    sizes = [task.train.count for task in tasks]
    if len(set(sizes)) != 1:
        raise ValueError(f"runs: expected as many training examples for each seed, got {sizes}")
    models = [build(experiment, run).to(device) for run in runs]
    together = SideBySide(models)
    trainer = Trainer(together, replace(tasks[0], loss=_losses(tasks)), first.setting, device)
    per_epoch = math.ceil(sizes[0] / first.setting.batch_size)
    steps = steps_of(experiment, first, tasks[0], per_epoch * first.setting.epochs)
    orders = [torch.Generator().manual_seed(stream(run.seed, "order")) for run in runs]
    drawn = [endless_batches(*each) for each in zip(runs, tasks, orders, strict=True)]
    stacked = (Batch(*map(torch.stack, zip(*batches, strict=True))) for batches in zip(*drawn, strict=True))
    seconds, losses = trainer.train(stacked, steps, per_epoch, on_epoch)
    together.copy_to(models)
    measures = [evaluate(*each) for each in zip(runs, tasks, models, strict=True)]
    numbers = counts(models[0])
    costs = [
        cost_of(Trainer(model, task, run.setting, device), task, run)
        if costs_are_measured(run)
        else dict.fromkeys(COSTS)
        for run, task, model in zip(runs, tasks, models, strict=True)
    ]
    flops = steps * step_flops(models[0], tasks[0], first)
    share = (time.perf_counter() - begin) / len(runs)
    return [
        Metrics(
            measures={**found, **task.levels},
            train_loss=loss,
            context_parameters=numbers.context,
            primary_parameters=numbers.primary,
            trainable_parameters=numbers.trainable,
            steps=steps,
            training_flops=flops,
            step_seconds=seconds / len(runs),
            run_seconds=share,
            **cost,
        )
        for found, task, cost, loss in zip(measures, tasks, costs, losses.mean(dim=0).tolist(), strict=True)
    ]


def _losses(tasks: Sequence[Task]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of all models: of their outputs and targets, stacked, to `(S,)`."""
    loss = tasks[0].loss
    if all(task.loss is loss for task in tasks):
        return vmap(loss)

    def each(y: Tensor, target: Tensor) -> Tensor:
        return torch.stack([task.loss(*one) for task, *one in zip(tasks, y, target, strict=True)])

    return each
