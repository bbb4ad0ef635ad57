"""Numbers as text, and Markdown tables. A missing number becomes an empty cell."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .records import Record

MIB = 1 << 20


def table(columns: list[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table, with the first column aligned left and the others right."""
    lines = (columns, ["---", *["--:"] * (len(columns) - 1)], *rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def digits(value: float) -> str:
    """Return three significant digits, or all digits before the point if there are more."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def ms(seconds: float | None) -> str:
    """Return seconds as milliseconds."""
    return "" if seconds is None else digits(1e3 * seconds)


def ms_with_quartiles(record: Record) -> str:
    """Return the median in milliseconds, with the quartiles if there are any."""
    quartiles = "" if record.q1 is None or record.q3 is None else f" ({ms(record.q1)}–{ms(record.q3)})"
    return f"{ms(record.median)}{quartiles}"


def ms_or_note(record: Record | None) -> str:
    """Return the median in milliseconds, in parentheses if the way was tried once; without a median, the note."""
    if record is None:
        return ""
    if record.median is None:
        return record.note
    return f"({ms(record.median)})" if record.rounds == 1 else ms(record.median)


def mib(size: float | None) -> str:
    """Return bytes as MiB."""
    return "" if size is None else f"{size / MIB:,.1f}"


def ratio(value: float | None) -> str:
    """Return a ratio with two decimals."""
    return "" if value is None else f"{value:.2f}"
