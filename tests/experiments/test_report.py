from __future__ import annotations

import base64
import csv
import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from made_up import JITTER, LOG, pair, results_of, summary_of

from fasthyper.experiments.claims import Flat, Improves, Wins
from fasthyper.experiments.experiment import ASKED, Axis, Line
from fasthyper.experiments.figures import figure_png
from fasthyper.experiments.report import (
    columns,
    fused_table,
    report_html,
    summary_csv,
    table,
    write_combined,
    write_report,
)
from fasthyper.experiments.results import Interval

HYPER, EMBED = JITTER * [1, 2] + [0.2, 0.1], JITTER * [1, 1] + 0.5
CLAIMS = (Wins(text="It wins"), Improves(text="It rises", line="embedding"), Flat(text="It lasts", whose=ASKED))
VOID = {"meta", "img", "br", "hr", "link", "input"}


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
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
        self.ids += [value for name, value in attributes if name == "id"]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.pieces.append(data)


def images(page):
    found = [address.partition("base64,") for address in page.addresses if not address.startswith("#")]
    assert all(head == "data:image/png;" for head, _, _ in found)
    return [base64.b64decode(content, validate=True) for _, _, content in found]


def size(png):
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82")
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def test_the_page_is_whole_and_needs_nothing_else(summary):
    html = report_html([summary])
    page = Page(html)
    (image,) = images(page)
    assert image == figure_png(summary.results[0])
    assert not re.search(r"url\(|@import|<script|https?://", html)
    assert len(set(page.ids)) == len(page.ids)


def test_the_page_says_what_was_asked_found_and_run(summary):
    text = Page(report_html([summary])).text
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
    html = report_html([summary])
    rows = [re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", row)) for row in re.findall("<tr>.*?</tr>", html, re.DOTALL)]
    assert [finding.verdict for _, finding in summary.findings] == ["reproduced", "not reproduced", "holds"]
    for (_, finding), sign in zip(summary.findings, "✓✗✓", strict=True):
        (row,) = [row for row in rows if f" {finding.claim} " in row]
        assert f" made-up {finding.claim} {finding.whose} {sign} {finding.verdict} {finding.evidence} " in row
        assert finding.rule in html


def test_an_undecided_claim_is_marked_as_open():
    html = report_html([summary_of(pair(HYPER[:1], EMBED[:1]), claims=CLAIMS)])
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
    html = report_html([summary])
    assert "<b>" not in html
    assert Page(html).text.count(nasty) >= 7
    assert figure_png(summary_of(pair(HYPER, EMBED)).results[0]).startswith(b"\x89PNG")


def test_a_combined_page_has_all_of_them(tmp_path, summary):
    other = summary_of(
        pair(EMBED, HYPER), measure=LOG, claims=CLAIMS[:1], changes={"name": "second", "title": "Another experiment"}
    )
    write_combined([summary, other], tmp_path)
    html = (tmp_path / "report.html").read_text()
    page = Page(html)
    assert len(images(page)) == 2
    assert len(set(page.ids)) == len(page.ids)
    links = [address[1:] for address in page.addresses if address.startswith("#")]
    assert links == ["tiny-1", "second-2"]
    assert set(links) <= set(page.ids)
    for said in ("A tiny experiment", "Another experiment"):
        assert said in page.text
    # Each finding is in the list of all and beside its own figure.
    assert page.text.count("It wins") == 4
    assert page.text.count("It rises") == 2
    assert html.count("✗ not reproduced") == 4


def test_both_files_are_written(tmp_path, summary):
    write_report(summary, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "summary.csv"]
    assert (tmp_path / "report.html").read_text() == report_html([summary])
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
    paired = "less with the hypernetwork by"
    assert columns(results.study)[:6] == ["method", "depth", "test error (%)", paired, "published", "as it is"]
    rows = table(results)
    assert all(len(row) == len(columns(results.study)) for row in rows)
    interval = results.rows()[0].measured
    numbers = f"20.0 [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    cost = ["0.125", "1,000", "100", "2,000", "13", "2.00", "2"]
    assert rows[0] == ["hypernetwork g(x; f(I))", "2", numbers, "", "", *cost]
    apart = results.advantage("hypernetwork", "embedding", 3)
    assert rows[3][3] == f"{100 * apart.mean:.1f} [{100 * apart.low:.1f}, {100 * apart.high:.1f}]"
    assert rows[3][4] == "0.45"
    less = Interval.of([70 - 100 * number for number in HYPER[:, 0]])
    assert rows[4][:3] == ["nothing", "2", "70.0 [70.0, 70.0]"]
    assert rows[4][3:] == [f"{less.mean:.1f} [{less.low:.1f}, {less.high:.1f}]", *[""] * 8]


def test_the_table_gives_factors_where_a_study_compares_by_ratios():
    results = results_of(pair(HYPER[:1], EMBED[:1]), measure=LOG)
    factor = EMBED[0, 1] / HYPER[0, 1]
    assert [row[3] for row in table(results)] == ["", "", f"× {EMBED[0, 0] / HYPER[0, 0]:.3g}", f"× {factor:.3g}"]


def test_the_table_of_steps_with_and_without_weights_written_out(summary):
    assert fused_table(summary.results[0]) == [[depth, "2.00", "8.00", "4.00", "2", "8"] for depth in ("2", "3")]
    assert "speed-up" in report_html([summary])
    others = summary_of({"embedding": EMBED, "film": EMBED})
    assert fused_table(others.results[0]) == []
    assert "speed-up" not in report_html([others])


WIDTHS = Axis("width", "units", log=True)
BROKEN = pair(HYPER * [1, np.nan], EMBED)


@pytest.mark.parametrize(
    ("errors", "values", "study"),
    [
        (pair(HYPER, EMBED), (2, 3), {}),
        (pair(HYPER, EMBED), (2, 3), {"measure": LOG}),
        (pair(HYPER, EMBED), (4, 64), {"axis": WIDTHS}),
        (pair(HYPER, EMBED), (4, 64), {"axis": replace(WIDTHS, count="primary_parameters"), "measure": LOG}),
        (pair(HYPER, EMBED), (0.01, 0.1), {"axis": Axis("lr", "learning rate", log=True)}),
        (pair(HYPER, EMBED), ("sgd", "adam"), {"axis": Axis("optimizer", "optimizer")}),
        (pair(HYPER, EMBED), ("sgd", "adam"), {"axis": Axis("optimizer", "optimizer"), "measure": LOG}),
        (pair(*[np.full((3, 20), 0.5)] * 2), tuple(range(2, 22)), {}),
        (pair(HYPER[:, :1], EMBED[:, :1]), (2,), {}),
        (pair(HYPER[:1], EMBED[:1]), (2, 3), {"published": {("embedding", 3): 0.45}}),
        (BROKEN, (2, 3), {}),
        (BROKEN, (2, 3), {"measure": LOG}),
        (BROKEN, ("sgd", "adam"), {"axis": Axis("optimizer", "optimizer"), "measure": LOG}),
        (pair(HYPER * np.nan, EMBED * np.nan), (2, 3), {"measure": LOG}),
        (pair(HYPER * 0, EMBED), (2, 3), {"measure": LOG}),
    ],
)
def test_figures_and_pages_of_all_sorts(errors, values, study, monkeypatch):
    summary = summary_of(errors, values, levels=(("zero", "nothing"),), extra={"zero": 0.7}, claims=CLAIMS[:1], **study)
    width, height = size(figure_png(summary.results[0]))
    assert 600 <= width <= 2000
    assert 400 <= height <= 1500
    monkeypatch.setattr("fasthyper.experiments.report.figure_png", lambda results: b"a figure")
    text = Page(report_html([summary])).text
    assert ("diverged" in text) == any(np.isnan(numbers).any() for numbers in errors.values())
    assert not re.search(r"\b(nan|inf|None)\b", text)


def axes_of(monkeypatch, results):
    """Return the axes of a figure before it becomes a PNG."""
    from matplotlib.figure import Figure

    kept = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **o: kept.append(self) or save(self, *a, **o))
    figure_png(results)
    return kept[0].axes[0]


