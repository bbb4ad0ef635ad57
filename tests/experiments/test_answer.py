from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up import LOG, PERCENT, SIZE, pair, summary_of

from fasthyper.experiments.answer import (
    Structure,
    answer,
    answer_html,
    cell,
    main,
    markdown,
    put,
    structures,
    write_answer,
)
from fasthyper.experiments.claims import Wins
from fasthyper.experiments.experiment import Axis, Tuning
from fasthyper.experiments.methods import EMBEDDING, FILM_WIDE, HYPERNETWORK, WIDE_Q
from fasthyper.experiments.report import report_html

README = Path(__file__).parents[2] / "README.md"
NOISE = np.array([-0.02, 0.0, 0.02])[:, None]
SIZES = (0.25, 1.0, 4.0)


def summary(structure, hypernetwork, wide_q, film=0.6, name="tiny", level=10.0, **study):
    """Return a frontier with these errors at size 1, twice as large at a quarter, about half as large at four."""
    fall = np.array([2.0, 1.0, 0.5])
    errors = {
        HYPERNETWORK: hypernetwork * np.array([2.0, 1.0, 0.6]) * (1 + NOISE),
        WIDE_Q: wide_q * fall * (1 - NOISE),
        FILM_WIDE: film * fall * (1 + np.roll(NOISE, 1)),
    }
    constant = ("zero", "the best constant")
    options = {"axis": SIZE, "structure": structure, "measure": LOG, "levels": (constant,), "baseline": constant}
    return summary_of(
        errors,
        SIZES,
        counts=lambda run: 50 if run.method == HYPERNETWORK else 500,
        extra={"zero": level},
        changes={"name": name, "title": f"The {name}"},
        **options | study,
    )


@pytest.fixture
def three():
    return [
        summary("a product", 0.1, 0.2, name="first"),
        summary("no structure", 0.2, 0.1, name="second"),
        summary("a gate", 0.1, 0.1, name="third"),
    ]


def test_the_answer_says_when(three):
    lines = dict(answer(three))
    assert list(lines) == ["When", "How much", "At which cost", "How sure", "Where it fails"]
    assert lines["When"] == (
        "With as many trained parameters, the hypernetwork clearly has the least error in 1 of 3 tasks (first),"
        " could have it in 1 (third) and is behind in 1 (embedding (wide q) leads there)."
    )
    many = [summary("a product", 0.1, 0.2, name=f"task {number}") for number in range(5)]
    assert "in 5 of 5 tasks (task 0, task 1 and 3 others)." in dict(answer(many))["When"]


def test_the_answer_says_how_much(three):
    assert dict(answer(three))["How much"] == (
        "At size 1, or the nearest, its error is 0.5 (first) to 2 times (second) that of the best other method; the"
        " geometric mean is 1 times."
    )
    assert (
        dict(answer(three[:1]))["How much"]
        == "At size 1, or the nearest, its error is 0.5 times that of the best other method (first)."
    )


def test_the_answer_says_at_which_cost(three):
    assert dict(answer(three))["At which cost"] == (
        "Training takes 1 times the flops and 1 times the time of the best other. In 1 of 3 tasks (first), no other of"
        " any size errs as little for as few flops. The network generated for an I has 10 % of the parameters of the"
        " other's network of x."
    )


@pytest.mark.parametrize(("wide_q", "matched"), [([0.09, 0.2, 0.2], True), ([0.2, 0.2, 0.09], False)])
def test_a_smaller_method_may_have_as_little_error_for_fewer_flops(wide_q, matched):
    for other in (WIDE_Q, EMBEDDING):  # whose total is its own
        errors = {HYPERNETWORK: 0.1 + NOISE / 10 * [1, 2, 3], WIDE_Q: 0.3 + NOISE / 10 * [2, 1, 3]}
        errors[other] = wide_q + NOISE / 10 * [3, 2, 1]
        (results,) = summary_of(errors, SIZES, axis=SIZE, structure="a product").results
        assert Structure(summary("a product", 0.1, 0.2), results).is_matched == matched


def test_the_answer_says_how_sure(three):
    text = dict(answer(three))["How sure"]
    assert text == (
        "3 seeds, rates tuned in 0 of 3 tasks. At 7 of 9 tasks and sizes, it is clear which of the hypernetwork and"
        " the best other method has less error (95 %, corrected for the number of methods)."
    )
    (results,) = three[0].results
    study = replace(results.study, tuning=Tuning({"sgd": (0.1,)}))
    tuned = replace(three[0], results=(type(results)(study, results.metrics),))
    claimed = summary_of(pair(0.1 + NOISE / 10 * [1, 2], 0.5 + NOISE / 10 * [2, 1]), claims=(Wins(text="It wins"),))
    text = dict(answer([tuned, claimed]))["How sure"]
    assert text.startswith("3 seeds, tuned rates.")
    assert text.endswith(" Galanti and Wolf's claim, about the small networks of x: reproduced.")


