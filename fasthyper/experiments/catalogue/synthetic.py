"""Synthetic targets: y is one number, a function of x and a condition I, which are drawn at random.

    type I     y = <x, h(I)>   h: d -> 300 -> 300 -> d, sigmoid, softmax at the end
    type II    y = h(x, I)     h: 2 d -> 100 -> 50 -> 50 -> 1, ELU
    type III   y = h(x ⊙ I)    h: d -> 100 -> 100 -> 50 -> 1, ELU

h has He-uniform weights, different for each seed. y is scaled to mean 0 and variance 1. There is one x for each I, and
both are drawn anew at every access. g, q: d -> 10 -> 1, ReLU.

Galanti and Wolf, On the Modularity of Hypernetworks, NeurIPS 2020 (arXiv 2002.10006), appendix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthyper.experiments.catalogue.frontiers import SIZES, TUNING, about_primaries, frontier, learns, optimizers
from fasthyper.experiments.claims import Flat, Improves, Wins
from fasthyper.experiments.experiment import (
    Axis,
    Batch,
    Examples,
    Experiment,
    Measure,
    Run,
    Study,
    Task,
    Tuning,
    stream,
)
from fasthyper.experiments.methods import (
    BIASES,
    EMBEDDING,
    EQUAL_FLOPS,
    FILM,
    HYPERNETWORK,
    TENFOLD,
    Architecture,
)
from fasthyper.experiments.setting import ContextSetting

HIDDEN = 10
TEST_COUNT = 10_000
DRAWS = 4
"""Conditions I for each x, to estimate how y varies with I."""
TYPES = ("type I", "type II", "type III")
STRUCTURES = dict(
    zip(
        TYPES,
        (
            "linear in x, with coefficients that I gives",
            "a random network of x and I",
            "x and I are multiplied, then a network",
        ),
        strict=True,
    )
)


@dataclass(frozen=True, kw_only=True)
class SyntheticSetting(ContextSetting):
    """A setting with the target, the number of examples, and a factor.

    Attributes:
        d: features of x, and of I.
        samples: training examples of an epoch, all new.
        factor: i of the paper's sweep over the dimension of the embedding: the last hidden layer of f has `factor`
            times the width, and E is `factor` times `embedding`.
        kind: of the target: one of `TYPES`.
    """

    DEFINING: ClassVar[tuple[str, ...]] = ("kind",)

    d: int
    samples: int
    factor: int = 1
    kind: str = TYPES[0]


def target(kind: str, d: int, generator: torch.Generator, device: str = "cpu") -> Callable[[Tensor, Tensor], Tensor]:
    """Return a target y(x, I) with random weights: `(n, d)` and `(n, d)` to `(n, 1)`.

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "type I":
        h = _he_uniform((d, 300, 300, d), nn.Sigmoid, generator).to(device)
        return lambda x, cond: (x * h(cond).softmax(dim=1)).sum(dim=1, keepdim=True)
    if kind == "type II":
        h = _he_uniform((2 * d, 100, 50, 50, 1), nn.ELU, generator).to(device)
        return lambda x, cond: h(torch.cat([x, cond], dim=1))
    if kind == "type III":
        h = _he_uniform((d, 100, 100, 50, 1), nn.ELU, generator).to(device)
        return lambda x, cond: h(x * cond)
    raise ValueError(f"kind: {kind!r} is not a type of target; known are {', '.join(TYPES)}")


