from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from made_up import LOG, NOISE, SIZE, SIZES, diverging, errors, frontier, pair, summary_of

from fasthyper.experiments.claims import Improves, Wins
from fasthyper.experiments.experiment import ASKED, Axis, Tuning
from fasthyper.experiments.methods import EMBEDDING, FILM_WIDE, HYPERNETWORK, WIDE_E, WIDE_Q
from fasthyper.experiments.outcome import certainty, made_with, outcome
from fasthyper.experiments.rates import Rate
from fasthyper.experiments.standing import at_equal_totals


def test_the_size_nearest_to_one_is_compared():
    found = {name: numbers[:, :2] for name, numbers in errors(**{HYPERNETWORK: 0.2, WIDE_Q: 0.1}).items()}
    summary = summary_of(found, (0.25, 3.0), axis=SIZE, structure="a product", measure=LOG)
    assert at_equal_totals(summary.results[0]).value == 3
    assert outcome(summary)[0].startswith("With about 6,000 trained parameters each (3 times the reference total), ")


def test_the_outcome_names_the_best_and_the_hypernetwork():
    best, totals = outcome(frontier(**{HYPERNETWORK: 0.2, WIDE_Q: 0.1, WIDE_E: 0.15, FILM_WIDE: 0.4}))
    assert re.fullmatch(
        r"With about 2,000 trained parameters each, embedding \(wide q\) has the least squared error, 0\.1\."
        r" The hypernetwork has 2 times its error \(1\.\d to 2\.\d\)\.",
        best,
    )
    assert totals == (
        "The hypernetwork is clearly better than 1 and clearly worse than 2 of 3 other methods with as many parameters."
    )


def test_the_outcome_where_the_hypernetwork_is_best():
    best, totals = outcome(frontier(**{HYPERNETWORK: 0.1, WIDE_Q: 0.2}))
    assert (
        ", the hypernetwork has the least squared error, 0.1. Next: embedding (wide q), with 2 times its error" in best
    )
    assert totals == "The hypernetwork is clearly better than 1 of 1 other methods with as many parameters."


def test_the_outcome_where_methods_are_not_told_apart():
    best, totals = outcome(frontier(**{HYPERNETWORK: 0.2, WIDE_Q: 0.2, WIDE_E: 0.2}))
    assert ". Not clearly worse: embedding (wide q) and embedding (wide e)." in best
    assert "Next" not in best
    assert totals == "The hypernetwork is not told apart from 2 of 2 other methods with as many parameters."


def test_the_outcome_of_several_frontiers_names_each():
    one = frontier(**{HYPERNETWORK: 0.2, WIDE_Q: 0.1})
    first, second, totals = outcome(replace(one, results=one.results * 2))
    assert first == second
    assert first.startswith("Made up. With about 2,000 trained parameters each, ")
    assert totals == "The hypernetwork is clearly worse in 2 of 2 comparisons, over 2 tasks."


def test_how_sure_and_with_what():
    summary = frontier(**{HYPERNETWORK: 0.2, WIDE_Q: 0.1})
    assert certainty(summary).startswith("In brackets: 95 % intervals, corrected for the number of methods. ")
    assert certainty(summary).endswith(" they exclude 1. Made with preset quick, 3 seeds, cpu, torch 2.")
    study = replace(summary.results[0].study, tuning=Tuning({"sgd": (0.1, 0.2)}))
    rates = (Rate("made-up", WIDE_Q, 1.0, "sgd", 0.1, {0.1: 0.1, 0.2: 0.3}),)
    tuned = replace(summary, results=(type(summary.results[0])(study, summary.results[0].metrics),), rates=rates)
    assert "; 1 of 1 are at the edge of their grid. Made with" in certainty(tuned)
    versions = (
        {"fasthyper": "0.1.0", "torch": "2.13.0+cpu", "device": "cpu (x86_64)"},
        {"fasthyper": "0.1.0", "torch": "2.11.0", "device": "H200"},
    )
    dated = replace(summary, versions=versions, date="2026-11-30")
    assert made_with([dated, dated]) == (
        "preset quick, 3 seeds, cpu (x86_64) and H200, fasthyper 0.1.0, torch 2.13.0+cpu, torch 2.11.0, 2026-11-30"
    )
    one = summary_of({HYPERNETWORK: HYPER[:1], EMBEDDING: EMBED[:1]})
    assert certainty(one) == "Made with preset quick, 1 seed, cpu, torch 2."


