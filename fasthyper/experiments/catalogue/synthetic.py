"""Synthetic targets: y is one number, a function of x and a condition I, which are drawn at random.

    type I     y = <x, h(I)>   h: d -> 300 -> 300 -> d, sigmoid, softmax at the end
    type II    y = h(x, I)     h: 2 d -> 100 -> 50 -> 50 -> 1, ELU
    type III   y = h(x ⊙ I)    h: d -> 100 -> 100 -> 50 -> 1, ELU

h has He-uniform weights, different for each seed. There is one x for each I. g, q: d -> 10 -> 1, ReLU.

Galanti and Wolf, On the Modularity of Hypernetworks, NeurIPS 2020 (arXiv 2002.10006), appendix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthyper.experiments.claims import AGAINST_OTHERS, Flat, Improves, Wins
from fasthyper.experiments.experiment import ASKED, Axis, Examples, Experiment, Measure, Run, Study, Task, stream
from fasthyper.experiments.methods import (
    ALL,
    EMBEDDING,
    HYPERNETWORK,
    TENFOLD,
    Architecture,
)
from fasthyper.experiments.setting import ContextSetting

HIDDEN = 10
TEST_COUNT = 10_000
DRAWS = 8
"""Conditions I for each x, to estimate how y varies with I."""
TYPES = ("type I", "type II", "type III")


@dataclass(frozen=True, kw_only=True)
class SyntheticSetting(ContextSetting):
    """A setting with the target, the number of examples, and a factor.

    Attributes:
        d: features of x, and of I.
        samples: training examples.
        factor: i of the paper's sweep over the dimension of the embedding: the last hidden layer of f has `factor`
            times the width, and E is `factor` times `embedding`.
        kind: of the target: one of `TYPES`.
    """

    DEFINING: ClassVar[tuple[str, ...]] = ("kind",)

    d: int
    samples: int
    factor: int = 1
    kind: str = TYPES[0]


def target(kind: str, d: int, generator: torch.Generator) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a target y(x, I) with random weights: `(n, d)` and `(n, d)` to `(n, 1)`.

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "type I":
        h = _he_uniform((d, 300, 300, d), nn.Sigmoid, generator)
        return lambda x, cond: (x * h(cond).softmax(dim=1)).sum(dim=1, keepdim=True)
    if kind == "type II":
        h = _he_uniform((2 * d, 100, 50, 50, 1), nn.ELU, generator)
        return lambda x, cond: h(torch.cat([x, cond], dim=1))
    if kind == "type III":
        h = _he_uniform((d, 100, 100, 50, 1), nn.ELU, generator)
        return lambda x, cond: h(x * cond)
    raise ValueError(f"kind: {kind!r} is not a type of target; known are {', '.join(TYPES)}")


@torch.no_grad()
def task(run: Run, dataset: Any) -> Task:
    """Return the task: examples drawn for the seed. Its levels are the errors of simpler predictors.

    The best predictor that ignores I has the error E[Var(y | x)]. It is estimated from several I for each x.
    """
    setting = run.setting
    assert isinstance(setting, SyntheticSetting)
    generator = torch.Generator().manual_seed(stream(run.seed, "task"))
    y = target(setting.kind, setting.d, generator)

    def normal(count: int) -> Tensor:
        return torch.randn(count, setting.d, generator=generator)

    def examples(count: int) -> tuple[Tensor, Tensor, Tensor]:
        x, cond = normal(count), normal(count)
        return x.to(run.device), cond.to(run.device), y(x, cond).to(run.device)

    train, test = examples(setting.samples), examples(TEST_COUNT)
    x = test[0].cpu()
    ignores = torch.cat([y(x, normal(TEST_COUNT)) for _ in range(DRAWS)], dim=1).var(dim=1).mean().item()
    variance = test[2].var().item()

    def measure(y: Tensor, target: Tensor) -> dict[str, Tensor]:
        squared = (y - target).square().mean(dim=1)
        return {"mse": squared, "share": squared / variance}

    levels = {"ignores": ignores / variance, "constant": 1.0, "ignores_mse": ignores, "constant_mse": variance}
    return Task(Examples.of(*train), Examples.of(*test), F.mse_loss, measure, levels)


def architecture(run: Run) -> Architecture:
    """Return the sizes: g, q: d -> 10 -> 1; f, e: `depth` layers, the last hidden one of f `factor` times as wide."""
    setting = run.setting
    assert isinstance(setting, SyntheticSetting)
    return Architecture(
        cond=setting.d,
        x=setting.d,
        out=1,
        context=(*setting.context[:-1], setting.factor * setting.width),
        embed_context=setting.context,
        hidden=(HIDDEN,),
        embedding=setting.factor * setting.embedding,
    )


def studies(preset: str, data: str) -> tuple[Study, ...]:
    """Return for each type of target a study over depth and one over the dimension of the embedding."""
    quick = preset == "quick"
    depth = SyntheticSetting(
        epochs=16 if quick else 100,
        lr=0.03 if quick else 0.01,
        batch_size=200,
        d=20 if quick else 1000,
        samples=10_000 if quick else 30_000,
        depth=3,
        width=100,
        embedding=200 if quick else 10_000,
    )
    dimension = replace(depth, d=20 if quick else 100, embedding=20 if quick else 100)
    return tuple(
        study
        for kind in TYPES
        for study in (
            Study(
                name=f"depth {kind}",
                title=f"T{kind[1:]}, over the depth of f and e",
                axis=Axis("depth", "depth of f and e (linear layers)"),
                values=(3, 4) if quick else tuple(range(2, 10)),
                methods=ALL,
                setting=replace(depth, kind=kind),
                seeds=3 if quick else 100,
                measure=_MSE,
                levels=_LEVELS,
                also=_ALSO,
                claims=(
                    Wins(text="The hypernetwork wins from depth 3 on", least=3),
                    Improves(text="The hypernetwork improves with depth"),
                    Flat(text="The embedding method does not improve with depth"),
                    Wins(
                        text="The hypernetwork does better than any predictor that ignores I",
                        over=f"{HYPERNETWORK}:ignores",
                        whose=ASKED,
                    ),
                    Wins(
                        text="The embedding method does better than any predictor that ignores I",
                        line=EMBEDDING,
                        over=f"{EMBEDDING}:ignores",
                        whose=ASKED,
                    ),
                    *AGAINST_OTHERS,
                ),
            ),
            Study(
                name=f"dimension {kind}",
                title=f"T{kind[1:]}, over the dimension of the embedding",
                axis=Axis("factor", "i: f's last hidden layer has 100 i units, E is d i or 10 d i", log=True),
                values=(1, 4) if quick else tuple(range(1, 9)),
                methods=(HYPERNETWORK, EMBEDDING, TENFOLD),
                setting=replace(dimension, kind=kind),
                seeds=3 if quick else 100,
                measure=_MSE,
                levels=_LEVELS,
                also=_ALSO,
                claims=(
                    Wins(text="The hypernetwork wins by far (a factor of 1.5 at least) where E is d i", margin=1.5),
                    Wins(
                        text="The hypernetwork wins by far (a factor of 1.5 at least) where E is 10 d i",
                        over=TENFOLD,
                        margin=1.5,
                    ),
                    Flat(text="The embedding method does not improve with the dimension of the embedding, d i"),
                    Flat(
                        text="The embedding method does not improve with the dimension of the embedding, 10 d i",
                        line=TENFOLD,
                    ),
                ),
            ),
        )
    )


_MSE = Measure("share", "mean squared error / variance of the target", log=True)
_ALSO = (
    ("mse", "mean squared error"),
    ("ignores_mse", "of the best predictor that ignores I"),
    ("constant_mse", "variance"),
)
_LEVELS = (("ignores", "the best predictor that ignores I"), ("constant", "the best constant"))


def _he_uniform(sizes: tuple[int, ...], activation: type[nn.Module], generator: torch.Generator) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layer = nn.utils.skip_init(nn.Linear, inputs, outputs)  # no weights from torch's own generator
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(layer.bias)
        layers += [layer, activation()]
    return nn.Sequential(*layers[:-1])


SYNTHETIC = Experiment(
    name="synthetic",
    protocol=1,
    title="Synthetic targets",
    source="Tomer Galanti and Lior Wolf, On the Modularity of Hypernetworks, NeurIPS 2020 (arXiv 2002.10006), appendix",
    question=(
        "y is a number that depends on x and on a condition I through a network of random weights: linear in x with"
        " a softmax of I (type I), of both together (type II), or of their product (type III). x and I are normal,"
        " with one x for each I. Which learns it better: a small network whose weights are generated from I, or one"
        " that gets an encoding of I?"
    ),
    choices=(
        "The paper plots only the mean squared error. Here the figures also show the error of the best predictor that"
        " ignores I: a method above this line is no better than one without I, whatever its rank. In the figures,"
        " errors are divided by the variance of the target, which differs from target to target; the tables have both.",
        "The paper leaves open: epochs (100; 16 in the quick preset) and the number of test examples (10,000). It has"
        " batches of 200, SGD at 0.01 (0.03 in the quick preset) and 30,000 samples. Biases of the targets are 0.",
        "Type I has sigmoid and softmax, as in the paper; the readme of its code says ELU.",
        "In the sweep over the dimension of the embedding, where d = 100, the paper gives E as 100 i and as 1000 i."
        " Both are run, as d i and 10 d i.",
        "The quick preset has d = 20 and 10,000 samples (the paper: d = 1000 over depth, 100 over the dimension of the"
        " embedding, 30,000 samples), and E = 200 over depth (10,000): targets that can be learned within minutes.",
        "The initialisation of f, e and q, including the last layer of f, is torch's default.",
    ),
    data=("normal",),
    studies=studies,
    architecture=architecture,
    task=task,
)