@torch.no_grad()
def task(run: Run, dataset: Any) -> Task:
    """Return the task of the seed. Its levels are the errors of simpler predictors, and the variance before scaling.

    The best predictor that ignores I has the error E[Var(y | x)]. It is estimated from several I for each x. Training
    examples are new at every access; those for testing and for validation are drawn once.
    """
    setting = run.setting
    assert isinstance(setting, SyntheticSetting)
    own = torch.Generator().manual_seed(stream(run.seed, "task"))
    y = target(setting.kind, setting.d, own, run.device)

    def normal(count: int, generator: torch.Generator) -> Tensor:
        return torch.randn(count, setting.d, generator=generator).to(run.device)

    x = normal(TEST_COUNT, own)
    found = torch.cat([y(x, normal(TEST_COUNT, own)) for _ in range(DRAWS)], dim=1).double()
    mean, variance = found.mean().item(), found.var().item()

    @torch.no_grad()
    def draw(chosen: Tensor, generator: torch.Generator) -> Batch:
        x, cond = normal(len(chosen), generator), normal(len(chosen), generator)
        return Batch(x, cond, (y(x, cond) - mean) / math.sqrt(variance))

    def drawn_once() -> Examples:
        return Examples.of(*draw(torch.arange(TEST_COUNT), own))

    return Task(
        train=Examples(setting.samples, draw),
        test=drawn_once(),
        validation=drawn_once(),
        loss=F.mse_loss,
        measure=lambda y, target: {"mse": (y - target).square().mean(dim=1)},
        levels={"ignores": found.var(dim=1).mean().item() / variance, "constant": 1.0, "variance": variance},
    )


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
    """Return a frontier for each type of target, then studies of optimizers, depth and the embedding's dimension.

    A run of the paper's own studies takes minutes: they are in the paper's preset alone. The middle one has a study
    over depth at the sizes and tuned rates of its frontiers.
    """
    frontiers = tuple(_frontier(kind, preset) for kind in TYPES)
    if preset == "quick":
        return frontiers
    frontiers += optimizers(frontiers, preset)
    if preset == "standard":
        return frontiers + tuple(_depth(kind, _SMALL, (2, 4, 8), _TWO, 10, TUNING) for kind in TYPES)
    own = SyntheticSetting(
        epochs=100, lr=0.01, batch_size=200, d=1000, samples=30_000, depth=3, width=100, embedding=10_000
    )
    return frontiers + tuple(
        study
        for kind in TYPES
        for study in (
            _depth(kind, own, tuple(range(2, 10)), (*_TWO, EQUAL_FLOPS, FILM, BIASES), 100),
            _dimension(kind, replace(own, d=100, embedding=100)),
        )
    )


def _frontier(kind: str, preset: str) -> Study:
    quick = preset == "quick"
    return frontier(
        name=f"frontier {kind}",
        title=f"T{kind[1:]}: {STRUCTURES[kind]}",
        structure=STRUCTURES[kind],
        level=_IGNORES,
        values=(1.0,) if quick else SIZES,
        setting=replace(_SMALL, kind=kind, samples=10_000 if preset == "paper" else _SMALL.samples),
        seeds=5 if quick else 10,
        claims=(about_primaries(_IGNORES),),
        **_SHOWN,
    )


def _depth(
    kind: str,
    setting: SyntheticSetting,
    depths: tuple[int, ...],
    methods: tuple[str, ...],
    seeds: int,
    tuning: Tuning | None = None,
) -> Study:
    return Study(
        name=f"depth {kind}",
        title=f"T{kind[1:]}, over the depth of f and e, at {_rate(tuning)}",
        axis=Axis("depth", "depth of f and e (linear layers)"),
        values=depths,
        methods=methods,
        setting=replace(setting, kind=kind),
        seeds=seeds,
        tuning=tuning,
        claims=(
            Wins(
                text="Primaries: the hypernetwork errs less than the embedding method from depth 3 on",
                least=3,
                premises=_LEARN,
            ),
            Improves(text="The hypernetwork improves with depth", premises=(learns(_IGNORES, HYPERNETWORK),)),
            Flat(text="The embedding method does not improve with depth", premises=(learns(_IGNORES, EMBEDDING),)),
        ),
        **_SHOWN,
    )


