from __future__ import annotations

import numpy as np
import pytest
from made_up import JITTER, comparison_of, pair, records_of, study_of

from fasthyper.experiments.summary import summarise

ERRORS = pair(JITTER * np.ones(3) + 0.2, JITTER * np.ones(3) + 0.5)
DEPTHS = (2, 3, 5)


def test_a_missing_or_extra_run_is_refused():
    comparison = comparison_of(study_of(ERRORS, DEPTHS))
    records = records_of(comparison, ERRORS)
    for wrong in (records[1:], [*records, records[0]], [*records[1:], records[1]], []):
        with pytest.raises(ValueError, match=r"records: expected the 18 runs"):
            summarise(comparison, wrong)


def test_the_order_of_the_records_means_nothing():
    comparison = comparison_of(study_of(ERRORS, DEPTHS))
    records = records_of(comparison, ERRORS)
    assert summarise(comparison, records[::-1]).results[0].rows() == summarise(comparison, records).results[0].rows()


def test_different_versions_are_all_listed():
    comparison = comparison_of(study_of(ERRORS, DEPTHS))
    records = records_of(comparison, ERRORS)
    records[3]["versions"] = {"torch": "3"}
    assert summarise(comparison, records).versions == ({"torch": "2"}, {"torch": "3"})


def test_the_date_is_that_of_the_last_run():
    comparison = comparison_of(study_of(ERRORS, DEPTHS))
    records = records_of(comparison, ERRORS)
    assert summarise(comparison, records).date == ""
    records[3]["date"], records[5]["date"] = "2026-11-30T23:59:59+00:00", "2026-11-29T00:00:00+00:00"
    assert summarise(comparison, records).date == "2026-11-30"