def test_scales_ticks_and_labels(monkeypatch):
    results = results_of(pair(HYPER, EMBED), (4, 64), axis=WIDTHS, measure=LOG)
    axes = axes_of(monkeypatch, results)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("units", "squared error")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["4", "64"]
    assert "means of 3 seeds, bars: 95 % intervals" in axes.get_title()


def test_categories_stand_side_by_side(monkeypatch):
    results = results_of(pair(HYPER, EMBED), ("sgd", "adam"), axis=Axis("optimizer", "optimizer"))
    axes = axes_of(monkeypatch, results)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["sgd", "adam"]
    assert axes.get_ylim() == (0, 100)
    at = [
        line.get_xdata().astype(float)
        for line in axes.lines
        if line.get_linestyle() == "None" and len(line.get_xdata()) == 2
    ]
    assert not np.allclose(at[0], at[-1])
    assert np.allclose([np.round(x) for x in at], [0, 1])


def test_what_is_drawn_is_the_means_and_their_intervals(monkeypatch):
    results = results_of(pair(HYPER, EMBED), levels=(("zero", "nothing"),), extra={"zero": 0.7})
    axes = axes_of(monkeypatch, results)
    handles, labels = axes.get_legend_handles_labels()
    drawn = {label: (h.lines[0] if hasattr(h, "lines") else h) for h, label in zip(handles, labels, strict=True)}
    assert set(drawn) == {"hypernetwork g(x; f(I))", "embedding q(x, e(I))", "nothing"}
    np.testing.assert_allclose(drawn["hypernetwork g(x; f(I))"].get_ydata().astype(float), 100 * HYPER.mean(0))
    np.testing.assert_allclose(drawn["nothing"].get_ydata().astype(float), [70, 70])
    (bars,) = [h for h, label in zip(handles, labels, strict=True) if label.startswith("hypernetwork")]
    ends = [segment[:, 1] for segment in bars.lines[2][0].get_segments()]
    expected = [(100 * row.measured.low, 100 * row.measured.high) for row in results.rows()[:2]]
    np.testing.assert_allclose(ends, expected)


def test_a_diverged_run_is_left_out_of_its_line(monkeypatch):
    axes = axes_of(monkeypatch, results_of(BROKEN))
    lengths = {label: len(h.lines[0].get_xdata()) for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    assert lengths == {"hypernetwork g(x; f(I))": 1, "embedding q(x, e(I))": 2}


def test_lines_of_one_method_are_told_apart(monkeypatch):
    errors = {"pair": HYPER, "pair:apart": EMBED}
    lines = (Line("pair", "error", "first"), Line("pair", "apart", "second"))
    axes = axes_of(monkeypatch, results_of(errors, lines=lines))
    handles, labels = axes.get_legend_handles_labels()
    assert labels == ["first", "second"]
    assert len({handle.lines[0].get_color() for handle in handles}) == 2


def test_numbers_that_are_not_finite_are_never_shown():
    cells = [cell for row in table(results_of(pair(HYPER[:1], EMBED[:1] * math.nan))) for cell in row]
    assert "diverged" in cells
    assert not any(re.search(r"\b(nan|inf)\b", cell) for cell in cells)