def _dimension(kind: str, setting: SyntheticSetting) -> Study:
    wins = "Primaries: the hypernetwork errs far less (by a factor of 1.5 at least) where E is"
    flat = "The embedding method does not improve with the dimension of the embedding,"
    tenfold = (learns(_IGNORES, HYPERNETWORK, TENFOLD),)
    return Study(
        name=f"dimension {kind}",
        title=f"T{kind[1:]}, over the dimension of the embedding, at {_rate(None)}",
        axis=Axis("factor", "i: f's last hidden layer has 100 i units, E is d i or 10 d i", log=True),
        values=tuple(range(1, 9)),
        methods=(*_TWO, TENFOLD),
        setting=replace(setting, kind=kind),
        seeds=100,
        claims=(
            Wins(text=f"{wins} d i", margin=1.5, premises=_LEARN),
            Wins(text=f"{wins} 10 d i", over=TENFOLD, margin=1.5, premises=tenfold),
            Flat(text=f"{flat} d i", premises=(learns(_IGNORES, EMBEDDING),)),
            Flat(text=f"{flat} 10 d i", line=TENFOLD, premises=(learns(_IGNORES, TENFOLD),)),
        ),
        **_SHOWN,
    )


def _rate(tuning: Tuning | None) -> str:
    return "the paper's fixed rate" if tuning is None else "tuned rates"


_SMALL = SyntheticSetting(
    epochs=60,
    lr=3e-3,
    batch_size=100,
    optimizer="adam",
    schedule="cosine",
    d=20,
    samples=2000,
    depth=3,
    width=50,
    embedding=200,
)
_IGNORES = ("ignores", "the best predictor that ignores I")
_TWO = (HYPERNETWORK, EMBEDDING)
_LEARN = (learns(_IGNORES, *_TWO),)
_SHOWN: dict[str, Any] = {
    "measure": Measure("mse", "mean squared error / variance of the target", log=True),
    "levels": (_IGNORES, ("constant", "the best constant")),
    "also": (("variance", "variance of the target before it is scaled"),),
}


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
    protocol=2,
    title="Synthetic targets",
    source="Tomer Galanti and Lior Wolf, On the Modularity of Hypernetworks, NeurIPS 2020 (arXiv 2002.10006), appendix",
    question=(
        "y is a number that depends on x and on a condition I through a network of random weights: linear in x with"
        " a softmax of I (type I), of both together (type II), or of their product (type III). x and I are normal,"
        " with one x for each I. Which learns it better: a small network whose weights are generated from I, or one"
        " that gets an encoding of I?"
    ),
    choices=(
        "The paper plots the mean squared error alone. Here targets are scaled to mean 0 and variance 1 over x and I:"
        " a learning rate then means the same for each. And the figures show the error of the best predictor that"
        " ignores I: a method above this line is no better than one without I, whatever its rank. A comparison of"
        " methods that all are above it says nothing; its verdict is that the premise is unmet.",
        "x and I are drawn anew at every access, so that no method learns a fixed set by heart. The paper has a set of"
        " 30,000 samples; here that many new ones are an epoch. Testing and validation have 10,000 other samples each.",
        "The frontiers have targets that can be learned within seconds: d = 20, E = 200, f and e of three layers of"
        " width 50, and 60 epochs of 20 batches of 100 new samples (of 100 batches in the paper preset) with Adam. The"
        " rate falls along a cosine; its start is chosen for each method and size, on targets of other seeds. All"
        " else is fixed. At these sizes g has 210 weights and the embedding method's q 2,221. The quick preset has one"
        " size.",
        "The studies of the paper preset are the paper's: d = 1000 over depth, 100 over the dimension of the embedding,"
        " batches of 200, SGD at 0.01. Its epochs are open, 100 here. The standard preset has the study over depth at"
        " the sizes and tuned rates of the frontiers.",
        "Type I has sigmoid and softmax, as in the paper; the readme of its code says ELU. Targets have no biases.",
        "In the sweep over the dimension of the embedding, where d = 100, the paper gives E as 100 i and as 1000 i."
        " Both are run, as d i and 10 d i.",
        "The initialisation of f, e and q, including the last layer of f, is torch's default.",
    ),
    data=("normal",),
    studies=studies,
    architecture=architecture,
    task=task,
)
