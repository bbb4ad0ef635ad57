"""Operator learning: from the values of a function at sensors, predict its image under an operator at any point.

The condition I has the values of a random Chebyshev series at 100 sensors, x is a point, and the target is the value of
the series there (identity) or of its derivative (differentiation). All methods have the same target network,
1 -> 20 -> 20 -> 10 -> 1, tanh:

    hypernetwork   HyperDeepONet: the branch generates all its weights and biases
    embedding      the outputs of the branch are concatenated to the point
    deeponet       the branch generates only the weights of the last layer

Lee, Cho, Hwang, HyperDeepONet, ICLR 2023 (arXiv 2312.15949).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fasthyper.experiments.claims import Wins
from fasthyper.experiments.experiment import ASKED, Axis, Batch, Examples, Experiment, Measure, Run, Study, Task, stream
from fasthyper.experiments.methods import (
    ALL,
    BIASES,
    DEEPONET,
    EMBEDDING,
    EQUAL_FLOPS,
    FILM,
    HYPERNETWORK,
    WIDE_E,
    Architecture,
)
from fasthyper.experiments.setting import ContextSetting

DEGREE = 20
SENSORS = 100
TEST_COUNT = 200
OPERATORS = ("identity", "differentiation")


@dataclass(frozen=True, kw_only=True)
class OperatorSetting(ContextSetting):
    """A setting with the operator and the examples.

    Attributes:
        operator: one of `OPERATORS`.
        functions: functions for training.
        points: N, the points of a function, new ones at every access.
    """

    DEFINING: ClassVar[tuple[str, ...]] = ("operator",)

    operator: str
    functions: int
    points: int


def chebyshev(coefficients: Tensor, points: Tensor) -> Tensor:
    """Return the values of series Σ c_l T_l, by T_l(cos θ) = cos l θ.

    Args:
        coefficients: c, `(B, degree + 1)`.
        points: `(B, N)`, from -1 to 1.

    Returns:
        `(B, N)`.

    Example:
        >>> chebyshev(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5]]))  # T_2 = 2 x² - 1
        tensor([[-0.5000]])
    """
    degrees = torch.arange(coefficients.shape[1], dtype=points.dtype)
    return torch.einsum("bnl,bl->bn", (points.arccos()[..., None] * degrees).cos(), coefficients)


def derivative(coefficients: Tensor) -> Tensor:
    """Return the coefficients of the derivatives of such series: `(B, degree + 1)` to `(B, degree)`."""
    from numpy.polynomial.chebyshev import chebder

    return torch.from_numpy(chebder(coefficients.numpy(), axis=1))


def task(run: Run, dataset: Any) -> Task:
    """Return the task: functions drawn for the seed, at random points."""
    setting = run.setting
    assert isinstance(setting, OperatorSetting)
    generator = torch.Generator().manual_seed(stream(run.seed, "task"))
    sensors = torch.linspace(-1, 1, SENSORS, dtype=torch.float64)
    if setting.operator not in OPERATORS:
        raise ValueError(f"operator: {setting.operator!r} is not known; known are {', '.join(OPERATORS)}")

    def examples(count: int) -> Examples:
        c = torch.rand(count, DEGREE + 1, generator=generator, dtype=torch.float64) / 2 - 0.25
        seen = chebyshev(c, sensors.expand(count, -1)).float().to(run.device)
        outputs = c if setting.operator == "identity" else derivative(c)

        def draw(chosen: Tensor, generator: torch.Generator) -> Batch:
            x = 2 * torch.rand(len(chosen), setting.points, generator=generator, dtype=torch.float64) - 1
            y = chebyshev(outputs[chosen], x) / _OUTPUT_RMS[setting.operator]
            return Batch(x[..., None].float(), seen[chosen.to(run.device)], y[..., None].float())

        return Examples(count, draw)

    return Task(examples(setting.functions), examples(TEST_COUNT), F.mse_loss, _measure)


def architecture(run: Run) -> Architecture:
    """Return the sizes: the target network of the paper, and a branch of `depth` layers."""
    setting = run.setting
    assert isinstance(setting, OperatorSetting)
    return Architecture(
        cond=SENSORS,
        x=1,
        out=1,
        context=setting.context,
        hidden=(20, 20, 10),
        embedding=setting.embedding,
        activation="tanh",
        generated_bias=True,
    )


def studies(preset: str, data: str) -> tuple[Study, ...]:
    """Return one study, of both operators."""
    quick = preset == "quick"
    return (
        Study(
            name="operators",
            title="Relative error of both operators",
            axis=Axis("operator", "operator"),
            values=OPERATORS,
            methods=(*ALL, DEEPONET),
            setting=OperatorSetting(
                epochs=50 if quick else 2000,
                lr=3e-3,
                batch_size=25,
                optimizer="adam",
                schedule="cosine",
                operator=OPERATORS[0],
                functions=1000,
                points=50 if quick else 100,
                width=64,
                depth=4,
                embedding=10,
            ),
            seeds=3 if quick else 10,
            measure=Measure("relative_l2", "relative L2 error", log=True),
            claims=tuple(
                Wins(text=f"{op.capitalize()}: the hypernetwork errs less than {what}", over=over, at=op, whose=whose)
                for op in OPERATORS
                for what, over, whose in (
                    ("concatenation", EMBEDDING, _PAPER),
                    ("DeepONet", DEEPONET, _PAPER),
                    ("concatenation with as many parameters", WIDE_E, ASKED),
                    ("concatenation trained for as long", EQUAL_FLOPS, ASKED),
                    ("FiLM", FILM, ASKED),
                    ("generated biases", BIASES, ASKED),
                )
            ),
            published={
                (HYPERNETWORK, "identity"): 0.036,
                (EMBEDDING, "identity"): 0.578,
                (DEEPONET, "identity"): 0.578,
                (HYPERNETWORK, "differentiation"): 0.127,
                (EMBEDDING, "differentiation"): 0.558,
                (DEEPONET, "differentiation"): 0.559,
            },
            note="The wide dashes are the errors that the paper published.",
        ),
    )


# Rough root mean squares of the outputs. They scale the targets: the relative error does not depend on it, but the size
# of training steps does.
_OUTPUT_RMS = {"identity": 0.5, "differentiation": 12.0}
_PAPER = "Lee, Cho, Hwang 2023"


def _measure(y: Tensor, target: Tensor) -> dict[str, Tensor]:
    distance, size = (y - target).flatten(1).norm(dim=1), target.flatten(1).norm(dim=1)
    return {"relative_l2": distance / size.clamp_min(math.sqrt(torch.finfo(size.dtype).tiny))}


OPERATOR_LEARNING = Experiment(
    name="operators",
    protocol=1,
    title="Operator learning",
    source="Jae Yong Lee, Sung Woong Cho, Hyung Ju Hwang, HyperDeepONet, ICLR 2023 (arXiv 2312.15949)",
    question=(
        "The input is a function, by its values at 100 sensors. The output is the function, or its derivative, at any"
        " point. All methods have the same small network, 1 -> 20 -> 20 -> 10 -> 1: all of its weights are generated"
        " from the function, or it gets an encoding of the function in addition to the point, or only the weights of"
        " its last layer are generated (DeepONet)."
    ),
    choices=(
        "Functions are Chebyshev series of degree 20 with coefficients uniform within ±1/4, seen at 100 equidistant"
        " sensors; 1,000 for training, 200 for testing, each at 100 points (50 in the quick preset), new ones at every"
        " access. The branch (three hidden layers of 64, ReLU), E = 10 (DeepONet's basis functions), Adam at"
        " 0.003 falling along a cosine, batches of 25 functions, 2,000 epochs (50) are chosen here: the paper does not"
        " say enough to repeat its table.",
        "The relative error is ‖y - target‖ / ‖target‖ of each function, averaged over functions.",
    ),
    data=("chebyshev",),
    studies=studies,
    architecture=architecture,
    task=task,
)
