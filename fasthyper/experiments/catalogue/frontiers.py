"""Frontiers: the error of every method over the number of trained parameters, and the claims about it.

The two claims about sizes are different. One is about primaries: the hypernetwork's has N_g weights, the embedding
method's N_q, which is larger. The other is about totals: both train equally many parameters, wherever these are.
"""

from __future__ import annotations

from typing import Any

from fasthyper.experiments.claims import Learns, Wins
from fasthyper.experiments.experiment import ASKED, PAPER, Axis, Claim, Study
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
        study: further arguments of `Study`.
    """
    return Study(
        name=name,
        axis=SIZE,
        values=values,
        methods=methods,
        structure=structure,
        baseline=level,
        claims=(*claims, *about_totals(level, methods)),
        **study,
    )
