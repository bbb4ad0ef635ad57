from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from made_up import JITTER, LOG, pair, results_of, summary_of

from fasthyper.experiments.claims import Flat, Improves, Wins
from fasthyper.experiments.experiment import ASKED, MEASURED, THEOREM, UNMET, Finding
from fasthyper.experiments.figures import panels
from fasthyper.experiments.outcome import outcome
from fasthyper.experiments.rates import Rate
from fasthyper.experiments.report import (
    columns,
    diverged,
    fused_table,
    p_text,
    rates_table,
    report_html,
    summary_csv,
    table,
    write_report,
)
from fasthyper.experiments.results import Interval

HYPER, EMBED = JITTER * [1, 2] + [0.2, 0.1], JITTER * [1, 1] + 0.5
CLAIMS = (Wins(text="It wins"), Improves(text="It rises", line="embedding"), Flat(text="It lasts", whose=ASKED))
VOID = {"meta", "img", "br", "hr", "link", "input"}  # tags of SVG close themselves


@pytest.fixture(scope="module")
def summary():
    return summary_of(pair(HYPER, EMBED), claims=CLAIMS, note="A note.")


class Page(HTMLParser):
    """The text and the links of a page; a tag that is left open or closed twice is an error."""

    def __init__(self, html):
        super().__init__()
        self.open, self.addresses, self.ids, self.pieces = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.pieces))

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action")]
        self.ids += [value for name, value in attributes if name == "id"]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.pieces.append(data)


