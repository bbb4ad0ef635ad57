"""How fast does the error fall with the number of parameters, on targets of known smoothness?

Targets are the first terms of random series in x from [-1, 1] and I from [-1, 1]^2. Their amplitudes fall with the
frequency like those of functions that are exactly r times differentiable (in the sense of Sobolev):

    rough        y = Σ_k a_k cos(π k·(x, I) + φ_k),   |a_k| ~ |k|^-(r + m/2),   m = m1 + m2 = 1 + 2
    separable    y = Σ_{j ≤ w} c_j(I) u_j(x),         linear in a code of w numbers; c_j and u_j are series as above

The primary is x -> h -> 1 with biases, with different h. The setting has the sizes of f and e.

Theorems 2 to 5 of Galanti and Wolf, On the Modularity of Hypernetworks, NeurIPS 2020 (arXiv 2002.10006). They bound
the error for the worst target of a whole class: it may be smaller for a single target, and larger after training.
Targets have no terms beyond a highest frequency, so exponents are fitted to primaries that do not resolve it yet.
Exponents also depend on the number of training steps: they are measured at two of them, and nothing is judged by them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fasthyper.experiments.catalogue.frontiers import SIZES, Level, frontier, optimizers
from fasthyper.experiments.claims import Exponent, Steeper
from fasthyper.experiments.experiment import (
    THEOREM,
    Axis,
    Batch,
    Examples,
    Experiment,
    Measure,
    Run,
    Study,
    Task,
    stream,
)
from fasthyper.experiments.methods import EMBEDDING, HYPERNETWORK, PLAIN, Architecture
from fasthyper.experiments.setting import ContextSetting

M1, M2 = 1, 2
POINTS = 32
TEST_COUNT = 500
TERMS = 64
CODE = 3


@dataclass(frozen=True, kw_only=True)
class ScalingSetting(ContextSetting):
    """A setting with the target and the primary.

    Attributes:
        kind: of the target: `"rough"` or `"separable"`.
        smoothness: r.
        frequency: the highest frequency in each direction.
        instances: instances in an epoch, each with N = 32 points.
        hidden: h.
        grows: whether f and e grow with h: `width` is then their width for h = 1.
    """

    DEFINING: ClassVar[tuple[str, ...]] = ("kind", "smoothness", "grows")

    kind: str
    smoothness: int
    frequency: int
    instances: int
    hidden: int
    grows: bool = False


def series(dimensions: int, smoothness: int, frequency: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Return a random function of `(*, dimensions)`."""
    k = torch.randint(-frequency, frequency + 1, (TERMS, dimensions), generator=generator).float()
    phase = 2 * math.pi * torch.rand(TERMS, generator=generator)
    # Frequencies are uniform in a cube, like the terms of a full series: amplitudes fall like its coefficients.
    a = k.norm(dim=1).clamp_min(1) ** -(smoothness + dimensions / 2)
    a = a / a.norm()
    return lambda at: ((math.pi * at @ k.T + phase).cos() * a).sum(dim=-1)


