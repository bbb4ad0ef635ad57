"""The least flops and bytes of a problem, and the flop/s that a machine's ceilings allow for it."""

from __future__ import annotations

from typing import Any

from .records import FORWARD, Record

SIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def features(of: Any) -> list[tuple[int, int]]:
    """Return in and out features of each generated layer, of a record or a workload.

    An output pixel of a convolution has the channels of a group at each tap as its in features.
    """
    if between := of.hidden or of.rank:
        return [(of.I, between), (between, of.O)]
    return [(of.I // of.groups * max(1, of.kernel**2), of.O)]


def flops(record: Record) -> int:
    """Return the flops of the cheapest schedule: one contraction forward, and two of the same size backward."""
    return contraction_flops(record) * (1 if record.mode == FORWARD else 3)


def contraction_flops(of: Any) -> int:
    """Return the flops of one contraction of a record or a workload by the cheapest schedule.

    A schedule multiplies by the head once for each of its rows: points of all terms, sources, conditions or targets.
    Unless its rows are the points themselves, it multiplies the other two factors of each point, too. With a
    function of W, its rows are the conditions.
    """
    (S, C, T), N, R, total = rows(of), of.N, of.R, 0
    points = of.B * N
    for I, O in features(of):
        head = R * I * O
        fold, generate = points * head, C * head + points * I * O
        project, aggregate = S * N * head + points * R * O, T * N * head + points * R * I
        total += 2 * (generate if of.weight_map else min(fold, generate, project, aggregate))
    return total


def rows(of: Any) -> tuple[int, int, int]:
    """Return the rows of x, z and y, of a record or a workload."""
    return of.S or of.B, of.C or of.B, of.T or of.B


def compulsory_bytes(record: Record) -> int:
    """Return the bytes of x, z, the head and y, each moved once; with backward, also those of their gradients."""
    S, C, T = rows(record)
    head = sum(record.R * I * O for I, O in features(record))
    inputs = record.N * record.stride**2  # pixels of the image
    numbers = S * inputs * record.I + T * record.N * record.O + C * record.R + head
    return numbers * SIZE[record.dtype] * (1 if record.mode == FORWARD else 2)


def intensity(record: Record) -> float:
    """Return flops per compulsory byte."""
    return flops(record) / compulsory_bytes(record)


def bound(record: Record, product_rate: float, copy_rate: float) -> float:
    """Return the attainable flop/s: the lesser of the matrix product's rate and the copy's rate times intensity."""
    return min(product_rate, intensity(record) * copy_rate)
