from __future__ import annotations

import io

from made_up import JITTER, pair, summary_of
from rich.console import Console

from fasthyper.experiments.claims import Improves, Wins
from fasthyper.experiments.command import _print_summary

HYPER, EMBED = JITTER * [1, 2] + [0.2, 0.1], JITTER * [1, 1] + 0.5


def test_verdicts_are_a_table_with_a_line_for_each_claim(tmp_path):
    long = "The hypernetwork wins " + "in every way that one can think of, " * 5
    claims = (Wins(text=long, short="It wins"), Improves(text=long, line="embedding"))
    summary = summary_of(pair(HYPER, EMBED), claims=claims)
    console = Console(file=io.StringIO(), width=80)
    _print_summary(console, summary, tmp_path)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    start = next(n for n, line in enumerate(lines) if line.split() == ["verdict", "p", "study", "claim"])
    assert lines[start + 1].split() == ["✓", "reproduced", "<", "0.001", "made-up", "It", "wins"]
    assert lines[start + 2].startswith("✗ not reproduced")
    assert lines[start + 2].endswith("…")
    assert len(lines[start + 2]) <= 80
    assert lines[start + 3].startswith("Report: ")


def test_without_claims_there_is_no_table_of_verdicts(tmp_path):
    console = Console(file=io.StringIO(), width=80)
    _print_summary(console, summary_of(pair(HYPER, EMBED)), tmp_path)
    assert "verdict" not in console.file.getvalue()
