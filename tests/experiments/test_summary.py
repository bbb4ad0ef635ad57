from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest
from scipy import stats

from fasthyper.experiments import ROTATION, Comparison
from fasthyper.experiments.report import errors_png, report_markdown, summary_csv, table
from fasthyper.experiments.summary import (
    NOT_REPRODUCED,
    REPRODUCED,
    UNDECIDED,
    Interval,
    summarise,
)


def comparison_of(depths, seeds):
    return Comparison.of(ROTATION, "digits", depths=depths, seeds=seeds, device="cpu")


def records_of(comparison, hypernetwork, embedding):
    """Records whose errors are the arrays `(seeds, depths)`."""
    depths = sorted(comparison.depths)
    errors = {"hypernetwork": np.asarray(hypernetwork), "embedding": np.asarray(embedding)}
    return [
        {
            "config": run.config(),
            "metrics": {
                "test_error": float(errors[run.method][run.seed, depths.index(run.depth)]),
                "context_parameters": 1000 * run.depth,
                "primary_parameters": 70,
                "trainable_parameters": 2000,
                "step_seconds": 0.001 * (run.seed + 1),
                "run_seconds": 1.0,
                "peak_temporary_bytes": 2048 + run.seed,
            },
            "versions": {"torch": "2"},
            "date": "2020-01-01",
        }
        for run in comparison.runs()
    ]


@pytest.fixture
def noisy():
    comparison = comparison_of((2, 3, 5), 4)
    rng = np.random.default_rng(0)
    hypernetwork = 0.2 - 0.02 * np.arange(3) + 0.01 * rng.standard_normal((4, 3))
    embedding = 0.5 + 0.05 * rng.standard_normal((4, 3))
    return comparison, hypernetwork, embedding


def test_means_and_deviations_are_numpys(noisy):
    comparison, hypernetwork, embedding = noisy
    summary = summarise(comparison, records_of(*noisy))
    assert [(row.method, row.depth) for row in summary.rows] == [
        (method, depth) for method in ("hypernetwork", "embedding") for depth in (2, 3, 5)
    ]
    found = np.array([[row.error_mean, row.error_std] for row in summary.rows])
    for rows, errors in ((found[:3], hypernetwork), (found[3:], embedding)):
        np.testing.assert_allclose(rows[:, 0], errors.mean(0))
        np.testing.assert_allclose(rows[:, 1], errors.std(0, ddof=1))
    row = summary.rows[1]
    assert (row.seeds, row.context_parameters, row.primary_parameters) == (4, 3000, 70)
    assert row.step_seconds == pytest.approx(0.0025)
    assert row.peak_temporary_bytes == 2051


def test_differences_are_paired(noisy):
    _, hypernetwork, embedding = noisy
    summary = summarise(noisy[0], records_of(*noisy))
    for column, depth in enumerate((2, 3, 5)):
        test = stats.ttest_rel(embedding[:, column], hypernetwork[:, column])
        low, high = test.confidence_interval(0.95)
        found = summary.advantages[depth]
        np.testing.assert_allclose((found.low, found.high), (low, high))
        assert found.mean == pytest.approx((embedding - hypernetwork)[:, column].mean())


def test_slopes_are_least_squares_by_seed(noisy):
    _, hypernetwork, _ = noisy
    slopes = [stats.linregress([2, 3, 5], row).slope for row in hypernetwork]
    found = summarise(noisy[0], records_of(*noisy)).slopes["hypernetwork"]
    assert found.mean == pytest.approx(np.mean(slopes))
    assert found.high - found.mean == pytest.approx(stats.sem(slopes) * stats.t.ppf(0.975, 3))


def test_one_seed_has_no_interval():
    assert Interval.of([0.3]) == Interval(0.3, -math.inf, math.inf)
    comparison = comparison_of((2, 3), 1)
    summary = summarise(comparison, records_of(comparison, [[0.1, 0.1]], [[0.5, 0.5]]))
    assert {finding.verdict for finding in summary.findings} == {UNDECIDED}
    assert math.isnan(summary.rows[0].error_std)
    text = report_markdown(summary)
    assert "nan" not in text
    assert "inf" not in text.replace("information", "")
    assert "one seed, so no interval" in text


