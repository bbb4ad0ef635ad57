"""Frontiers: the error of every method over the number of trained parameters, and the claims about it.

The two claims about sizes are different. One is about primaries: the hypernetwork's has N_g weights, the embedding
method's N_q, which is larger. The other is about totals: both train equally many parameters, wherever these are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from fasthyper.experiments.claims import Learns, Wins
from fasthyper.experiments.experiment import ASKED, PAPER, Axis, Claim, Study, Tuning
from fasthyper.experiments.methods import (
    ATTENTION,
    DEEP_Q,
    DEEPONET_WIDE,
    EMBEDDING,
    EQUAL_TOTAL,
    FILM_WIDE,
    HYPERNETWORK,
    PLAIN_WIDE,
    WIDE_E,
    WIDE_Q,
)
from fasthyper.experiments.methods import METHODS as ALL_METHODS

SIZE = Axis("size", "trained parameters, as a multiple of the hypernetwork's", log=True, count="trainable_parameters")
SIZES = (0.25, 1.0, 4.0)
METHODS = (EMBEDDING, *EQUAL_TOTAL)
GRID = {"adam": (3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1), "sgd": (3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)}
"""The learning rates that are tried in all tuned studies."""

TUNING = Tuning(GRID, seeds=3)

MAIN = (HYPERNETWORK, EMBEDDING, WIDE_Q, FILM_WIDE, PLAIN_WIDE)
"""The methods that are trained with SGD, too; in the paper preset, all are."""

Level = tuple[str, str]
"""An error to go below: its name in `Task.levels`, and whose it is, in words."""

_RIVALS = {
    WIDE_E: "the embedding method with a wide e",
    WIDE_Q: "the embedding method with a wide q",
    DEEP_Q: "the embedding method with a deep q",
    FILM_WIDE: "FiLM with a wide q",
    ATTENTION: "attention",
    PLAIN_WIDE: "one wide network of x and I",
    DEEPONET_WIDE: "DeepONet with a wide trunk",
}


def learns(level: Level, *methods: str) -> Claim:
    """Return the claim that one of these methods errs less than a level, such as that of predictors that ignore I.

    It is the premise of a comparison of the methods: where none of them learns, their order says nothing.
    """
    names = " or ".join(ALL_METHODS[method].label for method in methods)
    return Learns(text=f"{names} errs less than {level[1]}", lines=methods, level=level[0], whose=ASKED)


def wins(level: Level, over: str = EMBEDDING, **claim: Any) -> Wins:
    """Return the claim that the hypernetwork errs less than another method; its premise is that one of them learns.

    Args:
        level: the error to go below.
        over: the other method.
        claim: further arguments of `Wins`.
    """
    return Wins(over=over, premises=(learns(level, HYPERNETWORK, over),), **claim)


def about_primaries(level: Level, whose: str = PAPER) -> Claim:
    """Return the claim that the hypernetwork errs less than the embedding method, though its primary is smaller."""
    return wins(
        level,
        text="Primaries: with fewer weights in g than in q, the hypernetwork errs less than the embedding method",
        short="primaries: the hypernetwork errs less than the embedding method",
        whose=whose,
    )


def about_totals(level: Level, methods: tuple[str, ...]) -> tuple[Claim, ...]:
    """Return the claims that the hypernetwork errs less than other methods with as many trained parameters."""
    return tuple(
        wins(
            level,
            method,
            text=f"Totals: with as many trained parameters, the hypernetwork errs less than {name}",
            short=f"totals: it errs less than {name}",
            whose=ASKED,
        )
        for method, name in _RIVALS.items()
        if method in methods
    )


def frontier(
    *,
    structure: str,
    level: Level,
    claims: tuple[Claim, ...] = (),
    name: str = "frontier",
    values: tuple[float, ...] = SIZES,
    methods: tuple[str, ...] = METHODS,
    tuning: Tuning | None = TUNING,
    **study: Any,
) -> Study:
    """Return a frontier.

    Args:
        structure: of the task, in a few words.
        level: the error that one of two methods has to go below before they are compared.
        claims: further claims, before those about totals.
        name: of the study.
        values: sizes, as multiples of the hypernetwork's total.
        methods: names of methods.
        tuning: the learning rates to choose from, on validation examples; None: the rate is that of the setting.
        study: further arguments of `Study`.
    """
    return Study(
        name=name,
        axis=SIZE,
        values=values,
        methods=methods,
        structure=structure,
        baseline=level,
        tuning=tuning,
        claims=(*claims, *about_totals(level, methods)),
        **study,
    )


def optimizers(frontiers: Iterable[Study], preset: str) -> tuple[Study, ...]:
    """Return a study for each frontier: SGD beside its optimizer at size 1, each at its best learning rate.

    The runs with the frontier's own optimizer are runs of the frontier, and need no training.

    Args:
        frontiers: frontiers with tuned rates.
        preset: `"paper"` has all methods of the frontier, others those of `MAIN`.

    Raises:
        ValueError: a frontier without size 1 or tuned rates, or one that is trained with SGD.
    """
    return tuple(_optimizer(study if preset == "paper" else study.only(MAIN)) for study in frontiers)


def _optimizer(study: Study) -> Study:
    own = study.setting.optimizer
    if 1.0 not in study.values or study.tuning is None or study.baseline is None or own == "sgd":
        raise ValueError(f"frontiers: expected size 1, tuned rates and another optimizer than SGD, got {study.name!r}")
    return replace(
        study,
        name=study.name.replace("frontier", "optimizer"),
        title=f"SGD and {own.capitalize()}, each at its best learning rate: {study.structure}",
        axis=Axis("optimizer", "optimizer"),
        values=("sgd", own),
        structure="",
        published={},
        setting=replace(study.setting, size=1.0),
        note=f"SGD has no momentum. The quick preset has {own.capitalize()} alone.",
        claims=tuple(
            wins(
                study.baseline,
                over,
                text=f"With SGD at a tuned rate, the hypernetwork errs less than {name}",
                at="sgd",
                whose=ASKED,
            )
            for over, name in (
                (EMBEDDING, "the embedding method"),
                (WIDE_Q, "the embedding method with a wide q, where both train equally many parameters"),
            )
        ),
    )