def test_the_page_is_whole_and_needs_nothing_else(summary):
    html = report_html(summary)
    page = Page(html)
    for panel in panels(summary.results[0]):
        assert panel in html
    assert html.count("<svg") == 2
    assert all(address.startswith("#") and address[1:] in page.ids for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import|<script|https?://(?!www\.w3\.org)", html)
    assert len(set(page.ids)) == len(page.ids)


def test_the_page_says_what_was_asked_found_and_run(summary):
    text = Page(report_html(summary)).text
    experiment = summary.comparison.experiment
    for said in (experiment.title, experiment.source, experiment.question, *experiment.choices, "A note.", "Made up"):
        assert said in text
    for said in ("Preset quick", "data line", "device cpu", "changed: seeds 3", "Made with torch 2 ."):
        assert said.replace(" ", "") in text.replace(" ", "")
    for said in ("epochs 2", "lr 0.05", "batch_size 16", "optimizer sgd", "width 6", "3 seeds"):
        assert said in text
    for cells in table(summary.results[0]):
        assert " ".join(filter(None, cells)) in text


def test_each_claim_has_its_verdict_its_owner_and_its_evidence(summary):
    html = report_html(summary)
    rows = [
        re.sub(r"\s+", " ", unescape(re.sub("<[^>]*>", " ", row)))
        for row in re.findall("<tr>.*?</tr>", html, re.DOTALL)
    ]
    assert [finding.verdict for _, finding in summary.findings] == ["reproduced", "not reproduced", "holds"]
    for (_, finding), sign in zip(summary.findings, "✓✗✓", strict=True):
        (row,) = [row for row in rows if f" {finding.claim} " in row]
        words = (finding.claim, finding.whose, sign, finding.verdict)
        shown = (*words, p_text(finding), finding.evidence, finding.detects)
        assert row == f" made-up {' '.join(shown)} "
        assert finding.rule in html


def test_an_undecided_claim_is_marked_as_open():
    html = report_html(summary_of(pair(HYPER[:1], EMBED[:1]), claims=CLAIMS))
    assert html.count("? undecided") == 3
    text = Page(html).text
    assert "1 seed;" in text
    assert "nan" not in text
    assert not re.search(r"\binf\b", text)


def test_text_is_escaped():
    nasty = "<b>bold</b> & \"quoted\" 'single'"
    claims = (Wins(text=nasty, whose=nasty),)
    changes = dict.fromkeys(("title", "question", "source"), nasty) | {"choices": (nasty,)}
    summary = summary_of(pair(HYPER, EMBED), claims=claims, changes=changes, note=nasty)
    html = report_html(summary)
    assert "<b>" not in html
    assert Page(html).text.count(nasty) >= 7


def test_both_files_are_written(tmp_path, summary):
    write_report(summary, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "summary.csv"]
    assert (tmp_path / "report.html").read_text() == report_html(summary)
    assert (tmp_path / "summary.csv").read_text() == summary_csv(summary)


def test_the_csv_holds_the_rows_in_full(summary):
    rows = list(csv.DictReader(io.StringIO(summary_csv(summary))))
    expected = summary.results[0].rows()
    assert len(rows) == len(expected) == 4
    for row, found in zip(rows, expected, strict=True):
        assert (row["study"], row["axis"], row["measure"]) == ("made-up", "depth", "error")
        assert row["method"] == found.line.method
        assert int(row["value"]) == found.value
        assert int(row["seeds"]) == 3
        for name in ("mean", "low", "high"):
            assert float(row[name]) == getattr(found.measured, name)
            ratio = summary.results[0].ratio(found.line.key, "hypernetwork", found.value)
            assert row[f"ratio_{name}"] == ("" if found.paired is None else str(getattr(ratio, name)))
        assert float(row["step_seconds"]) == found.step_seconds
        assert row["fused_seconds"] == ("" if found.fused_seconds is None else str(found.fused_seconds))


def test_the_csv_leaves_empty_what_is_not_finite():
    rows = list(csv.DictReader(io.StringIO(summary_csv(summary_of(pair(HYPER[:1], EMBED[:1] * np.nan))))))
    assert [(row["low"], row["high"]) for row in rows] == [("", "")] * 4
    assert [row["mean"] == "" for row in rows] == [False, False, True, True]


def test_the_table():
    published = {("embedding", 3): 0.45}
    extra = {"zero": 0.7, "raw": 0.125}
    results = results_of(
        pair(HYPER, EMBED), published=published, levels=(("zero", "nothing"),), also=(("raw", "as it is"),), extra=extra
    )
    paired = "error - hypernetwork's"
    assert columns(results.study)[:6] == ["method", "depth", "test error (%)", paired, "published", "as it is"]
    rows = table(results)
    assert all(len(row) == len(columns(results.study)) for row in rows)
    interval = results.rows()[0].measured
    numbers = f"20.0 [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    cost = ["0.125", "1,000", "100", "2,000", "13", "1.30e+04", "2.00", "2", ""]
    assert rows[0] == ["hypernetwork g(x; f(I))", "2", numbers, "", "", *cost]
    apart = results.advantage("hypernetwork", "embedding", 3)
    assert rows[3][3] == f"{100 * apart.mean:.1f} [{100 * apart.low:.1f}, {100 * apart.high:.1f}]"
    assert rows[3][4] == "0.45"
    less = Interval.of([70 - 100 * number for number in HYPER[:, 0]])
    assert rows[4][:3] == ["nothing", "2", "70.0 [70.0, 70.0]"]
    assert rows[4][3:] == [f"{less.mean:.1f} [{less.low:.1f}, {less.high:.1f}]", *[""] * 10]


def test_the_table_gives_factors_where_a_study_compares_by_ratios():
    results = results_of(pair(HYPER[:1], EMBED[:1]), measure=LOG)
    factor = EMBED[0, 1] / HYPER[0, 1]
    assert [row[3] for row in table(results)] == ["", "", f"× {EMBED[0, 0] / HYPER[0, 0]:.3g}", f"× {factor:.3g}"]


def test_the_table_of_steps_with_and_without_weights_written_out(summary):
    assert fused_table(summary.results[0]) == [[depth, "2.00", "8.00", "4.00", "2", "8"] for depth in ("2", "3")]
    assert "speed-up" in report_html(summary)
    others = summary_of({"embedding": EMBED, "film": EMBED})
    assert fused_table(others.results[0]) == []
    assert "speed-up" not in report_html(others)


def test_findings_that_were_not_tested_stand_apart(summary):
    study = summary.comparison.studies[0]
    findings = (
        (study, Finding("Sure", "the paper", "reproduced", "all of it", "a rule", 1e-5, 4e-5, "2 points")),
        (study, Finding("Moot", "the paper", UNMET, "nothing learned", "a rule")),
        (study, Finding("Steep", THEOREM, MEASURED, "-0.6 [-0.7, -0.5]", "")),
    )
    text = Page(report_html(replace(summary, findings=findings))).text
    assert "1 tested: reproduced (1)" in text
    assert "made-up Sure the paper ✓ reproduced < 0.001 all of it 2 points" in text
    assert "1 not tested: their premise is not met" in text
    assert "made-up Moot the paper – premise unmet : nothing learned" in text
    assert "made-up Steep a theorem -0.6 [-0.7, -0.5]" in text
    assert "measured Steep" not in text


@pytest.mark.parametrize(
    ("adjusted", "text"), [(None, ""), (math.nan, ""), (4e-4, "< 0.001"), (0.0449, "0.045"), (0.449, "0.45")]
)
def test_p_as_text(adjusted, text):
    assert p_text(Finding("", "", "", "", "", adjusted=adjusted)) == text
    assert p_text(Finding("", "", UNMET, "", "", adjusted=adjusted)) == ""


def test_diverged_runs_are_counted(summary):
    results = results_of(pair(HYPER, np.where(np.arange(6).reshape(3, 2) == 3, np.nan, EMBED)))
    assert diverged(results) == ["embedding at depth 3: 1 of 3"]
    assert [row[-1] for row in table(results)] == ["", "", "", "1"]
    broken = replace(summary, results=(results,))
    assert "× in the figure: embedding at depth 3: 1 of 3." in Page(report_html(broken)).text
    assert "× in the figure" not in Page(report_html(summary)).text


def test_chosen_rates_and_those_at_the_edge_of_their_grid(summary):
    inside = Rate("made-up", "embedding", 3, "adam", 0.01, {0.1: math.inf, 0.01: 0.25, 0.001: 0.5})
    edge = replace(inside, method="film", lr=0.001)
    page = replace(summary, rates=(inside, edge))
    assert rates_table(page) == [
        ["made-up", "embedding", "3", "adam", "0.01", "0.001: 50; 0.01: 25; 0.1: diverged"],
        ["made-up", "FiLM", "3", "adam", "0.001 ⚠ edge", "0.001: 50; 0.01: 25; 0.1: diverged"],
    ]
    text = Page(report_html(page)).text
    assert "2 rates, chosen on the validation split; 1 at the edge of the grid" in text
    assert "Learning rates" not in Page(report_html(summary)).text


def test_the_outcome_stands_above_everything_else(summary):
    html = report_html(summary)
    for sentence in outcome(summary):
        assert html.index(sentence.replace("'", "&#39;")) < html.index("<svg")


def test_numbers_that_are_not_finite_are_never_shown():
    cells = [cell for row in table(results_of(pair(HYPER[:1], EMBED[:1] * math.nan))) for cell in row]
    assert "diverged" in cells
    assert not any(re.search(r"\b(nan|inf)\b", cell) for cell in cells)
