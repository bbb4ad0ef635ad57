"""The one training loop: plain SGD, the error of the last epoch, and what a step costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fasthyper.experiments.data import Splits
from fasthyper.experiments.experiment import EMBEDDING, Batch, Experiment, Model, Run
from fasthyper.experiments.measure import peak_temporary_bytes
from fasthyper.nn import parameter_report

TEST_BATCH = 1000


@dataclass(frozen=True)
class Metrics:
    """What one run found.

    Attributes:
        test_error: share of wrong answers on the test split after the last epoch.
        test_loss: mean loss there.
        train_loss: mean loss over the last epoch's training batches.
        context_parameters: N_f or N_e, trainable parameters of f or e.
        primary_parameters: N_g, weights that f generates, or N_q, trainable parameters of q.
        trainable_parameters: all that is trained.
        step_seconds: median over the training steps: forward, loss, backward and update, without
            drawing the batch.
        run_seconds: the whole run.
        peak_temporary_bytes: of one forward and backward: see `measure`; outputs and gradients do not count.
    """

    test_error: float
    test_loss: float
    train_loss: float
    context_parameters: int
    primary_parameters: int
    trainable_parameters: int
    step_seconds: float
    run_seconds: float
    peak_temporary_bytes: int


def train(experiment: Experiment, run: Run, splits: Splits, on_epoch: Callable[[], None] = lambda: None) -> Metrics:
    """Train one model and test it once, after the last epoch.

    The seed decides everything: the initial weights, the order of the examples, and all that `draw` draws.
    The latter two do not depend on the method, so that both methods with one seed make a pair.

    Args:
        experiment: what is compared.
        run: which point of it.
        splits: raw examples for training and testing; the first dimension counts them.
        on_epoch: called after every epoch.
    """
    begin = time.perf_counter()
    device = torch.device(run.device)
    train_split, test_split = (split.to(device) for split in splits)
    model = build(experiment, run).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=run.lr)
    generator = torch.Generator().manual_seed(3 * run.seed + 1)
    steps: list[float] = []
    losses: list[Tensor] = []
    for _ in range(run.epochs):
        losses.clear()
        for batch in batches(experiment, run, train_split, generator):
            start = _clock(device)
            optimizer.zero_grad()
            loss = experiment.loss(model(batch.x, batch.cond), batch.target)
            loss.backward()
            optimizer.step()
            steps.append(_clock(device) - start)
            losses.append(loss.detach())
        on_epoch()
    test_error, test_loss = evaluate(experiment, run, model, test_split)
    optimizer.zero_grad()
    report = parameter_report(model)
    context, primary = (report.n_e, report.n_q) if run.method == EMBEDDING else (report.n_f, report.n_g)
    assert context is not None
    assert primary is not None
    return Metrics(
        test_error=test_error,
        test_loss=test_loss,
        train_loss=torch.stack(losses).mean().item(),
        context_parameters=context,
        primary_parameters=primary,
        trainable_parameters=report.trainable,
        step_seconds=statistics.median(steps),
        peak_temporary_bytes=_peak_of_a_step(experiment, run, model, train_split),
        run_seconds=time.perf_counter() - begin,
    )


def build(experiment: Experiment, run: Run) -> Model:
    """The model of a run, on the CPU, in the initial state of its seed; torch's own seed stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3 * run.seed)
        return experiment.build[run.method](run)


def batches(experiment: Experiment, run: Run, split: Tensor, generator: torch.Generator) -> Iterator[Batch]:
    """One epoch: every example once, in random order, the last batch as small as it comes."""
    for chosen in torch.randperm(len(split), generator=generator).split(run.batch_size):
        yield experiment.draw(split[chosen.to(split.device)], run, generator)


@torch.no_grad()
def evaluate(experiment: Experiment, run: Run, model: nn.Module, split: Tensor) -> tuple[float, float]:
    """Mean error and mean loss over a split; what is drawn for it depends on the seed alone."""
    generator = torch.Generator().manual_seed(3 * run.seed + 2)
    training = model.training
    model.eval()
    wrong = loss = 0.0
    for examples in split.split(TEST_BATCH):
        batch = experiment.draw(examples, run, generator)
        y = model(batch.x, batch.cond)
        wrong += experiment.wrong(y, batch.target).sum().item()
        loss += experiment.loss(y, batch.target).item() * len(examples)
    model.train(training)
    return wrong / len(split), loss / len(split)


def _peak_of_a_step(experiment: Experiment, run: Run, model: nn.Module, split: Tensor) -> int:
    batch = experiment.draw(split[: run.batch_size], run, torch.Generator().manual_seed(0))

    def step() -> Tensor:
        y = model(batch.x, batch.cond)
        experiment.loss(y, batch.target).backward()
        return y

    return peak_temporary_bytes(step, run.device)


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
