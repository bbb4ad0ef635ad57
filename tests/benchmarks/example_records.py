"""Workloads, a device and records made up for the tests of the benchmarks."""

from __future__ import annotations

import dataclasses
import pathlib
import random

import pytest

with pytest.MonkeyPatch.context() as path:
    path.syspath_prepend(str(pathlib.Path(__file__).parents[2]))
    from benchmarks import devices, records, roofline, timing, workloads

Workload = workloads.Workload
TINY = Workload("tiny", 5, 1, 3, 4, 2, "made up")
POINTS = dataclasses.replace(TINY, N=3)
PRIMARY = Workload("primary", 5, 2, 3, 4, 2, "made up", hidden=6)
GRAPH = Workload("graph", 24, 1, 3, 4, 2, "made up", S=6, T=7, draw="uniform")
COMPLETE = Workload("complete", 24, 1, 3, 4, 2, "made up", S=8, T=8, draw="complete graphs")
POWER = Workload("power", 24, 1, 3, 4, 2, "made up", S=6, T=7, draw="power law")
RELATIONS = Workload("relations", 24, 1, 3, 4, 2, "made up", S=6, C=5, T=7, draw="uniform")
RAGGED = Workload("ragged", 50, 1, 3, 4, 2, "made up", C=4, draw="5 to 30 each")
PAIRS = Workload("pairs", 24, 1, 3, 4, 2, "made up", S=6, C=8, draw="all pairs")
OVER_TERMS = [GRAPH, COMPLETE, POWER, RELATIONS, RAGGED, PAIRS]
POINTWISE = Workload("pointwise", 5, 9, 3, 4, 2, "made up", kernel=1)
KERNEL = Workload("kernel", 5, 9, 3, 4, 6, "made up", kernel=3, groups=2)
DEPTHWISE = Workload("depthwise", 5, 9, 3, 4, 4, "made up", kernel=5, stride=2, groups=4)
CONVOLUTIONS = [POINTWISE, KERNEL, DEPTHWISE]
LOW_RANK = Workload("low rank", 5, 4, 3, 4, 6, "made up", rank=2)
MAPPED = [Workload("mapped", 5, N, 3, 4, 2, "made up", weight_map="abs") for N in (1, 3)]
FORMS = [TINY, POINTS, PRIMARY, LOW_RANK, *MAPPED, *CONVOLUTIONS, *OVER_TERMS]