JITTER = 0.002 * np.array([-1.0, 0.0, 1.0])[:, None]
WIDE = 0.2 * np.array([[-1.0, 1.0], [0.0, 0.0], [1.0, -1.0]])


@pytest.mark.parametrize(
    ("hypernetwork", "embedding", "verdicts"),
    [
        (JITTER * [1, 2] + [0.2, 0.1], JITTER * [1, 1] + [0.5, 0.5], [REPRODUCED] * 3),
        (JITTER * [1, 2] + [0.5, 0.5], JITTER * [1, 2] + [0.2, 0.1], [NOT_REPRODUCED] * 3),
        (0.3 + WIDE, 0.3 - WIDE, [UNDECIDED] * 3),
        (
            JITTER * [1, 1] + [0.1, 0.2],
            JITTER * [1, 1] + [0.3, 0.4],
            [REPRODUCED, NOT_REPRODUCED, REPRODUCED],
        ),
        # Better at one depth and worse at the other is no win.
        (JITTER * [1, 1] + [0.2, 0.6], JITTER * [1, -1] + 0.4, [NOT_REPRODUCED, NOT_REPRODUCED, REPRODUCED]),
    ],
)
def test_verdicts(hypernetwork, embedding, verdicts):
    comparison = comparison_of((2, 3), 3)
    summary = summarise(comparison, records_of(comparison, hypernetwork, embedding))
    assert [finding.verdict for finding in summary.findings] == verdicts


def test_one_depth_shows_no_trend():
    comparison = comparison_of((4,), 3)
    summary = summarise(comparison, records_of(comparison, 0.2 + JITTER, 0.5 - JITTER))
    assert [finding.verdict for finding in summary.findings] == [REPRODUCED, UNDECIDED, UNDECIDED]
    assert "One depth says nothing" in report_markdown(summary)
    assert errors_png(summary).startswith(b"\x89PNG")


def test_a_missing_or_extra_run_is_refused(noisy):
    records = records_of(*noisy)
    for wrong in (records[1:], [*records, records[0]], []):
        with pytest.raises(ValueError, match=r"records: expected the 24 runs"):
            summarise(noisy[0], wrong)


def test_different_versions_are_all_listed(noisy):
    records = records_of(*noisy)
    records[3]["versions"] = {"torch": "3"}
    summary = summarise(noisy[0], records)
    assert summary.versions == [{"torch": "2"}, {"torch": "3"}]
    assert "Made with torch 3." in report_markdown(summary)


def test_the_csv_holds_the_rows(noisy):
    summary = summarise(noisy[0], records_of(*noisy))
    rows = list(csv.DictReader(io.StringIO(summary_csv(summary))))
    assert len(rows) == 6
    for row, expected in zip(rows, summary.rows, strict=True):
        assert row["method"] == expected.method
        assert int(row["depth"]) == expected.depth
        assert float(row["error_mean"]) == expected.error_mean
        assert float(row["error_std"]) == expected.error_std


def test_the_report_says_who_wins_by_how_much(noisy):
    comparison = comparison_of((2, 3), 2)
    errors = np.array([[0.10, 0.60], [0.12, 0.64]]), np.array([[0.40, 0.30], [0.44, 0.30]])
    summary = summarise(comparison, records_of(comparison, *errors))
    text = report_markdown(summary)
    assert "![" in text
    assert "(errors.png)" in text
    assert "lower mean test error at 1 of 2 depths" in text
    assert "Depth 2: hypernetwork 11.0 ± 1.4 %, embedding method 42.0 ± 2.8 %." in text
    assert "The hypernetwork is better by 31.0 points" in text
    assert "The embedding method is better by 32.0 points (95 % interval 6.6 to 57.4)." in text
    assert "learning rate 0.01, 40 epochs, batches of 64" in text
    for cells in table(summary):
        assert "| " + " | ".join(cells) + " |" in text
    assert table(summary)[0][5:] == ("11.0 ± 1.4 %", "1.50 ms", "2 KiB")


def test_an_uncertain_win_is_called_so():
    comparison = comparison_of((2,), 2)
    summary = summarise(comparison, records_of(comparison, [[0.3], [0.4]], [[0.4], [0.36]]))
    assert "better by 3.0 points (95 % interval -85.9 to 91.9): not sure." in report_markdown(summary)