@pytest.mark.parametrize(("order", "verdict"), [(1, "reproduced"), (-1, "not reproduced")])
def test_the_claim_about_primaries_is_told_apart_from_totals(order, verdict):
    claims = (
        Wins(text="It wins"),
        Improves(text="It improves"),
        Wins(text="Asked", whose=ASKED),
        Wins(text="Of other authors", whose="Lee, Cho, Hwang 2023"),
        Wins(text="Total", over=WIDE_E, whose=ASKED),
    )
    numbers = [HYPER, EMBED][::order]
    counts = lambda run: 100 if run.method == HYPERNETWORK else 1000
    least, sentence = outcome(summary_of(pair(*numbers), claims=claims, counts=counts))
    who = "the hypernetwork" if order == 1 else "embedding"
    assert least == (f"Made up: {who} has the least test error, 10.0 %, at depth 2.")
    assert sentence == (
        "The paper's claim: the hypernetwork errs less than the embedding method, though its network of x is smaller"
        f" (100 weights against 1,000). Verdict: {verdict}."
    )


HYPER, EMBED = [0.1, 0.11] + 0.1 * NOISE * [1, 2], 0.5 + 0.1 * NOISE * [2, 1]


def test_without_a_frontier_and_primaries_few_verdicts_are_named_and_many_counted():
    claims = (Improves(text="It improves"), Improves(text="So does it", line=EMBEDDING))
    numbers = pair(HYPER * [2, 1], EMBED * [1, 2])
    _, *sentences = outcome(summary_of(numbers, claims=claims))
    assert sentences == ["It improves: reproduced.", "So does it: not reproduced."]
    _, sentence = outcome(summary_of(numbers, claims=claims * 3))
    assert sentence == "Of 6 claims: 3 reproduced and 3 not reproduced."
    assert outcome(summary_of({EMBEDDING: EMBED})) == []


def test_one_method_alone_is_not_the_best_of_its_total():
    least, *_ = outcome(frontier(**{HYPERNETWORK: 0.2, EMBEDDING: 0.5}))
    assert least.startswith("Made up: the hypernetwork has the least squared error, 0.1, ")
    assert outcome(frontier(**{WIDE_Q: 0.2})) == []


def test_the_outcome_names_methods_of_which_all_runs_diverged():
    found = errors(**{HYPERNETWORK: 0.2, WIDE_Q: 0.1, FILM_WIDE: 0.4})
    found[FILM_WIDE][:, 1] = np.nan
    sentence = outcome(summary_of(found, SIZES, axis=SIZE, structure="a product", measure=LOG))[0]
    assert sentence.endswith(" times its error (1.8 to 2.2). All runs of FiLM (wide q) diverged.")


def test_the_outcome_says_that_runs_diverged_and_that_nothing_was_learned():
    found = errors(**{HYPERNETWORK: 0.2, WIDE_Q: 0.1})
    found[HYPERNETWORK][1, 1] = np.nan
    zero = ("zero", "nothing")
    options = {"axis": SIZE, "structure": "a product", "measure": LOG, "levels": (zero,), "baseline": zero}
    sentence = outcome(summary_of(found, SIZES, extra={"zero": 0.05}, **options))[0]
    assert sentence.endswith(
        ". Of 3 runs each, 1 of the hypernetwork diverged. No method clearly errs less than nothing: their order says"
        " little."
    )
    assert "nothing" not in outcome(summary_of(found, SIZES, extra={"zero": 5.0}, **options))[0]


def test_a_size_at_which_everything_diverges_does_not_hide_the_others():
    found = errors(**{HYPERNETWORK: 0.2, WIDE_Q: 0.1})
    for numbers in found.values():
        numbers[:, 1] = np.nan
    sentence = outcome(summary_of(found, SIZES, axis=SIZE, structure="a product", measure=LOG))[0]
    assert sentence.startswith("With about 500 trained parameters each (0.25 times the reference total), ")