MIB = 1 << 20
HERE = records.Context(
    device="AMD EPYC 7B13, AVX2, 32 MiB L3, 2 threads",
    kind="cpu",
    backend="cpu",
    torch="2.13.0+cpu",
    triton="",
    driver="",
    python="3.11.7",
    commit="aaaaaaa",
    date="2026-11-22",
)
GPU = dataclasses.replace(HERE, device="NVIDIA H200", kind="cuda", backend="triton", triton="3.6.0", driver="570.1")
PEERS = {
    "materialise + bmm": 1.0,
    "einsum, two": 1.4,
    "compiled einsum, one": 0.8,
    "vmap(functional_call)": 1.6,
    "F.bilinear": 3.0,
}
WORKLOADS = (
    ("synthetic depth", 200, 1, 100, 1000, 10),
    ("synthetic depth", 200, 1, 100, 10, 1),
    ("rotation mnist", 64, 1, 50, 784, 10),
    ("rotation mnist", 64, 1, 50, 10, 12),
    ("rotation cifar", 64, 1, 100, 3072, 10),
    ("qm9 mpnn", 9792, 1, 128, 64, 64),
    ("qm9 graph", 9792, 1, 128, 64, 64, 576, 0, 576),
    ("modelnet mpnn", 8192, 1, 25, 64, 64),
    ("modelnet mpnn", 8192, 1, 25, 64, 128),
    ("diffdock-like", 10000, 1, 144, 48, 48),
    ("qmix mmm2", 5760, 1, 64, 10, 32),
    ("qmix mmm2", 5760, 1, 64, 32, 1),
    ("ragged nodes", 2240, 1, 128, 64, 64, 0, 128),
    ("biaffine pairs", 131072, 1, 401, 401, 50, 2048, 2048),
    ("qmix primary", 5760, 1, 64, 27, 1, 0, 0, 0, 32),
    ("hyper policy", 256, 1, 256, 17, 256),
    ("biaffine labels", 4096, 1, 101, 101, 50),
    ("tiny batch", 32, 1, 64, 10, 32),
    ("colorization", 64, 64, 100, 42, 10),
    ("operator learning", 100, 100, 64, 20, 20),
    ("siren images", 100, 1024, 256, 2, 256),
    ("siren images", 32, 1024, 256, 256, 256),
    ("siren images", 100, 1024, 256, 256, 3),
    ("text-to-lora A", 8, 512, 512, 4096, 8),
    ("text-to-lora B", 8, 512, 512, 8, 4096),
    ("condconv 1x1", 128, 49, 4, 192, 1152),
    ("condconv 1x1", 128, 49, 8, 192, 1152),
    ("text-to-lora A and B", 8, 512, 512, 4096, 4096, 0, 0, 0, 0, 8),
    ("efficientnet pointwise", 32, 49, 4, 192, 1152, 0, 0, 0, 0, 0, 1),
    ("efficientnet depthwise 5x5 by 2", 32, 49, 4, 672, 672, 0, 0, 0, 0, 0, 5, 2, 672),
)
NAMES = ("workload", *records.SIZES)
BRIEF = timing.RoundLimits(target_seconds=0.05, min_rounds=3, max_seconds=1.0, max_rounds=5)


class Clock(devices.CPU):
    """A CPU with a tiny cache and cheap ceilings."""

    def __init__(self):
        super().__init__()
        self._cache = 1 << 12

    def ceilings(self, dtype):
        return devices._ceilings("cpu", dtype, 16, 1 << 10)


def record(**more):
    return records.Record(**{"study": "workloads", "workload": "tiny", "way": "ours", "context": HERE, **more})


def comparison(ours=1.0, again=1.0, peers=None, product=None, copy=None, memory=MIB, context=HERE, **of):
    """Return the records of one comparison: seconds of fasthyper, of fasthyper again and of the peers."""
    sizes = {"B": 100, "N": 1, "R": 64, "I": 64, "O": 64}
    of = {
        "study": "workloads",
        "workload": "made up",
        "mode": records.FORWARD_BACKWARD,
        "context": context,
        **sizes,
        **of,
    }

    def timed(way, role, seconds, **more):
        return records.Record(
            way=way, role=role, q1=seconds * 0.9, median=seconds, q3=seconds * 1.2, rounds=9, **{**of, **more}
        )

    found = [
        timed("fasthyper", "ours", ours, temporary=memory, resident=2 * memory),
        timed("fasthyper again", "again", again),
        *(timed(name, "peer", seconds, temporary=9 * memory) for name, seconds in (peers or {"best": 2.0}).items()),
    ]
    for way, rate in (("matrix product", product), ("copy", copy)):
        if rate:
            found.append(timed(way, "ceiling", 1e-3, rate=rate))
    return found


def realistic(context=HERE, seed=0):
    """Return records like those of a whole run."""
    draw = random.Random(seed)
    found = []
    for sizes in WORKLOADS:
        of = dict(zip(NAMES, sizes, strict=False))
        for dtype in ("float32", "bfloat16"):
            product = draw.gauss(150, 12) * 1e9 * (1 if dtype == "float32" else 0.6)
            copy = draw.gauss(18, 1.5) * 1e9
            for mode in records.MODES:
                like = records.Record(study="workloads", **of, dtype=dtype, mode=mode, context=context)
                seconds = roofline.flops(like) / roofline.bound(like, product, copy) / draw.uniform(0.25, 0.95) + 1e-5
                times = {name: seconds * factor * draw.uniform(1.0, 3.0) for name, factor in PEERS.items()}
                again = seconds * draw.uniform(0.93, 1.07)
                subject = comparison(
                    seconds, again, times, product, copy, context=context, **of, dtype=dtype, mode=mode
                )
                subject[-3] = dataclasses.replace(subject[-3], rounds=1, q1=None, q3=None, note="tried once")
                subject[4] = dataclasses.replace(subject[4], compile=draw.uniform(5, 20))
                missing = {"q1": None, "median": None, "q3": None, "rounds": None, "temporary": None}
                subject[5] = dataclasses.replace(subject[5], **missing, note="would keep 16 GiB")
                found += subject
    return found + scaling(context, draw) + training(context, draw)