def test_the_answer_says_what_holds_with_sgd(three):
    errors = {HYPERNETWORK: 0.4 * (1 + NOISE * [1, 2]), WIDE_Q: 0.2 * (1 + NOISE * [2, 1])}
    with_sgd = summary_of(errors, ("sgd", "adam"), axis=Axis("optimizer", "optimizer"), measure=LOG)
    assert dict(answer([*three, with_sgd, with_sgd]))["How sure"].endswith(
        " With SGD, among the main methods, the hypernetwork clearly has the least error in 0 of 2 tasks and is behind"
        " in 2."
    )


def test_the_answer_says_where_it_fails(three):
    text = dict(answer(three))["Where it fails"]
    assert re.fullmatch(
        r"Where this is clear, it is furthest behind in second with 4 times the parameters:"
        r" 2\.4 times the error of embedding \(wide q\)"
        r" \(2\.\d to 2\.\d\)\.",
        text,
    )
    assert dict(answer(three[:1]))["Where it fails"] == "Nowhere is it clearly behind the best other method."


def test_tasks_of_one_experiment_are_named_by_their_structure(three):
    both = replace(three[0], results=(*three[0].results, *three[1].results))
    found = structures([both])
    assert [structure.short for structure in found] == ["a product", "no structure"]
    assert [structure.heading for structure in found] == ["a product", "no structure"]
    (alone,) = structures([summary("I turns x, slowly: many points", 0.1, 0.2, name="turns")])
    assert (alone.short, alone.heading) == ("turns", "turns: I turns x, slowly")


def test_what_is_not_learned_is_no_win(three):
    lines = dict(answer([*three, summary("noise", 0.1, 0.2, name="fourth", level=0.1)]))
    assert "1 of 3 tasks (first)" in lines["When"]
    assert lines["Where it fails"].endswith(" No method clearly learns fourth.")


def test_diverged_runs_are_counted(three):
    results = three[0].results[0]
    metrics = {key: list(found) for key, found in results.metrics.items()}
    metrics[FILM_WIDE, 4.0][1] = {**metrics[FILM_WIDE, 4.0][1], "measures": {"error": None, "zero": 10.0}}
    broken = replace(three[0], results=(type(results)(results.study, metrics),))
    assert dict(answer([broken]))["Where it fails"].endswith(" 1 of 27 runs diverged, none of the hypernetwork.")


def test_without_frontiers_there_is_no_answer():
    other = summary_of(pair(0.1 + NOISE * [1, 2], 0.5 + NOISE * [1, 1]))
    assert answer([other]) == [("No answer", "No study here compares the hypernetwork with methods of equal totals.")]
    assert "<table" not in answer_html([other])
    alone = summary_of({HYPERNETWORK: 0.1 + NOISE * np.ones(3)}, SIZES, axis=SIZE, structure="a product")
    assert structures([alone]) == []


def test_a_cell_has_the_best_and_the_factor_to_the_hypernetwork(three):
    first, second, third = (cell(Structure(s, s.results[0]).at_equal_totals) for s in three)
    assert (first.best, second.best) == ("hypernetwork, 0.1", "embedding (wide q), 0.1")
    assert {third.best, third.details[0]} in (
        {"hypernetwork, 0.1", "not clearly worse: embedding (wide q)"},
        {"embedding (wide q), 0.1", "not clearly worse: hypernetwork"},
    )
    assert [c.with_hypernetwork for c in (first, second, third)] == [True, False, True]
    assert first.details[0].startswith("embedding (wide q): 2 times this error (1.")
    assert second.details[0].startswith("hypernetwork: 2 times this error (1.")


def test_each_cell_links_to_its_evidence(three, tmp_path):
    write_answer(three, tmp_path)
    html = (tmp_path / "answer.html").read_text()
    cells = re.findall(r'<td data-size="([^"]*)"[^>]*><a href="([^"]*)">', html)
    assert cells == [
        (f"{size} ×", f"{name}/report.html#study-made-up")
        for name in ("first", "second", "third")
        for size in ("0.25", "1", "4")
    ]
    for one in three:
        assert 'id="study-made-up"' in report_html(one)
    assert html.count("<svg") == 1
    assert html.count("<br>the best constant: 10</span>") == 3
    assert not re.search(r"@import|<script|https?://(?!www\.w3\.org)", html)
    for question, text in answer(three):
        assert f"<strong>{question}.</strong> {text}".replace("'", "&#39;") in html


def test_structures_with_other_budgets_leave_cells_empty(three):
    fewer = summary_of(
        {HYPERNETWORK: 0.1 + NOISE / 10 * [1, 2], WIDE_Q: 0.2 + NOISE / 10 * [2, 1]},
        (1.0, 2.0),
        axis=SIZE,
        structure="b",
    )
    html = answer_html([three[0], fewer])
    assert re.findall(r'<th scope="col">([0-9.]+) ×', html) == ["0.25", "1", "2", "4"]
    assert html.count("<td></td>") == 3