STARTS = {"values": ("torch", "ours", "hyperfan", "magnitude_invariant"), "axis": Axis("initialisation", "start")}
BY_START = NOISE / 4 * [1, -2, 1, -1] + [0.2, 0.19, 0.5, 0.9]


def test_one_method_over_names_has_its_least_error_and_what_is_clearly_more():
    summary = summary_of({HYPERNETWORK: BY_START}, **STARTS)
    assert outcome(summary) == [
        "Made up: the test error is least with ours, 19.0 %. Clearly more: hyperfan and magnitude invariant."
        " Not clearly more: torch."
    ]
    assert certainty(summary).startswith("“Clearly”: the 95 % interval of the difference excludes 0, corrected for all")
    (alike,) = outcome(summary_of({HYPERNETWORK: BY_START[:, [0, 1, 0, 1]]}, **STARTS))
    assert alike.endswith(". Not clearly more: magnitude invariant, torch and hyperfan.")
    assert outcome(summary_of({HYPERNETWORK: BY_START}, (2, 3, 4, 5))) == [], "numbers have trends"


def test_a_start_at_which_runs_diverge_is_not_the_least_and_is_named():
    """No level stands for the error of a run that diverged."""
    (sentence,) = outcome(summary_of({HYPERNETWORK: diverging(BY_START, (0, 1))}, **STARTS))
    assert sentence.startswith("Made up: the test error is least with torch, 20.0 %. Clearly more: hyperfan and ")
    assert sentence.endswith(". Not clearly more: ours. Of 3 runs each, 1 with ours diverged.")
    (sentence,) = outcome(summary_of({HYPERNETWORK: diverging(BY_START, *((seed, 1) for seed in range(3)))}, **STARTS))
    assert sentence.startswith("Made up: the test error is least with torch, 20.0 %. Clearly more: hyperfan and magn")
    assert sentence.endswith("invariant. Of 3 runs each, 3 with ours diverged.")
    (sentence,) = outcome(summary_of({HYPERNETWORK: np.full((3, 4), np.nan)}, **STARTS))
    assert sentence.startswith("Made up: Of 3 runs each, 3 with torch, 3 with ours,")


def test_equal_starts_are_clearly_apart_on_five_of_a_hundred_figures_at_most():
    random = np.random.default_rng(0)
    told = [
        outcome(summary_of({HYPERNETWORK: random.lognormal(size=(10, 4))}, measure=LOG, **STARTS)) for _ in range(200)
    ]
    assert sum("Clearly more" in sentence for (sentence,) in told) <= 0.05 * len(told) + 2 * (0.05 * 0.95 * 200) ** 0.5


BEHIND = {HYPERNETWORK: 0.4, WIDE_Q: 0.2}


def joined(*summaries):
    return replace(summaries[0], results=tuple(results for s in summaries for results in s.results))


def optimizers(**means):
    found = {name: numbers[:, :2] for name, numbers in errors(**means).items()}
    return summary_of(found, ("sgd", "adam"), axis=Axis("optimizer", "optimizer"), measure=LOG)


def test_the_outcome_with_sgd_is_told_apart():
    _, sentence, _ = outcome(joined(frontier(**{HYPERNETWORK: 0.1, WIDE_Q: 0.2}), optimizers(**BEHIND)))
    assert sentence.startswith("With SGD, embedding (wide q) has the least squared error, 0.4. The hypernetw")
    tied = optimizers(**{HYPERNETWORK: 0.2, WIDE_Q: 0.2})
    found = joined(optimizers(**BEHIND), tied, optimizers(**{HYPERNETWORK: 0.1, WIDE_Q: 0.2}))
    assert (
        "With SGD, among the main methods, the hypernetwork clearly has the least error in 1 of 3 tasks, could have it"
        " in 1 and is behind in 1." in outcome(found)
    )
    level = ("zero", "nothing")
    unlearned = summary_of(
        {name: numbers[:, :2] for name, numbers in errors(**BEHIND).items()},
        ("sgd", "adam"),
        axis=Axis("optimizer", "optimizer"),
        measure=LOG,
        levels=(level,),
        baseline=level,
        extra={"zero": 0.05},
    )
    assert any(
        s.endswith(" in 0 of 2 tasks and is behind in 1; no method clearly learns in 1.")
        for s in outcome(joined(optimizers(**BEHIND), unlearned))
    )
