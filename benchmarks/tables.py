"""Markdown tables and the numbers in them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .records import Record

MIB = 1 << 20


def table(columns: list[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, its first column aligned to the left, the others to the right."""
    lines = (columns, ["---", *["--:"] * (len(columns) - 1)], *rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def digits(value: float) -> str:
    """Three significant digits, more where there are more before the point."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def ms(seconds: float | None) -> str:
    """Seconds as milliseconds; nothing of None, as of all below."""
    return "" if seconds is None else digits(1e3 * seconds)


def spread(record: Record) -> str:
    """The median in milliseconds, and the quartiles where there are some."""
    quartiles = "" if record.q1 is None or record.q3 is None else f" ({ms(record.q1)}–{ms(record.q3)})"
    return f"{ms(record.median)}{quartiles}"


def mib(size: float | None) -> str:
    """Bytes as MiB."""
    return "" if size is None else f"{size / MIB:,.1f}"


def ratio(value: float | None) -> str:
    """A ratio with two decimals."""
    return "" if value is None else f"{value:.2f}"


def time_of(record: Record | None) -> str:
    """Milliseconds; in parentheses where it was tried once; the note where there are none."""
    if record is None:
        return ""
    if record.median is None:
        return record.note
    return f"({ms(record.median)})" if record.rounds == 1 else ms(record.median)