def test_the_lines_are_put_into_a_document(three, tmp_path):
    write_answer(three, tmp_path)
    document = tmp_path / "README.md"
    shutil.copy(README, document)
    before = document.read_text()
    main([str(document), str(tmp_path)])
    main([str(document), str(tmp_path)])  # replaces the lines, and adds no others
    after = document.read_text()
    lines = markdown(three)
    assert after.count(lines) == 1
    assert lines.startswith("- **When.** With as many")
    assert max(map(len, lines.splitlines())) <= 110
    assert max(item.count("\n") for item in lines.split("\n- ")[:-1]) < 3
    assert lines.endswith("\n\nMade by `fasthyper compare all`: preset quick, 3 seeds, cpu, torch 2.\n")
    start = before.index("<!-- comparison: ")
    assert after[:start] == before[:start]
    assert after[after.index("<!-- end -->", start) :] == before[before.index("<!-- end -->", start) :]


def test_a_document_without_a_section_is_refused(tmp_path):
    document = tmp_path / "page.md"
    for text in ("nothing", "<!-- comparison: generated -->\nno end"):
        document.write_text(text)
        with pytest.raises(ValueError, match="document: expected <!-- comparison"):
            put(document, "- lines\n")
        assert document.read_text() == text
    with pytest.raises(SystemExit, match="error: "):
        main([str(document), str(tmp_path)])


def test_methods_of_other_totals_are_no_part_of_the_answer():
    fall = np.array([2.0, 1.0, 0.5])
    errors = {
        HYPERNETWORK: 0.2 * fall * (1 + NOISE),
        WIDE_Q: 0.3 * fall * (1 - NOISE),
        EMBEDDING: 0.1 * fall * (1 + NOISE),
    }
    found = summary_of(errors, SIZES, axis=SIZE, structure="a product", measure=LOG)
    assert "the least error in 1 of 1 task (tiny)" in dict(answer([found]))["When"]


def diverging(**where):
    """Return a frontier at sizes 1 and 4, in which all runs of a method diverge at the numbered sizes."""
    errors = {name: mean + NOISE / 10 * [1, 2] for name, mean in ((HYPERNETWORK, 0.2), (WIDE_Q, 0.1))}
    for method, numbers in where.items():
        errors[method][:, numbers] = np.nan
    return summary_of(errors, (1.0, 4.0), axis=SIZE, structure="a product", measure=LOG)


@pytest.mark.parametrize(
    ("method", "who"), [(HYPERNETWORK, "the hypernetwork"), (WIDE_Q, "all methods but the hypernetwork")]
)
def test_sizes_at_which_all_runs_diverge_are_named(method, who):
    summary = diverging(**{method: [1]})
    lines = dict(answer([summary]))
    assert lines["When"].endswith("is behind in 1 (embedding (wide q) leads there).")
    assert f" All runs of {who} diverged in tiny, at 4 times the reference total. " in lines["Where it fails"]
    assert f'>diverged</a><br><span class="small">all runs of {who}</span>' in answer_html([summary])


def test_the_size_nearest_to_the_papers_that_has_errors_is_compared():
    (structure,) = structures([diverging(**{HYPERNETWORK: [0]})])
    assert structure.at_equal_totals.value == 4
    assert structure.lost == {1.0: "the hypernetwork"}


def test_without_errors_the_reason_is_that_runs_diverged():
    reason = "All runs of the hypernetwork, or of all other methods, diverged."
    for methods in ([HYPERNETWORK], [WIDE_Q], [HYPERNETWORK, WIDE_Q]):
        summary = diverging(**{method: [0, 1] for method in methods})
        assert answer([summary]) == [("No answer", reason)]
        assert ("<table" in answer_html([summary])) == (len(methods) == 1)  # it says which of them diverged
        assert "<svg" not in answer_html([summary])


def test_a_task_in_which_the_hypernetwork_diverges_counts(three):
    lost = diverging(**{HYPERNETWORK: [0, 1]})
    lines = dict(answer([three[0], lost]))
    assert lines["When"].endswith(" clearly has the least error in 1 of 2 tasks (first) and diverges in 1 (tiny).")
    assert "All runs of the hypernetwork diverged in tiny, at 1 times the reference total;" in lines["Where it fails"]


def test_a_task_without_a_ratio_does_not_hide_the_others(three):
    none = summary("zero", 0.1, 0.0, name="none", measure=PERCENT)
    for found in ([none, three[1]], [three[1], none]):
        assert (
            " furthest behind in second with 4 times the parameters: 2.4 times" in dict(answer(found))["Where it fails"]
        )


def test_one_seed_has_no_intervals():
    errors = {HYPERNETWORK: np.array([[0.1]]), WIDE_Q: np.array([[0.2]])}
    text = dict(answer([summary_of(errors, (1.0,), axis=SIZE, structure="a product", measure=LOG)]))["How sure"]
    assert text.startswith("1 seed, rates tuned in 0 of 1 task. One seed says nothing about the spread")
    assert "interval" not in text
