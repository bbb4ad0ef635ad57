"""The least flops and bytes of a problem, and the flop/s that a machine's ceilings allow for it."""

from __future__ import annotations

from .records import FORWARD, Record

SIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def features(record: Record) -> list[tuple[int, int]]:
    """Return in and out features of each generated layer."""
    if record.hidden:
        return [(record.I, record.hidden), (record.hidden, record.O)]
    return [(record.I, record.O)]


def flops(record: Record) -> int:
    """Return the flops of the cheapest schedule: one contraction forward, and two of the same size backward.

    A schedule multiplies by the head once for each of its rows: points of all terms, sources, conditions or targets.
    Unless its rows are the points themselves, it multiplies the other two factors of each point, too.
    """
    (S, C, T), N, R, total = rows(record), record.N, record.R, 0
    points = record.B * N
    for I, O in features(record):
        head = R * I * O
        fold, generate = points * head, C * head + points * I * O
        project, aggregate = S * N * head + points * R * O, T * N * head + points * R * I
        total += 2 * min(fold, generate, project, aggregate)
    return total if record.mode == FORWARD else 3 * total


def rows(record: Record) -> tuple[int, int, int]:
    """Return the rows of x, z and y."""
    return record.S or record.B, record.C or record.B, record.T or record.B


def compulsory_bytes(record: Record) -> int:
    """Return the bytes of x, z, the head and y, each moved once; with backward, also those of their gradients."""
    S, C, T = rows(record)
    head = sum(record.R * I * O for I, O in features(record))
    numbers = record.N * (S * record.I + T * record.O) + C * record.R + head
    return numbers * SIZE[record.dtype] * (1 if record.mode == FORWARD else 2)


def intensity(record: Record) -> float:
    """Return flops per compulsory byte."""
    return flops(record) / compulsory_bytes(record)


def bound(record: Record, product_rate: float, copy_rate: float) -> float:
    """Return the attainable flop/s: the lesser of the matrix product's rate and the copy's rate times intensity."""
    return min(product_rate, intensity(record) * copy_rate)
