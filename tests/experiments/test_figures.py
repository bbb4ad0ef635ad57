from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from made_up import JITTER, LOG, SIZE, pair, results_of

from fasthyper.experiments.drawing import Panel, Series, far, spread, svg, y_limits
from fasthyper.experiments.experiment import Axis, Line
from fasthyper.experiments.figures import panels, panels_of
from fasthyper.experiments.results import Interval

HYPER, EMBED = JITTER * [1, 2] + [0.2, 0.1], JITTER * [1, 1] + 0.5
WIDTHS = Axis("width", "units", log=True)
OPTIMIZERS = {"values": ("sgd", "adam"), "axis": Axis("optimizer", "optimizer")}
BROKEN = pair(HYPER * [1, np.nan], EMBED)
FRONTIER = {"values": (0.5, 2.0), "axis": SIZE, "structure": "a product"}


def drawn(panel, label):
    (series,) = [series for series in panel.series if series.label == label]
    return series


@pytest.mark.parametrize(
    ("errors", "study"),
    [
        (pair(HYPER, EMBED), {}),
        (pair(HYPER, EMBED), {"measure": LOG}),
        (pair(HYPER, EMBED), FRONTIER),
        (pair(HYPER, EMBED), {"values": (4, 64), "axis": WIDTHS}),
        (pair(HYPER, EMBED), {"values": (4, 64), "axis": replace(WIDTHS, count="primary_parameters"), "measure": LOG}),
        (pair(HYPER, EMBED), {"values": (0.01, 0.1), "axis": Axis("lr", "learning rate", log=True)}),
        (pair(HYPER, EMBED), OPTIMIZERS),
        (pair(HYPER, EMBED), {**OPTIMIZERS, "measure": LOG}),
        (pair(*[np.full((3, 20), 0.5)] * 2), {"values": tuple(range(2, 22))}),
        (pair(HYPER[:, :1], EMBED[:, :1]), {"values": (2,)}),
        (pair(HYPER[:1], EMBED[:1]), {"published": {("embedding", 3): 0.45}}),
        (BROKEN, {}),
        (BROKEN, {"measure": LOG}),
        (BROKEN, FRONTIER),
        (BROKEN, {**OPTIMIZERS, "measure": LOG}),
        (pair(HYPER * np.nan, EMBED * np.nan), {"measure": LOG}),
        (pair(HYPER * 0, EMBED), {"measure": LOG}),
        (pair(HYPER * 0, EMBED), FRONTIER),
    ],
)
def test_figures_of_all_sorts(errors, study):
    results = results_of(errors, levels=(("zero", "nothing"),), extra={"zero": 0.7}, **study)
    found = panels(results)
    assert len(found) == 2 + bool(results.study.structure)
    for image in found:
        root = ElementTree.fromstring(image)
        words = " ".join(root.itertext())
        assert "is better" in words or "has less error" in words
        assert not re.search(r"\b(nan|inf|None)\b", words)
        assert root.get("role") == "img"
        assert root.get("viewBox") == "0 0 388.8 309.6"


def test_colours_and_ids_are_left_to_the_page():
    first, second = panels(results_of(pair(HYPER, EMBED)))
    for image in (first, second):
        assert not re.search(r"(fill|stroke): #", image)
        assert "var(--cd55e00, #d55e00)" in image
        assert "DejaVu" not in image
    ids = [set(re.findall(r'\bid="([^"]*)"', image)) for image in (first, second)]
    assert not ids[0] & ids[1]
    for image, own in zip((first, second), ids, strict=True):
        assert set(re.findall(r'(?:href="|url\()#([^")]*)', image)) <= own


def test_a_frontier_is_drawn_over_parameters_and_over_flops_and_in_pairs():
    results = results_of(pair(HYPER, EMBED), levels=(("zero", "nothing"),), extra={"zero": 0.7}, **FRONTIER)
    parameters, flops, paired = panels_of(results)
    assert (paired.x_ends, paired.ticks, paired.x_log) == (parameters.x_ends, parameters.ticks, True)
    assert [x for x, *_ in drawn(paired, "embedding").points] == [x for x, *_ in drawn(parameters, "embedding").points]
    for value, (_, shown, _) in zip(results.study.values, drawn(paired, "embedding").points, strict=True):
        assert shown == results.advantage("hypernetwork", "embedding", value).map(results.study.measure.displayed)
    assert parameters.title == "Error over trained parameters"
    assert flops.title == "Error over the cost of training"
    for panel, xs in ((parameters, [1000, 4000]), (flops, [6500, 26000])):
        assert (panel.x_log, panel.y_log) == (True, True)
        assert panel.subtitle[0] == "test error (%); lower is better"
        assert panel.subtitle[1] == "mean of 3 seeds, bars: 95 % intervals; further left is cheaper"
        assert panel.x_ends[0] < min(xs) < max(xs) < panel.x_ends[1]
        for name in ("hypernetwork", "embedding", "nothing"):
            assert [x for x, _, _ in drawn(panel, name).points] == pytest.approx(xs, rel=0.05)
        assert drawn(panel, "nothing").dash
    assert [drawn(parameters, name).strong for name in ("hypernetwork", "embedding", "nothing")] == [True, False, False]


