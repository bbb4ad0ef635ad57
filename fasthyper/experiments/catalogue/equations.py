"""Differential equations: from an initial condition at sensors, predict the solution at a later time at any point.

    burgers     u_t + u u_x = ν u_xx, ν = 0.01, at t = 1
    advection   u_t + u_x = 0, at t = 0.5: the initial condition, shifted by half a period

u has period 1. Initial conditions are random series Σ_k s_k (a_k cos 2πkx + b_k sin 2πkx) with normal a_k and b_k and
s_k = √2 · 25 / ((2πk)² + 25). All methods have the target network 1 -> 32 -> 32 -> 32 -> 1, tanh.

Lee, Cho, Hwang, HyperDeepONet, ICLR 2023 (arXiv 2312.15949). The initial conditions are those of Li et al., Fourier
neural operator, ICLR 2021 (arXiv 2010.08895).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fasthyper.experiments.catalogue.frontiers import TUNING, frontier, optimizers, wins
from fasthyper.experiments.experiment import (
    ASKED,
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
from fasthyper.experiments.methods import (
    ATTENTION,
    DEEP_Q,
    DEEPONET_WIDE,
    EMBEDDING,
    FILM_WIDE,
    HYPERNETWORK,
    PLAIN_WIDE,
    WIDE_Q,
    Architecture,
)
from fasthyper.experiments.setting import ContextSetting

GRID = 128
MODES = 32
VISCOSITY = 0.01
STEPS = 250
SHIFT = 0.5
POOL = 1400
"""Functions in each of two pools. A seed takes its own for training, validation and testing from one of them."""
TEST_COUNT = 200
EQUATIONS = ("burgers", "advection")
COMPARED = (HYPERNETWORK, DEEPONET_WIDE, EMBEDDING, WIDE_Q, DEEP_Q, FILM_WIDE, ATTENTION, PLAIN_WIDE)


class Pool(NamedTuple):
    """Functions on the grid, float64: `POOL` for results, then `POOL` others for the choice of learning rates.

    Attributes:
        initial: initial conditions, `(2 POOL, GRID)`.
        solved: their solutions by the name of the equation, `(2 POOL, GRID)`.
    """

    initial: Tensor
    solved: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class EquationSetting(ContextSetting):
    """A setting with the equation and the examples.

    Attributes:
        equation: one of `EQUATIONS`.
        functions: functions for training.
        points: N, the points of a function in training, new ones at every access. Tests are at all points of the grid.
    """

    DEFINING: ClassVar[tuple[str, ...]] = ("equation",)

    equation: str
    functions: int
    points: int


def initial_conditions(count: int, generator: torch.Generator) -> Tensor:
    """Return coefficients of random series, `(count, 2, MODES)`: those of the cosines, then those of the sines."""
    k = 2 * math.pi * torch.arange(1, MODES + 1, dtype=torch.float64)
    return (
        torch.randn(count, 2, MODES, generator=generator, dtype=torch.float64) * math.sqrt(2) * 25 / (k.square() + 25)
    )


def series(coefficients: Tensor, x: Tensor) -> Tensor:
    """Return the values of series at points: `(n, 2, MODES)` and `(N,)` to `(n, N)`.

    Example:
        >>> c = torch.zeros(1, 2, MODES, dtype=torch.float64)
        >>> c[0, 1, 0] = 3.0  # 3 sin 2πx
        >>> series(c, torch.tensor([0.25], dtype=torch.float64))
        tensor([[3.]], dtype=torch.float64)
    """
    angle = 2 * math.pi * torch.arange(1, coefficients.shape[2] + 1, dtype=x.dtype)[:, None] * x
    return coefficients[:, 0] @ angle.cos() + coefficients[:, 1] @ angle.sin()


def burgers(initial: Tensor, time: float = 1.0, viscosity: float = VISCOSITY, steps: int = STEPS) -> Tensor:
    """Solve u_t + u u_x = ν u_xx with period 1.

    A pseudo-spectral method: the linear term is solved exactly by an integrating factor, the other one by Runge and
    Kutta's method of order four, with the upper third of the modes left out of products (Orszag's rule).

    Args:
        initial: u at t = 0 at equidistant points from 0 on, `(*, G)`.
        time: the time of the solution.
        viscosity: ν.
        steps: steps in time.

    Returns:
        u at this time at the same points, `(*, G)`.
    """
    points = initial.shape[-1]
    k = torch.arange(points // 2 + 1, dtype=initial.dtype)
    step = time / steps
    half = (-viscosity * (2 * math.pi * k).square() * step / 2).exp()
    kept = k <= points // 3
    factor = torch.complex(torch.zeros_like(k), -math.pi * k) * kept  # of u², for -(u² / 2)_x

    def slope(spectrum: Tensor) -> Tensor:
        return step * factor * torch.fft.rfft(torch.fft.irfft(spectrum, n=points).square())

    u = torch.fft.rfft(initial) * kept
    for _ in range(steps):
        a = slope(u)
        moved = half * u
        b = slope(moved + half * a / 2)
        c = slope(moved + b / 2)
        d = slope(half * (moved + c))
        u = half * (moved + (half * a + 2 * (b + c)) / 6) + d / 6
    return torch.fft.irfft(u, n=points)


def load(data: str, data_home: Any) -> Pool:
    """Return both pools. They are the same for all runs."""
    coefficients = initial_conditions(2 * POOL, torch.Generator().manual_seed(0))
    x = torch.arange(GRID, dtype=torch.float64) / GRID
    initial = series(coefficients, x)
    return Pool(initial, {"burgers": burgers(initial), "advection": series(coefficients, x - SHIFT)})


def task(run: Run, dataset: Pool) -> Task:
    """Return the task: functions of a pool, chosen by the seed. Targets have a root mean square of 1.

    Runs that choose a learning rate have a pool of their own: they see no function that any seed tests on.
    """
    setting = run.setting
    assert isinstance(setting, EquationSetting)
    if setting.equation not in EQUATIONS:
        raise ValueError(f"equation: {setting.equation!r} is not known; known are {', '.join(EQUATIONS)}")
    count = len(dataset.initial) // 2
    if setting.functions + 2 * TEST_COUNT > count:
        raise ValueError(f"functions: expected at most {count - 2 * TEST_COUNT}, got {setting.functions}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(stream(run.seed, "task")))
    order = order + count * (run.split == "validation")
    solved = dataset.solved[setting.equation]
    seen, solutions = dataset.initial.float(), (solved / solved.square().mean().sqrt()).float()
    line = 2 * torch.arange(GRID) / GRID - 1

    def examples(numbers: Tensor, points: int | None) -> Examples:
        def draw(chosen: Tensor, generator: torch.Generator) -> Batch:
            function = numbers[chosen]
            at = torch.arange(GRID).expand(len(chosen), -1)
            if points is not None:
                at = torch.randint(GRID, (len(chosen), points), generator=generator)
            return Batch(line[at][..., None], seen[function], solutions[function].gather(1, at)[..., None])

        return Examples(len(numbers), draw)

    train, test, validation, _ = order.split(
        [setting.functions, TEST_COUNT, TEST_COUNT, count - setting.functions - 2 * TEST_COUNT]
    )
    return Task(
        examples(train, setting.points),
        examples(test, None),
        F.mse_loss,
        _measure,
        levels={"zero": 1.0},
        validation=examples(validation, None),
    )


def architecture(run: Run) -> Architecture:
    """Return the sizes: the target network, and a branch of `depth` layers."""
    setting = run.setting
    assert isinstance(setting, EquationSetting)
    return Architecture(
        cond=GRID,
        x=1,
        out=1,
        context=setting.context,
        hidden=(32, 32, 32),
        embedding=setting.embedding,
        activation="tanh",
        generated_bias=True,
    )


def studies(preset: str, data: str) -> tuple[Study, ...]:
    """Return a frontier and optimizers on Burgers' equation, and a study of both equations; none if quick."""
    if preset == "quick":
        return ()
    paper = preset == "paper"
    base = EquationSetting(
        epochs=1000 if paper else 20,
        lr=1e-3,
        batch_size=25,
        optimizer="adam",
        schedule="cosine",
        equation=EQUATIONS[0],
        functions=1000,
        points=16,
        width=46,
        depth=4,
        embedding=32,
    )
    common: dict[str, Any] = {
        "methods": COMPARED,
        "setting": base,
        "seeds": 10,
        "measure": Measure("relative_l2", "relative L2 error", log=True),
        "levels": (_ZERO,),
        "tuning": replace(TUNING, seeds=1),
    }
    over_size = frontier(
        title="The Burgers equation, over all parameters",
        structure="I is a function: an initial condition of a differential equation",
        level=_ZERO,
        published={(m, 1.0): error for (m, e), error in _PUBLISHED.items() if e == "burgers"},
        note="The wide dashes are the errors that the paper published, on data of its own.",
        **common,
    )
    return (
        over_size,
        *optimizers((over_size,), preset),
        Study(
            name="equations",
            title="Relative error of both equations, with equally many parameters",
            axis=Axis("equation", "equation"),
            values=EQUATIONS,
            claims=(
                wins(
                    _ZERO,
                    DEEPONET_WIDE,
                    text="Burgers: the hypernetwork errs less than DeepONet with as many parameters",
                    at="burgers",
                    whose=_PAPER,
                ),
                *(
                    wins(
                        _ZERO, over, text=f"{e.capitalize()}: the hypernetwork errs less than {what}", at=e, whose=ASKED
                    )
                    for e in EQUATIONS
                    for what, over in _OTHERS
                    if (e, over) != ("burgers", DEEPONET_WIDE)
                ),
            ),
            published=_PUBLISHED,
            note="The wide dashes are the errors that the paper published, on data of its own.",
            **common,
        ),
    )


