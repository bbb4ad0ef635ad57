"""The outcome of a comparison in words: which method has the least error at equal totals, and by how much."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from fasthyper.experiments.claims import Wins
from fasthyper.experiments.drawing import rounded
from fasthyper.experiments.experiment import MEASURED, PAPER, Finding, value_text
from fasthyper.experiments.figures import short_name
from fasthyper.experiments.methods import EMBEDDING, HYPERNETWORK, METHODS
from fasthyper.experiments.results import Interval, Results
from fasthyper.experiments.standing import Standing, at_equal_totals, frontiers, with_sgd
from fasthyper.experiments.summary import Summary

_NAMED = ("fasthyper", "torch")
_FEW = 4
"""Claims that the outcome can name one by one."""

_SHORT = 20
"""Letters of the name of a measure that a sentence can take."""


def outcome(summary: Summary) -> list[str]:
    """Return the outcome in sentences: at equal totals in each frontier, then on the claims."""
    found = list(frontiers(summary))
    sentences = [_at_equal_totals(results, named=len(found) > 1) for results in found]
    sentences = sentences or _least_of_all(summary) or list(map(_least_over_names, _over_names(summary)))
    return [*sentences, *_with_sgd(summary), *_on_the_paper(summary)]


def certainty(summary: Summary) -> str:
    """Return how sure the outcome is, and how it was made."""
    parts = []
    if found := list(frontiers(summary)):
        parts.append("In brackets: 95 % intervals, corrected for the number of methods. “Clearly”: they exclude 1")
    elif any(_over_names(summary)):
        parts.append("“Clearly”: the 95 % interval of the difference excludes 0, corrected for all pairs of a figure")
    if any(results.study.tuning is not None for results in found):
        edges = sum(rate.at_edge for rate in summary.rates)
        at_edge = f"; {edges} of {len(summary.rates)} are at the edge of their grid" if edges else ""
        parts.append(f"Learning rates are tuned for each method{at_edge}")
    return ". ".join([*parts, f"Made with {made_with([summary])}."])


def made_with(summaries: Sequence[Summary]) -> str:
    """Return preset, seeds, device, versions and date of comparisons."""
    presets = _unique(summary.comparison.preset for summary in summaries)
    seeds = sorted({results.study.seeds for summary in summaries for results in summary.results})
    versions = [made for summary in summaries for made in summary.versions]
    devices = _unique(made.get("device", "") for made in versions) or _unique(
        summary.comparison.device for summary in summaries
    )
    count = " or ".join(map(str, seeds))
    return ", ".join(
        [
            f"preset {listed(presets)}",
            f"{count} seed{'' if seeds == [1] else 's'}",
            listed(devices),
            *(f"{name} {version}" for name in _NAMED for version in _unique(made.get(name, "") for made in versions)),
            *_unique([max(summary.date for summary in summaries)]),
        ]
    )


def _unique(words: Iterable[str]) -> list[str]:
    """Return those that are not empty, each once."""
    return [word for word in dict.fromkeys(words) if word]


def times(ratio: Interval, of: str) -> str:
    """Return a ratio with its interval in words.

    Example:
        >>> times(Interval(1.894, 1.73, 2.08), "it"), times(Interval(math.nan, 0.0, math.inf), "it")
        ('1.9 times it (1.7 to 2.1)', 'an unknown number of times it')
    """
    if math.isnan(ratio.mean):
        return f"an unknown number of times {of}"
    interval = "" if math.isinf(ratio.high) else f" ({rounded(ratio.low)} to {rounded(ratio.high)})"
    return f"{rounded(ratio.mean)} times {of}{interval}"


def name(method: str) -> str:
    """Return the name of a method within a sentence.

    Example:
        >>> name("hypernetwork"), name("film_wide"), name("plain_wide")
        ('the hypernetwork', 'FiLM (wide q)', 'one wide network')
    """
    words, _, part = short_name(METHODS[method].label).partition(", ")
    if part == "wide":
        return words.replace("one ", "one wide ")
    return ("the " if method == HYPERNETWORK else "") + words + (f" ({part})" if part else "")


def listed(words: Sequence[str]) -> str:
    """Return words as a list in a sentence.

    Example:
        >>> listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])
        ('a', 'a and b', 'a, b and c')
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def error_text(results: Results, error: float) -> str:
    """Return an error in the displayed unit."""
    measure = results.study.measure
    return f"{measure.displayed(error):.1f} %" if measure.percent else rounded(error)