def test_a_frontier_has_a_tick_for_each_size():
    results = results_of(pair(HYPER, EMBED), (0.25, 1.0), axis=SIZE, structure="a product")
    parameters, flops, _ = panels_of(results)
    assert parameters.ticks == ((500.0, "500\n0.25 ×"), (2000.0, "2,000\n1 ×"))
    assert flops.ticks == ()
    places = [drawn(parameters, name).points[0][0] for name in ("hypernetwork", "embedding")]
    assert places[0] < 500 < places[1]  # side by side: their totals are equal


def test_a_frontier_of_one_size_has_an_axis_that_shows_no_difference_of_totals():
    errors = pair(HYPER[:, :1], EMBED[:, :1])
    parameters, *_ = panels_of(results_of(errors, (1.0,), axis=SIZE, structure="a product"))
    low, high = parameters.x_ends
    assert high / low == pytest.approx(3)
    assert low * high == pytest.approx(2000**2)


def test_a_level_that_is_far_does_not_flatten_the_lines():
    line = Series("a", "#0072B2", "o", [(1.0, Interval(0.1, 0.09, 0.11), 0), (2.0, Interval(0.2, 0.19, 0.21), 0)])
    near, away = (
        Series(name, "#666666", "", [(1.0, Interval(y, y, y), 0)], dash="--") for name, y in (("near", 0.25), ("b", 9))
    )
    panel = Panel("", ("", ""), "", [line, near, away], y_log=True)
    assert [far(series, panel) for series in panel.series] == [False, False, True]
    assert y_limits(panel)[1] < 0.5
    image = svg(panel, "it")
    assert "↑ 9: b" in image
    assert "near" in image
    linear = replace(panel, y_log=False)
    assert not far(away, linear)
    assert y_limits(linear)[1] > 9


def test_titles_and_names_fit_beside_each_other():
    levels = (("zero", "the best predictor that does not know I"),)
    long = replace(LOG, label="mean squared error / variance of the target")
    results = results_of(pair(HYPER, EMBED), levels=levels, extra={"zero": 0.7}, measure=long, **FRONTIER)
    for panel, image in zip(panels_of(results), panels(results), strict=True):
        assert len(panel.title) < 40
        assert max(map(len, panel.subtitle)) < 65
        assert (">the best predictor<" in image) == ("paired" not in panel.title)
    assert panels_of(results_of(pair(HYPER, EMBED), measure=long))[0].title == "Error"


def test_what_is_drawn_is_the_means_and_their_intervals():
    results = results_of(pair(HYPER, EMBED), levels=(("zero", "nothing"),), extra={"zero": 0.7})
    panel = panels_of(results)[0]
    assert [series.label for series in panel.series] == ["hypernetwork", "embedding", "nothing"]
    shown = [interval for _, interval, _ in drawn(panel, "hypernetwork").points]
    np.testing.assert_allclose([i.mean for i in shown], 100 * HYPER.mean(0))
    expected = [(100 * row.measured.low, 100 * row.measured.high) for row in results.rows()[:2]]
    np.testing.assert_allclose([(i.low, i.high) for i in shown], expected)
    np.testing.assert_allclose([i.mean for _, i, _ in drawn(panel, "nothing").points], [70, 70])


@pytest.mark.parametrize("log", [False, True])
def test_other_methods_are_shown_paired_with_the_hypernetwork(log):
    results = results_of(pair(HYPER, EMBED), **({"measure": LOG} if log else {}))
    panel = panels_of(results)[1]
    assert [series.label for series in panel.series] == ["embedding", "hypernetwork"]
    apart = EMBED / HYPER if log else 100 * (EMBED - HYPER)
    expected = [Interval.of((np.log(column) if log else column).tolist()) for column in apart.T]
    shown = [interval for _, interval, _ in drawn(panel, "embedding").points]
    for found, interval in zip(shown, expected, strict=True):
        ends = np.array([interval.mean, interval.low, interval.high])
        np.testing.assert_allclose([found.mean, found.low, found.high], np.exp(ends) if log else ends)
    assert {interval.mean for _, interval, _ in drawn(panel, "hypernetwork").points} == {1.0 if log else 0.0}
    assert panel.subtitle[1] == f"above the line at {1 if log else 0}, the hypernetwork has less error"


