"""What a problem takes at least, and what a machine with these ceilings could do of it."""

from __future__ import annotations

from .records import FORWARD, Record

SIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def pairs(record: Record) -> list[tuple[int, int]]:
    """In and out features of each layer that is generated."""
    if record.hidden:
        return [(record.I, record.hidden), (record.hidden, record.O)]
    return [(record.I, record.O)]


def flops(record: Record) -> int:
    """Of the cheapest order of contraction: a product forward, and two of the same size backward."""
    total, neighbours = 0, record.neighbours
    for I, O in pairs(record):
        points, head = record.B * record.N, record.R * I * O
        fold = points * head
        generate = record.B * head + points * I * O
        project = points // neighbours * head + points * record.R * O
        total += 2 * min(fold, generate, project)
        neighbours = 1  # what the first layer gives is each instance's own
    return total if record.mode == FORWARD else 3 * total


def compulsory_bytes(record: Record) -> int:
    """Of x, z, the head and y, each moved once; of their gradients too, unless it is forward alone."""
    points = record.B * record.N
    head = sum(record.R * I * O for I, O in pairs(record))
    numbers = points // record.neighbours * (record.I + record.O) + record.B * record.R + head
    return numbers * SIZE[record.dtype] * (1 if record.mode == FORWARD else 2)


def intensity(record: Record) -> float:
    """Flops for each byte."""
    return flops(record) / compulsory_bytes(record)


def bound(record: Record, product_rate: float, copy_rate: float) -> float:
    """The flop/s that are attainable: at most the matrix product's, and no more than the bytes allow."""
    return min(product_rate, intensity(record) * copy_rate)
