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
    """Return the flops of the cheapest schedule: one contraction forward, and two of the same size backward."""
    total, neighbours = 0, record.neighbours
    for I, O in features(record):
        points, head = record.B * record.N, record.R * I * O
        fold = points * head
        generate = record.B * head + points * I * O
        project = points // neighbours * head + points * record.R * O
        total += 2 * min(fold, generate, project)
        neighbours = 1  # instances share the x of the first layer only
    return total if record.mode == FORWARD else 3 * total


def compulsory_bytes(record: Record) -> int:
    """Return the bytes of x, z, the head and y, each moved once; with backward, also those of their gradients."""
    points = record.B * record.N
    head = sum(record.R * I * O for I, O in features(record))
    numbers = points // record.neighbours * (record.I + record.O) + record.B * record.R + head
    return numbers * SIZE[record.dtype] * (1 if record.mode == FORWARD else 2)


def intensity(record: Record) -> float:
    """Return flops per compulsory byte."""
    return flops(record) / compulsory_bytes(record)


def bound(record: Record, product_rate: float, copy_rate: float) -> float:
    """Return the attainable flop/s: the lesser of the matrix product's rate and the copy's rate times intensity."""
    return min(product_rate, intensity(record) * copy_rate)