def test_without_a_hypernetwork_or_others_nothing_is_paired():
    assert len(panels_of(results_of({"embedding": EMBED, "film": EMBED}))) == 1
    assert len(panels_of(results_of({"hypernetwork": HYPER}))) == 1


def test_a_diverged_run_is_marked_and_left_out_of_its_line():
    panel = panels_of(results_of(BROKEN))[0]
    points = drawn(panel, "hypernetwork").points
    assert [diverged for _, _, diverged in points] == [0, 3]
    assert [x for x, _ in drawn(panel, "hypernetwork").shown(False)] == [points[0][0]]
    cross = lambda counts: svg(
        Panel("", ("", ""), "", [Series("a", "#0072B2", "o", [(1.0, Interval(1, 1, 1), n) for n in counts])]), "it"
    )
    assert cross([1]).count("<use") == cross([0]).count("<use") + 1
    everything = pair(HYPER * np.nan, EMBED)
    words = " ".join(ElementTree.fromstring(panels(results_of(everything))[0]).itertext())
    assert "hypernetwork: diverged" in re.sub(r"\s+", " ", words)


def test_scales_ticks_and_labels():
    panel = panels_of(results_of(pair(HYPER, EMBED), (4, 64), axis=WIDTHS, measure=LOG))[0]
    assert (panel.x_log, panel.y_log) == (True, True)
    assert (panel.x_label, panel.subtitle[0], panel.title) == (
        "units",
        "squared error; lower is better",
        "Squared error",
    )
    assert panel.ticks == ((4.0, "4"), (64.0, "64"))


@pytest.mark.parametrize("log", [False, True])
def test_long_bars_do_not_hide_the_differences_of_the_means(log):
    means = [2.0, 4.0]
    wide = [Interval(mean, mean / 1e9 if log else -1e9, 1e9) for mean in means]
    narrow = [Interval(mean, mean - 0.1, mean + 0.1) for mean in means]
    series = lambda intervals: [Series("a", "#0072B2", "o", [(n, i, 0) for n, i in enumerate(intervals)])]
    low, high = y_limits(Panel("", ("", ""), "", series(wide), y_log=log))
    assert low < 2
    assert 4 < high < 20
    assert y_limits(Panel("", ("", ""), "", series(narrow), y_log=log)) == pytest.approx((1.9, 4.1), rel=0.1)
    assert y_limits(Panel("", ("", ""), "", series([]), y_log=log)) is None


def test_categories_stand_side_by_side():
    panel = panels_of(results_of(pair(HYPER, EMBED), **OPTIMIZERS))[0]
    assert panel.ticks == ((0.0, "sgd"), (1.0, "adam"))
    at = [[x for x, _, _ in series.points] for series in panel.series]
    assert at[0] != at[1]
    assert np.round(at).tolist() == [[0, 1], [0, 1]]
    assert not any(series.joined for series in panel.series)


def test_lines_of_one_method_are_told_apart():
    lines = (Line("pair", "error", "first"), Line("pair", "apart", "second"))
    panel = panels_of(results_of({"pair": HYPER, "pair:apart": EMBED}, lines=lines))[0]
    assert [series.label for series in panel.series] == ["first", "second"]
    assert len({series.colour for series in panel.series}) == 2


def test_published_values_are_drawn_beside_ours():
    panel = panels_of(results_of(pair(HYPER, EMBED), published={("embedding", 3): 0.45}))[0]
    ((x, interval, _),) = drawn(panel, "embedding: published").points
    assert interval.mean == 45
    assert x == drawn(panel, "embedding").points[1][0]


@pytest.mark.parametrize("places", [[0.0] * 3, [1.0] * 3, [0.0, 0.05, 0.5, 0.99, 1.0], [0.5] * 20])
def test_names_beside_lines_do_not_overlap(places):
    heights = [0.062 * (1 + number % 2) for number in range(len(places))]
    found = spread(places, heights)
    assert (np.diff(found) >= 1.5 * 0.062 - 1e-9).all()
    assert len(found) == len(places)
    if len(places) < 15:
        assert found[0] >= -1e-9
        assert found[-1] + heights[-1] / 2 <= 1.031 + 1e-9