def verdict_on_primaries(summary: Summary) -> list[Finding]:
    """Return the findings on Galanti and Wolf's claim that the hypernetwork wins over an embedding with a larger q."""
    return [
        finding
        for results in summary.results
        for claim in results.study.claims
        if isinstance(claim, Wins) and (claim.line, claim.over) == (HYPERNETWORK, EMBEDDING)
        if claim.whose == PAPER
        for study, finding in summary.findings
        if study is results.study and finding.claim == claim.text
    ]


def counted_verdicts(findings: Sequence[Finding]) -> str:
    """Return how many findings have each verdict, such as "reproduced in 2 of 3 studies"."""
    found = Counter(finding.verdict for finding in findings)
    if len(found) == 1:
        return next(iter(found)) + (f" in all of {len(findings)} tests" if len(findings) > 1 else "")
    return listed([f"{verdict} in {count}" for verdict, count in found.items()]) + f" of {len(findings)} tests"


def _at_equal_totals(results: Results, named: bool) -> str:
    standing = at_equal_totals(results)
    study, rows = results.study, standing.rows
    total = rows.get(HYPERNETWORK, rows[standing.best[0]]).trainable_parameters
    size = "" if standing.value == 1 else f" ({standing.value:g} times the reference total)"
    lead = f"{study.title}. " if named else ""
    return f"{lead}With about {rounded(total)} trained parameters each{size}, {_compared(standing)}"


def _compared(standing: Standing) -> str:
    results, rows = standing.results, standing.rows
    study, (first, *tied) = results.study, standing.best
    label = study.measure.label if len(study.measure.label) <= _SHORT else "error"
    parts = [f"{name(first)} has the least {label}, {error_text(results, rows[first].measured.mean)}"]
    if tied:
        parts.append(f"Not clearly worse: {listed([name(m) for m in tied])}")
    rest = [m for m in rows if m not in standing.best]
    if HYPERNETWORK in rows and first != HYPERNETWORK:
        parts.append(f"The hypernetwork has {times(standing.ratio(HYPERNETWORK, first), 'its error')}")
    elif rest:
        parts.append(f"Next: {name(rest[0])}, with {times(standing.ratio(rest[0], first), 'its error')}")
    if standing.diverged:
        parts.append(f"All runs of {listed([name(m) for m in standing.diverged])} diverged")
    if some := [f"{row.diverged} of {name(method)}" for method, row in rows.items() if row.diverged]:
        parts.append(f"Of {study.seeds} runs each, {listed(some)} diverged")
    if standing.unlearned:
        parts.append(f"No method clearly errs less than {standing.unlearned}: their order says little")
    return ". ".join(parts) + "."


def _with_sgd(summary: Summary) -> list[str]:
    found = list(with_sgd(summary))
    if len(found) == 1:
        return [f"With SGD, {_compared(found[0])}"]
    return [counted_with_sgd(found)] if found else []


def counted_with_sgd(found: Sequence[Standing]) -> str:
    """Return in how many tasks the hypernetwork has the least error with SGD."""
    learned = [standing for standing in found if not standing.unlearned]
    alone = sum(standing.best == (HYPERNETWORK,) for standing in learned)
    among = sum(HYPERNETWORK in standing.best for standing in learned)
    counts = (("could have it", among - alone), ("is behind", len(learned) - among))
    parts = [f"clearly has the least error in {alone} of {len(found)} task{'' if len(found) == 1 else 's'}"]
    parts += [f"{words} in {count}" for words, count in counts if count]
    unlearned = f"; no method clearly learns in {len(found) - len(learned)}" if len(found) > len(learned) else ""
    return f"With SGD, among the main methods, the hypernetwork {listed(parts)}{unlearned}."


def _least_of_all(summary: Summary) -> list[str]:
    """Return which method has the least error in the first study that compares several, at which value."""
    for results in summary.results:
        study = results.study
        rows = [r for r in results.rows() if not r.line.dashed and r.line.measure == study.measure.name]
        rows = [row for row in rows if math.isfinite(row.measured.mean)]
        if len({row.line.method for row in rows}) > 1:
            row = min(rows, key=lambda row: row.measured.mean)
            where = f"{study.axis.field.replace('_', ' ')} {value_text(row.value)}"
            error = error_text(results, row.measured.mean)
            return [f"{study.title}: {name(row.line.method)} has the least {study.measure.label}, {error}, at {where}."]
    return []