def scaling(context, draw):
    axes = {"B": [2**i for i in range(6, 17)], "N": [4**i for i in range(7)], "R": [4, 16, 64, 256, 1024]}
    axes["width"] = [8, 16, 32, 64, 128, 256, 512]
    found = []
    for axis, points in axes.items():
        for point in points:
            of = {"workload": "qm9 mpnn", "B": 4096, "N": 1, "R": 128, "I": 64, "O": 64, "axis": axis}
            of |= {"I": point, "O": point} if axis == "width" else {axis: point}
            fold = of["B"] * of["N"] * of["R"] * of["I"] * of["O"] * 6 / 1.2e11 + 2e-5
            generate = fold / of["N"] * 1.3 + of["B"] * of["N"] * of["I"] * of["O"] * 6 / 4e10
            times = {"fasthyper, fold": fold, "fasthyper, generate": generate, "fasthyper, project": fold * 1.7}
            wrong = (axis, point) == ("N", 4)
            ours = min(times.values()) * (1.25 if wrong else draw.uniform(0.98, 1.05))
            written = of["B"] * of["I"] * of["O"] * 4 * 2
            peers = {"materialise + bmm": generate * 1.8, "einsum, one": fold * 2.2, "materialise in chunks": fold * 3}
            subject = comparison(ours, ours * 1.01, {**times, **peers}, context=context, study="scaling", **of)
            plan = "generate / generate" if generate < fold else "fold / generate" if axis == "R" else "fold / fold"
            plan = "fold / generate" if wrong else plan
            for i, record in enumerate(subject):
                more = {"role": "variant"} if record.way in times else {}
                if record.way == "fasthyper":
                    more = {"plan": plan, "temporary": min(20 * MIB, written)}
                elif record.way in ("materialise + bmm", "einsum, one"):
                    more = {"temporary": written}
                    if written > 700 * MIB:
                        more = {"q1": None, "median": None, "q3": None, "rounds": None, "temporary": None}
                        more["note"] = f"out of memory: {written >> 20} MiB"
                subject[i] = dataclasses.replace(record, **more)
            found += subject
    return found


def training(context, draw):
    found = []
    for name, scale in (("qm9 network", 0.2), ("siren picture", 0.05)):
        for way, role, speed, memory in (("fasthyper", "ours", 1, 3), ("materialised", "peer", 1.9, 310)):
            for step in range(0, 200, 5):
                loss = scale * (0.03 + 2.718 ** (-step / 40)) * draw.uniform(0.95, 1.05)
                of = {"B": 100, "R": 64, "I": 64, "O": 64, "mode": "training step", "context": context}
                seconds = 0.05 * speed * (step + 1)
                found.append(
                    records.Record(
                        study="training", workload=name, way=way, role=role, step=step, loss=loss,
                        median=seconds, temporary=memory * MIB, N=1, **of,
                    )
                )  # fmt: skip
    return found


def few(found):
    """Return a few of the records, with every kind of row."""
    kept = ("qm9 mpnn", "qm9 graph", "condconv 1x1", "siren images", "qmix primary", "qm9 network")
    kept += ("text-to-lora A and B", "efficientnet pointwise", "efficientnet depthwise 5x5 by 2")
    return [r for r in found if r.workload in kept and (r.axis in ("", "N") or r.B > 8192)]