_OTHERS = (
    ("DeepONet", DEEPONET_WIDE),
    ("concatenation to a wide q", WIDE_Q),
    ("concatenation to a deep q", DEEP_Q),
    ("FiLM with a wide q", FILM_WIDE),
)
_ZERO = ("zero", "answering zero")
_PAPER = "Lee, Cho, Hwang 2023"
_PUBLISHED = {
    (HYPERNETWORK, "burgers"): 0.0196,
    (DEEPONET_WIDE, "burgers"): 0.0391,
    (HYPERNETWORK, "advection"): 0.0048,
    (DEEPONET_WIDE, "advection"): 0.0046,
}


def _measure(y: Tensor, target: Tensor) -> dict[str, Tensor]:
    return {"relative_l2": (y - target).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)}


EQUATION_LEARNING = Experiment(
    name="equations",
    protocol=2,
    title="Differential equations",
    source="Jae Yong Lee, Sung Woong Cho, Hyung Ju Hwang, HyperDeepONet, ICLR 2023 (arXiv 2312.15949)",
    question=(
        "The input is an initial condition, by its values at 128 sensors. The output is the solution of Burgers'"
        " equation, or of the advection equation, at a later time at any point. With 114,000 trained parameters in"
        " all: is it best to generate the weights of a small network, to concatenate an encoding of the input, or to"
        " generate only the weights of the last layer (DeepONet)?"
    ),
    choices=(
        "The paper's errors for these equations are repeated beside ours: 0.0196 with 114,000 parameters against 0.0391"
        " with 115,000 (Burgers), 0.0048 against 0.0046 (advection). Its data, viscosity and training are not known"
        " here, so the order of methods can be compared and the errors cannot.",
        "Initial conditions: period 1, a normal random field with mean 0 and covariance 625 (-Δ + 25)^-2, as is usual"
        " for neural operators, with 32 frequencies. Burgers: ν = 0.01, t = 1; advection: speed 1, t = 0.5.",
        "Solutions are computed here: Burgers' equation by a pseudo-spectral method on 128 points, which agrees with"
        " the transform of Cole and Hopf to 1e-5; advection by an exact shift. A pool of 1,400 functions is split for"
        " each seed into 1,000 for training, 200 for validation and 200 for testing. The runs that choose learning"
        " rates have another pool: no function is tested on that any of them has seen.",
        "The target network 1 -> 32 -> 32 -> 32 -> 1 (tanh), the branch (three hidden layers of 46, ReLU), 16 random"
        " points of the grid in training and all 128 in testing, batches of 25 functions, Adam falling along a cosine,"
        " 800 steps (paper preset: 40,000), all chosen here. The position enters as one number from -1 to 1.",
        "The rate is chosen for each method, size and equation, from runs with one seed.",
        "800 steps are few. A method whose error is that of answering zero has not begun to learn: a win over it is a"
        " verdict on the budget.",
        "DeepONet has the same branch, and a trunk that is so wide that both train equally many parameters; it has as"
        " many basis functions as units in a layer of the trunk.",
    ),
    data=("periodic",),
    studies=studies,
    architecture=architecture,
    task=task,
    load=load,
)