def _over_names(summary: Summary) -> Iterator[Results]:
    """Yield each study of one method over names, such as initialisations. One with claims asks something else."""
    for results in summary.results:
        study = results.study
        names = all(isinstance(value, str) for value in study.values)
        if names and len(study.values) > 1 and len(study.methods) == 1 and not study.claims:
            yield results


def _least_over_names(results: Results) -> str:
    """Return at which value the error is least, at which it is clearly more, and where runs diverged.

    Values of which all runs finished come first: an error without the runs that diverged is too good.
    """
    study, line = results.study, results.study.all_lines()[0]
    errors = {value: results.measured(line, value).mean for value in study.values}
    lost = {value: results.diverged(line, value) for value in study.values}
    found = [value for value in study.values if math.isfinite(errors[value])]
    parts = []
    if found:
        least, *others = sorted(found, key=lambda value: (lost[value] > 0, errors[value]))
        pairs = math.comb(len(study.values), 2)
        clear = [v for v in others if not lost[least] and results.rise(line.key, least, v, family=pairs).low > 0]
        parts.append(f"the {study.measure.label} is least with {_plain(least)}, {error_text(results, errors[least])}")
        unclear = [value for value in others if value not in clear]
        for words, values in (("Clearly more", clear), ("Not clearly more", unclear)):
            if values:
                parts.append(f"{words}: {listed([_plain(v) for v in values])}")
    if some := [f"{count} with {_plain(value)}" for value, count in lost.items() if count]:
        parts.append(f"Of {study.seeds} runs each, {listed(some)} diverged")
    return f"{study.title}: {'. '.join(parts)}."


def _plain(value: str) -> str:
    return value.replace("_", " ")


def _on_the_paper(summary: Summary) -> list[str]:
    sentences = []
    standings = [at_equal_totals(results) for results in frontiers(summary)]
    signs = [s.sign(m) for s in standings if HYPERNETWORK in s.rows for m in s.rows if m != HYPERNETWORK]
    if signs:
        one = len(standings) == 1
        words = ("clearly better than", "clearly worse than", "not told apart from")
        if not one:
            words = ("clearly better in", "clearly worse in", "not told apart in")
        numbers = zip(words, map(signs.count, (1, -1, 0)), strict=True)
        others = "other methods with as many parameters" if one else f"comparisons, over {len(standings)} tasks"
        found = listed([f"{word} {count}" for word, count in numbers if count])
        sentences.append(f"The hypernetwork is {found} of {len(signs)} {others}.")
    primaries = verdict_on_primaries(summary)
    if primaries:
        sentences.append(
            "The paper's claim: the hypernetwork errs less than the embedding method, though its network of x is"
            f" smaller{_primaries(summary)}. Verdict: {counted_verdicts(primaries)}."
        )
    if not sentences:
        judged = [(study, f) for study, f in summary.findings if f.verdict != MEASURED]
        texts = [finding.claim for _, finding in judged]
        if len(judged) <= _FEW:
            leads = [f"{study.title}. " if texts.count(f.claim) > 1 else "" for study, f in judged]
            sentences += [f"{lead}{f.claim}: {f.verdict}." for lead, (_, f) in zip(leads, judged, strict=True)]
        else:
            counts = Counter(finding.verdict for _, finding in judged)
            verdicts = listed([f"{count} {verdict}" for verdict, count in counts.items()])
            sentences.append(f"Of {len(judged)} claims: {verdicts}.")
    return sentences


def _primaries(summary: Summary) -> str:
    """Return the sizes of g and q in the studies that have both, if that of g is the same in all."""
    sizes: dict[str, set[int]] = {HYPERNETWORK: set(), EMBEDDING: set()}
    for results in summary.results:
        if sizes.keys() <= set(results.study.methods):
            for row in results.rows():
                if row.line.method in sizes and not row.line.dashed:
                    sizes[row.line.method].add(row.primary_parameters)
    own, other = sizes.values()
    if len(own) != 1:
        return ""
    return f" ({min(own):,} weights against {' to '.join(f'{n:,}' for n in sorted({min(other), max(other)}))})"
