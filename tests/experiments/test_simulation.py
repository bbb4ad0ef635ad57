"""How often verdicts are wrong, and how often they find what is true, on simulated pages of the catalogue.

The pages have the catalogue's own studies with all their claims, and made-up errors: normal (in logarithms, if a study
compares by ratios), correlated among all lines of a seed, among the lines of a seed at one value, and among all values
of a line. Levels are further lines.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from made_up import DISTANCE, study_of
from scipy import stats

from fasthyper.experiments import EXPERIMENTS
from fasthyper.experiments.claims import FallsAtEachStep, Flat, Improves, WellBelow, Wins
from fasthyper.experiments.results import Interval, Results
from fasthyper.experiments.significance import FAMILY
from fasthyper.experiments.verdicts import Page

PAGES = 1000
MOST = stats.binom.ppf(0.999, PAGES, FAMILY) / PAGES
"""The share of pages that is exceeded with a chance of 0.1 % where the true share is 5 %."""


class Simulated(Results):
    """Results of a study in which lines do not differ.

    Args:
        study: the study.
        random: the random numbers.
        fall: of all lines, per unit or doubling of the axis.
        above: how far levels lie above the other lines.
    """

    def __init__(self, study, random, fall=0.0, above=0.0):
        super().__init__(study, {})
        self.random, self.errors, self.above = random, {}, above
        values = study.values
        positions = [math.log2(v) if study.axis.log else float(v) for v in values] if fall else [0.0] * len(values)
        self.mean = 0.5 - fall * np.array(positions)[:, None]
        self.shared = self.noise(1.0, 0.5)

    def noise(self, alike, apart):
        """Return noise of each value and seed: a part that all values of a seed share, and one of each value."""
        seeds = self.study.seeds
        shape = len(self.study.values), seeds
        return 0.02 * (alike * self.random.standard_normal(seeds) + apart * self.random.standard_normal(shape))

    def per_seed(self, line, value):
        name = (None if line.measure in self._levels else line.method), line.measure
        if name not in self.errors:
            above = self.above if line.measure in self._levels else 0.0
            errors = (self.mean + above + self.shared + self.noise(0.5, 0.5)).tolist()
            self.errors[name] = dict(zip(self.study.values, errors, strict=True))
        return self.errors[name][value]


def neutral(claim):
    """Return a claim whose truth lies exactly between yes and no if nothing differs: any verdict on it is wrong."""
    changes = {"margin": None, "share": 1.0}
    return replace(claim, premises=(), **{name: v for name, v in changes.items() if hasattr(claim, name)})


@cache
def studies_of(name, preset):
    experiment = EXPERIMENTS[name]
    seeds = {"quick": 5, "standard": 10}[preset]
    return tuple(replace(study, seeds=seeds) for study in experiment.studies(preset, experiment.data[0]))


def corrected(page):
    """Return the claims with a verdict yes or no, by the rule of the package."""
    return {key: answer for key in page.outcomes if (answer := page.answer(*key)) is not None}


def uncorrected(page):
    """The same rule without Holm's correction."""
    return {k: o.yes for k, o in page.outcomes.items() if o is not None and o.p is not None and o.p <= FAMILY}


def every_interval(page):
    """Another rule: a yes if the interval lies beyond zero at every value, a no if one lies below it."""
    found = {}
    for number, claim in page.outcomes:
        results = page.page[number]
        if isinstance(claim, (Wins, WellBelow)):
            intervals = [results.advantage(*claim.compared(), value) for value in claim.values(results)]
        elif isinstance(claim, FallsAtEachStep):
            line = results.line(claim.line)
            by_value = [results.per_seed(line, value) for value in results.study.values]
            steps = pairwise(by_value)
            intervals = [Interval.of([a - b for a, b in zip(*step, strict=True)]) for step in steps]
        else:
            continue
        if all(interval.low > 0 for interval in intervals):
            found[number, claim] = True
        elif any(interval.high < 0 for interval in intervals):
            found[number, claim] = False
    return found


RULES = {"corrected": corrected, "uncorrected": uncorrected, "every interval": every_interval}


def pages(preset, count, change=lambda claim: claim, falling=False, above=0.0):
    """Yield pages: one experiment after the other, over and over."""
    random = np.random.default_rng(0)
    experiments = [studies for name in EXPERIMENTS if (studies := studies_of(name, preset))]
    for number in range(count):
        page = []
        for study in experiments[number % len(experiments)]:
            study = replace(study, claims=tuple(map(change, study.claims)))
            trends = any(isinstance(claim, (Improves, Flat)) for claim in study.claims)
            results = Simulated(study, random, above=above)
            if falling and trends:
                results = Simulated(study, random, results.negligible_fall, above)
            page.append(results)
        yield Page(page)


@pytest.mark.parametrize("preset", ["quick", "standard"])
def test_if_nothing_differs_any_verdict_is_wrong_and_few_pages_have_one(preset):
    """Every claim lies between yes and no: margins are none, and lines fall by what counts as no fall.

    The same pages by other rules have verdicts far more often: the simulation can tell.
    """
    called = dict.fromkeys(RULES, 0)
    for page in pages(preset, PAGES, neutral, falling=True):
        for name, rule in RULES.items():
            called[name] += bool(rule(page))
    shares = {name: count / PAGES for name, count in called.items()}
    assert shares["corrected"] <= MOST, shares
    assert shares["uncorrected"] > MOST, shares
    assert shares["every interval"] > MOST, shares


def wrong(claim, answer):
    """Return whether a verdict is wrong if lines neither differ nor fall."""
    if isinstance(claim, Flat):
        return not answer
    if isinstance(claim, (Improves, FallsAtEachStep, WellBelow)) or getattr(claim, "margin", None) is not None:
        return answer
    return True


def test_if_nothing_differs_few_pages_with_the_claims_as_they_are_have_a_wrong_verdict():
    """Here "it is flat" and "it does not win by far" are true, and all methods learn, as premises ask."""
    bad = verdicts = 0
    for page in pages("standard", PAGES, above=1.0):
        found = corrected(page)
        bad += any(wrong(claim, answer) for (_, claim), answer in found.items())
        verdicts += len(found)
    assert bad / PAGES <= MOST
    assert verdicts > PAGES  # of the true ones, many are found


LINES = ("hypernetwork", "embedding", "film", "biases")
OTHERS = tuple(Wins(text=f"{a} over {b}", line=a, over=b) for a in LINES[1:] for b in LINES[1:] if a < b)


@pytest.mark.parametrize("seeds", [5, 10])
@pytest.mark.parametrize("others", [(), OTHERS])
def test_a_true_effect_is_found_as_often_as_the_tests_power(seeds, others):
    """The effect is 2 standard deviations. With further claims, the power is that at Bonferroni's level."""
    claim = Wins(text="it wins")
    random = np.random.default_rng(1)
    study = study_of({name: np.zeros((seeds, 2)) for name in LINES}, measure=DISTANCE, claims=(claim, *others))
    found = 0
    for _ in range(PAGES):
        results = Simulated(study, random)
        noise = 2 + random.standard_normal(seeds)
        over = np.array([results.per_seed(results.line("embedding"), value) for value in study.values])
        own = over - noise - random.standard_normal(seeds) * [[1], [-1]]
        results.errors["hypernetwork", "error"] = dict(zip(study.values, own.tolist(), strict=True))
        found += Page([results]).answer(0, claim) is True
    level = FAMILY / (1 + len(others))
    power = stats.nct.sf(stats.t.isf(level / 2, seeds - 1), seeds - 1, 2 * math.sqrt(seeds))
    assert found / PAGES == pytest.approx(power, abs=0.045)