def target(setting: ScalingSetting, generator: torch.Generator) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a target y, `(B, N, 1)`, a function of x `(B, N, 1)` and I `(B, 2)`.

    Raises:
        ValueError: an unknown kind.
    """
    r, frequency = setting.smoothness, setting.frequency
    if setting.kind == "rough":
        whole = series(M1 + M2, r, frequency, generator)
        return lambda x, cond: whole(torch.cat([x, cond[:, None].expand(-1, x.shape[1], -1)], dim=2))[..., None]
    if setting.kind == "separable":
        u = [series(M1, r, frequency, generator) for _ in range(CODE)]
        c = [series(M2, r, frequency, generator) for _ in range(CODE)]
        return lambda x, cond: (
            torch.stack([one(cond)[:, None] * other(x) for one, other in zip(c, u, strict=True)]).sum(dim=0)[..., None]
            / math.sqrt(CODE)
        )
    raise ValueError(f"kind: {setting.kind!r} is not a kind of target; known are rough and separable")


def task(run: Run, dataset: Any) -> Task:
    """Return the task: a target drawn for the seed. Every access to a training example draws a new one."""
    setting = run.setting
    assert isinstance(setting, ScalingSetting)
    own = torch.Generator().manual_seed(stream(run.seed, "task"))
    unscaled = target(setting, own)

    def points(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = 2 * torch.rand(count, POINTS, M1, generator=generator) - 1
        return x, 2 * torch.rand(count, M2, generator=generator) - 1

    sample = unscaled(*points(1000, own))
    mean, std = sample.mean(), sample.std()

    def draw(chosen: Tensor, generator: torch.Generator) -> Batch:
        x, cond = points(len(chosen), generator)
        return Batch(x, cond, (unscaled(x, cond) - mean) / std)

    def drawn_once() -> Examples:
        return Examples.of(*draw(torch.arange(TEST_COUNT), own))

    return Task(
        train=Examples(setting.instances, draw),
        test=drawn_once(),
        validation=drawn_once(),
        loss=F.mse_loss,
        # The theorems bound the distance, not its square: take the root of the mean of each instance.
        measure=lambda y, target: {"rmse": (y - target).square().mean(dim=(1, 2)).sqrt()},
        levels={"constant": ((sample - mean) / std).square().mean(dim=(1, 2)).sqrt().mean().item()},
    )


def architecture(run: Run) -> Architecture:
    """Return the sizes: g, q: x -> h -> 1; f, e: `depth` layers."""
    setting = run.setting
    assert isinstance(setting, ScalingSetting)
    context = setting.context
    if setting.grows:  # theorem 5: weights are linear in a small code
        context = (*(width * setting.hidden for width in context[:-1]), CODE)
    return Architecture(
        cond=M2,
        x=M1,
        out=1,
        context=context,
        hidden=(setting.hidden,),
        embedding=setting.embedding,
        context_activation="tanh",
        generated_bias=True,
    )


def studies(preset: str, data: str) -> tuple[Study, ...]:
    """Return a frontier, optimizers, and exponents over N_g, N_q and all parameters; none if quick."""
    if preset == "quick":
        return ()
    paper = preset == "paper"
    base = ScalingSetting(
        epochs=40 if paper else 20,
        lr=3e-3,
        batch_size=50,
        optimizer="adam",
        schedule="cosine",
        kind="rough",
        smoothness=1,
        frequency=8 if paper else 3,
        instances=10_000 if paper else 2500,
        hidden=4,
        width=100,
        depth=4,
        embedding=4,
    )
    seeds = 20 if paper else 10
    hidden = (2, 4, 8, 16, 32, 64, 128) if paper else (2, 4, 8, 16)
    over_size = frontier(
        structure="a smooth function of x and I together",
        title="Over all parameters: a smooth function of x and I together",
        level=_CONSTANT,
        values=SIZES,
        setting=replace(base, hidden=16, width=50),
        seeds=10,
        measure=_ERROR,
        levels=(_CONSTANT,),
    )
    return (
        over_size,
        *optimizers((over_size,), preset),
        _primary("primary", "", base, hidden, seeds),
        _primary(
            "primary longer",
            f", with {'ten' if paper else 'four'} times the steps",
            replace(base, instances=(10 if paper else 4) * base.instances),
            hidden,
            seeds,
        ),
        _total(base, (4, 8, 16, 32, 64) if paper else (4, 8, 16), seeds),
    )


def _primary(name: str, budget: str, setting: ScalingSetting, hidden: tuple[int, ...], seeds: int) -> Study:
    m, r = M1 + M2, setting.smoothness
    return Study(
        name=name,
        title=f"Exponents over the parameters of the primary, r = 1{budget}",
        axis=Axis("hidden", "hidden units of the primary", log=True, count="primary_parameters"),
        values=hidden,
        methods=(HYPERNETWORK, EMBEDDING),
        setting=setting,
        seeds=seeds,
        measure=_ERROR,
        levels=(_CONSTANT,),
        claims=(
            Steeper(text="Primaries: how the error falls with N_g, against how it falls with N_q", whose=THEOREM),
            Exponent(
                text="Theorem 4: a hypernetwork's error falls at least as N_g^(-r/m1)",
                line=HYPERNETWORK,
                bound=-r / M1,
                at_least_as_steep=True,
                whose=THEOREM,
            ),
            Exponent(
                text="Theorem 2: with E bounded, the embedding method's error falls no faster than N_q^(-r/(m1+m2))",
                line=EMBEDDING,
                bound=-r / m,
                at_least_as_steep=False,
                whose=THEOREM,
            ),
            Exponent(
                text="Theorem 3: with any E, it falls no faster than N_q^(-r/min(m, 2 m1))",
                line=EMBEDDING,
                bound=-r / min(m, 2 * M1),
                at_least_as_steep=False,
                whose=THEOREM,
            ),
        ),
        note=f"Exponents are fitted over N_g and N_q. {_OPTIMISATION}",
    )


def _total(setting: ScalingSetting, hidden: tuple[int, ...], seeds: int) -> Study:
    m, r = M1 + M2, setting.smoothness
    return Study(
        name="total",
        title="Exponents over all parameters, r = 1, where I acts through a small code",
        axis=Axis("hidden", "hidden units of the primary", log=True, count="trainable_parameters"),
        values=hidden,
        methods=(HYPERNETWORK, EMBEDDING, PLAIN),
        setting=replace(setting, kind="separable", width=4, depth=3, grows=True),
        seeds=seeds,
        measure=_ERROR,
        levels=(_CONSTANT,),
        claims=(
            Steeper(
                text="Totals: how a hypernetwork's error falls with all parameters, against the embedding method's",
                whose=THEOREM,
            ),
            Exponent(
                text="Theorem 5: a hypernetwork's error falls at least as N^(-r/max(m1, m2))",
                line=HYPERNETWORK,
                bound=-r / max(M1, M2),
                at_least_as_steep=True,
                whose=THEOREM,
            ),
            Exponent(
                text="Theorem 1: the error of one network of x and I falls no faster than N^(-r/(m1+m2))",
                line=PLAIN,
                bound=-r / m,
                at_least_as_steep=False,
                whose=THEOREM,
            ),
        ),
        note=_OPTIMISATION,
    )


_ERROR = Measure("rmse", "root mean square of the error of an instance, averaged", log=True)
_CONSTANT: Level = ("constant", "the best constant")
_OPTIMISATION = (
    "At these budgets exponents measure how far training has come: they become steeper with more steps. They are no"
    " verdict on a theorem."
)


SCALING = Experiment(
    name="scaling",
    protocol=2,
    title="Scaling",
    source=(
        "theorems 1 to 5 of Tomer Galanti and Lior Wolf, On the Modularity of Hypernetworks, NeurIPS 2020"
        " (arXiv 2002.10006)"
    ),
    question=(
        "The theorems bound how many parameters an error ε needs in the worst case: N_g = O(ε^(-m1/r)) for the primary"
        " of a hypernetwork, N_q = Ω(ε^(-(m1+m2)/r)) for that of the embedding method, where x has m1 numbers, I has"
        " m2, and targets are r times differentiable. Here exponents are fitted to the errors of trained networks,"
        " with m1 = 1 and m2 = 2. The targets are random: the first terms of series of that smoothness."
    ),
    choices=(
        "A theorem is about the worst target of a class and the best network; here are typical targets and trained"
        " networks. Exponents are reported beside the bounds, with intervals and without a verdict. They move with the"
        " number of training steps, so the study over N_g and N_q is done twice: with 1,000 and 4,000 steps, or 8,000"
        " and 80,000 in the paper preset.",
        "Targets are series of 64 terms up to frequency 8 (3 in the standard preset) in each direction. Amplitudes"
        " fall with the power of the frequency that smoothness r = 1 allows, scaled to mean 0 and variance 1. There"
        " are no terms beyond that frequency: exponents are not asymptotic. Every access to a training example"
        " draws a new I with 32 points; 500 others are for testing and 500 for validation.",
        "f and e have three hidden layers of 100 units, tanh, and E = 4; the primary has ReLU. For theorem 5, f and e"
        " grow with the primary and end in a code of 3 numbers; generated weights are linear in it.",
        "Adam at 0.003, falling along a cosine. In the frontier, where f and e are 50 wide and the primary has 16"
        " hidden units, the rate is chosen for each method and size.",
    ),
    data=("series",),
    studies=studies,
    architecture=architecture,
    task=task,
)
