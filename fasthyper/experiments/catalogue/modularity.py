"""Compositional modularity: are combinations of modules learned that were never seen together?

A teacher has M modules, matrices Θ_m. The condition I has one number for each module, most of them 0, and selects a
network of x:

    y = A ReLU(Σ_m I_m Θ_m x / √n)   x: n = 16 numbers, uniform with variance 1; 16 hidden units; A: 16 -> 4, shared

Students see single modules and some pairs of modules with random amounts from [0.5, 1]. They are tested on these, on
pairs that they never saw together, and on four modules at once. With connected support, pairs link all modules; with
disconnected support, each pair is in one of two halves:

    connected      m, and (m, m + 1) and (m, m + 2) modulo M
    disconnected   m, and all pairs of the first M / 2 modules, and all pairs of the others

g, q: 16 -> 32 -> 4, ReLU. f, e: M -> 2 M -> …, linear: f generates weights that are linear in a code of 2 M numbers.

Schug, Kobayashi, Akram, Wołczyk, Proca, von Oswald, Pascanu, Sacramento, Steger, Discovering modular solutions that
generalize compositionally, ICLR 2024 (arXiv 2312.15001), and the authors' code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fasthyper.experiments.catalogue.frontiers import TUNING, frontier, optimizers, wins
from fasthyper.experiments.claims import Learns, Wins
from fasthyper.experiments.experiment import (
    ASKED,
    Axis,
    Batch,
    Examples,
    Experiment,
    Line,
    Measure,
    Run,
    Study,
    Task,
    stream,
)
from fasthyper.experiments.methods import (
    ATTENTION,
    DEEP_Q,
    EMBEDDING,
    FILM_WIDE,
    HYPERNETWORK,
    METHODS,
    PLAIN_WIDE,
    WIDE_Q,
    Architecture,
)
from fasthyper.experiments.setting import ContextSetting

INPUTS, TEACHER_HIDDEN, OUTPUTS = 16, 16, 4
MANY = 4
"""Modules in a combination of many."""
GROUP_SIZE = 500
"""Instances of each group in the test examples."""
VALIDATION_PAIRS = 4
SUPPORTS = ("connected", "disconnected")
GROUPS = ("seen", "unseen", "many")
"""The groups of test examples: combinations of training, pairs that were never seen together, and `MANY` modules."""
STUDENTS = (HYPERNETWORK, EMBEDDING, WIDE_Q, DEEP_Q, FILM_WIDE, ATTENTION, PLAIN_WIDE)


@dataclass(frozen=True, kw_only=True)
class ModularitySetting(ContextSetting):
    """A setting with the teacher and its combinations.

    Attributes:
        modules: M, even, at least 6.
        support: of the combinations of training: one of `SUPPORTS`.
        code: what f and e apply to their hidden units: `"linear"` (nothing) or `"relu"`.
        instances: conditions in an epoch, new ones at every access.
        points: N, the points of an instance.
        hidden: units of g and q.
    """

    DEFINING: ClassVar[tuple[str, ...]] = ("support", "code")

    modules: int
    support: str = SUPPORTS[0]
    code: str = "linear"
    instances: int
    points: int
    hidden: int


def trained_on(support: str, modules: int) -> list[tuple[int, ...]]:
    """Return the combinations of training: all single modules, and some pairs.

    Raises:
        ValueError: an unknown support, or a number of modules that is odd or below 6.

    Example:
        >>> [pair for pair in trained_on("disconnected", 6) if len(pair) == 2]
        [(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5)]
    """
    if modules < 6 or modules % 2:
        raise ValueError(f"modules: expected an even number of at least 6, got {modules}")
    singles = [(m,) for m in range(modules)]
    if support == "connected":
        pairs = {tuple(sorted((m, (m + step) % modules))) for m in range(modules) for step in (1, 2)}
        return [*singles, *sorted(pairs)]
    if support == "disconnected":
        half = modules // 2
        return [*singles, *(pair for pair in combinations(range(modules), 2) if (pair[0] < half) == (pair[1] < half))]
    raise ValueError(f"support: {support!r} is not known; known are {', '.join(SUPPORTS)}")


def never_seen(modules: int) -> list[tuple[int, ...]]:
    """Return the pairs that are in no support."""
    seen = {pair for support in SUPPORTS for pair in trained_on(support, modules)}
    return [pair for pair in combinations(range(modules), 2) if pair not in seen]


@dataclass(frozen=True)
class Teacher:
    """The network with modules.

    Attributes:
        modules: Θ, `(M, H, n)`.
        readout: A, `(O, H)`.
    """

    modules: Tensor
    readout: Tensor

    @classmethod
    def drawn(cls, modules: int, generator: torch.Generator) -> Teacher:
        """Return a teacher with normal modules and a normal readout; outputs have a variance near 1."""
        theta = torch.randn(modules, TEACHER_HIDDEN, INPUTS, generator=generator)
        readout = torch.randn(OUTPUTS, TEACHER_HIDDEN, generator=generator) / math.sqrt(TEACHER_HIDDEN / 2)
        return cls(theta, readout)

    def __call__(self, x: Tensor, cond: Tensor) -> Tensor:
        """Return `(B, N, O)` for x `(B, N, n)` and cond `(B, M)`."""
        weights = torch.einsum("bm,mhi->bhi", cond, self.modules) / math.sqrt(INPUTS)
        return torch.einsum("bni,bhi->bnh", x, weights).relu() @ self.readout.T


def task(run: Run, dataset: Any) -> Task:
    """Return the task. The last entry of a target is the number of its group in `GROUPS`, for the measures."""
    setting = run.setting
    assert isinstance(setting, ModularitySetting)
    own = torch.Generator().manual_seed(stream(run.seed, "task"))
    teacher = Teacher.drawn(setting.modules, own)
    seen = trained_on(setting.support, setting.modules)
    unseen = never_seen(setting.modules)
    order = torch.randperm(len(unseen), generator=own).tolist()
    few = min(VALIDATION_PAIRS, len(unseen) // 2)
    kept, tested = [unseen[i] for i in order[:few]], [unseen[i] for i in order[few:]]
    many = list(combinations(range(setting.modules), MANY))

    def examples(*groups: list[tuple[int, ...]], count: int) -> Examples:
        """Return examples of each group, `count` of each."""
        sizes = torch.tensor([len(group) for group in groups])
        first = sizes.cumsum(0) - sizes
        table = torch.cat([_k_hot(group, setting.modules) for group in groups])

        def draw(chosen: Tensor, generator: torch.Generator) -> Batch:
            group = chosen // count
            pick = (torch.rand(len(chosen), generator=generator) * sizes[group]).long()
            amounts = 0.5 + 0.5 * torch.rand(len(chosen), setting.modules, generator=generator)
            cond = table[first[group] + pick] * amounts
            x = math.sqrt(3) * (2 * torch.rand(len(chosen), setting.points, INPUTS, generator=generator) - 1)
            number = group.float()[:, None, None].expand(-1, setting.points, 1)
            return Batch(x, cond, torch.cat([teacher(x, cond), number], dim=2))

        return Examples(len(groups) * count, draw)

    # The variance of the outputs of each group: errors are shares of it.
    everything = examples(seen, tested, many, count=GROUP_SIZE)
    sample = everything.draw(torch.arange(everything.count), own).target
    variances = sample[..., :-1].unflatten(0, (len(GROUPS), GROUP_SIZE)).transpose(0, 1).flatten(2).var(dim=(0, 2))

    def measure(y: Tensor, target: Tensor) -> dict[str, Tensor]:
        number = target[:, 0, -1].long()
        share = (y - target[..., :-1]).square().mean(dim=(1, 2)) / variances.to(y.device)[number]
        present = [(name, number == g) for g, name in enumerate(GROUPS)]
        return {name: torch.where(at, share * len(GROUPS), 0.0) for name, at in present}

    return Task(
        examples(seen, count=setting.instances),
        everything,
        lambda y, target: F.mse_loss(y, target[..., :-1]),
        measure,
        levels={"constant": 1.0},
        validation=examples(seen, kept, many, count=GROUP_SIZE),
    )


def architecture(run: Run) -> Architecture:
    """Return the sizes: g, q: 16 -> `hidden` -> 4; f, e: `depth` layers."""
    setting = run.setting
    assert isinstance(setting, ModularitySetting)
    return Architecture(
        cond=setting.modules,
        x=INPUTS,
        out=OUTPUTS,
        context=setting.context,
        hidden=(setting.hidden,),
        embedding=setting.embedding,
        context_activation=setting.code,
    )


def studies(preset: str, data: str) -> tuple[Study, ...]:
    """Return a frontier, and studies of the optimizers, the support and the kind of f; none if quick."""
    if preset == "quick":
        return ()
    paper = preset == "paper"
    base = ModularitySetting(
        epochs=100 if paper else 12,
        lr=1e-2,
        batch_size=32,
        optimizer="adam",
        schedule="cosine",
        modules=8,
        instances=3200,
        points=32,
        hidden=2 * TEACHER_HIDDEN,
        depth=2,
        width=16,
        embedding=16,
    )
    seeds = 20 if paper else 10
    two = (HYPERNETWORK, WIDE_Q, FILM_WIDE)
    over_size = frontier(
        title="Pairs that were never seen together, over all parameters",
        structure="I says which modules are summed, in new combinations",
        level=_CONSTANT,
        values=(0.5, 1.0, 4.0),
        methods=STUDENTS,
        setting=base,
        seeds=seeds,
        measure=_UNSEEN,
        levels=_LEVELS,
        also=_ALSO,
    )
    return (
        over_size,
        *optimizers((over_size,), preset),
        Study(
            name="support",
            title="Which pairs are seen in training",
            axis=Axis("support", "support"),
            values=SUPPORTS,
            methods=two,
            setting=base,
            seeds=seeds,
            measure=_UNSEEN,
            levels=_LEVELS,
            also=_ALSO,
            lines=tuple(
                Line(method, group, f"{METHODS[method].label}, {text}", dashed=group == "seen")
                for method in two
                for group, text in (("unseen", "unseen pairs"), ("seen", "seen"))
            ),
            claims=(
                Wins(
                    text="Connected support: on unseen pairs, the hypernetwork errs at most a tenth of a constant",
                    over=f"{HYPERNETWORK}:constant",
                    at="connected",
                    margin=10,
                    whose=_SCHUG,
                ),
                Wins(
                    text="Disconnected support: the hypernetwork errs ten times more on unseen pairs than on seen",
                    line=f"{HYPERNETWORK}:seen",
                    over=f"{HYPERNETWORK}:unseen",
                    at="disconnected",
                    margin=10,
                    whose=_SCHUG,
                    premises=(
                        Learns(
                            text="On seen pairs, the hypernetwork errs less than a constant",
                            lines=(f"{HYPERNETWORK}:seen",),
                            level=_CONSTANT[0],
                            whose=ASKED,
                        ),
                    ),
                ),
            ),
            tuning=TUNING,
        ),
        Study(
            name="code",
            title="f linear, or with ReLU",
            axis=Axis("code", "hidden units of f and e"),
            values=("linear", "relu"),
            methods=two,
            setting=base,
            seeds=seeds,
            measure=_UNSEEN,
            levels=_LEVELS,
            also=_ALSO,
            claims=tuple(
                wins(
                    _CONSTANT,
                    over,
                    text=f"The hypernetwork errs less than {what} on unseen pairs, {kind} f",
                    at=at,
                    whose=ASKED,
                )
                for kind, at in (("with a linear", "linear"), ("with a ReLU", "relu"))
                for what, over in (("a wide q", WIDE_Q), ("FiLM with a wide q", FILM_WIDE))
            ),
            tuning=TUNING,
        ),
    )


_SCHUG = "Schug et al. 2024"
_UNSEEN = Measure("unseen", "squared error / variance, pairs never seen together", log=True)
_CONSTANT = ("constant", "a constant")
_LEVELS = (_CONSTANT,)
_ALSO = (("seen", "seen combinations"), ("many", f"{MANY} modules"))


def _k_hot(combinations_: list[tuple[int, ...]], modules: int) -> Tensor:
    """Return a row for each combination: 1 for its modules, 0 for the others."""
    return torch.stack([F.one_hot(torch.tensor(c), modules).sum(dim=0) for c in combinations_]).float()


MODULARITY = Experiment(
    name="modularity",
    protocol=1,
    title="Compositional modularity",
    source=(
        "Simon Schug et al., Discovering modular solutions that generalize compositionally, ICLR 2024"
        " (arXiv 2312.15001), and the authors' code"
    ),
    question=(
        "A teacher sums the weight matrices of a few modules; I says which, and how much of each. Students see single"
        " modules and some pairs. Do they also predict pairs whose modules they never saw together, and four modules"
        " at once?"
    ),
    choices=(
        "The students get I, the amounts of the teacher's modules. In the paper they infer a code for each combination"
        " from examples of it; given the code, a failure on unseen pairs is a failure to combine modules. The paper's"
        " results for this are plots of R² and of the agreement of modules: no published number stands beside ours.",
        "As in the authors' code for the theory: x has 16 numbers, uniform with variance 1; the teacher has 16 hidden"
        " units, ReLU, generated weights divided by the root of their inputs and a shared readout of 4; students have"
        " twice the hidden units, and a code of twice as many numbers as there are modules.",
        "As in the authors' code for larger teachers: 8 modules; connected support has m and the pairs (m, m + 1) and"
        " (m, m + 2), disconnected support all pairs within each half. Unseen pairs are in neither; 6 of the 10 are"
        " tested, the learning rate is chosen on the other 4. Amounts are uniform from [0.5, 1], chosen here.",
        "The hypernetwork generates the readout too. Modules are normal and the readout is scaled so that outputs have"
        " a variance near 1. Each group of test examples is divided by its own variance.",
        "32 instances of 32 points in a batch, Adam falling along a cosine; 1,200 steps (paper preset: 10,000).",
    ),
    data=("teacher",),
    studies=studies,
    architecture=architecture,
    task=task,
)
