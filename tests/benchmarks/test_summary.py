"""The summary of the results, and the roofline."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]

with pytest.MonkeyPatch.context() as path:
    path.syspath_prepend(str(ROOT))
    path.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    from example_records import GPU, HERE, MIB, comparison, realistic

    from benchmarks import page, roofline, summary


def lines(found, dtype="float32"):
    return {line.metric: line for line in summary.summarise(found) if line.dtype == dtype}


def test_the_summary_of_a_cpu():
    work = 3 * 2 * 100 * 64 * 64 * 64
    found = [
        *comparison(1.0, 1.0, {"best": 8.0, "worse": 9.0}, product=work / 0.9, workload="a"),
        # a head of 63·64·64 < 2¹⁸ is too light for its share to count
        *comparison(1.0, 1.5, {"best": 2.0}, product=work / 0.1, R=63, workload="b"),
        *comparison(1.0, 1.0, {"best": 4.0}, product=work * 2 / 0.6, R=1024, O=8, memory=7 * MIB, workload="c"),
        *comparison(1.0, 1.0, {"best": 0.5}, R=2, workload="tiny batch"),
        *comparison(1.0, 1.0, {"best": 99.0}, S=25, T=20, product=work / 64, workload="graph"),
        *comparison(1.0, 1.0, {"best": 99.0}, hidden=32, workload="primary"),
        *comparison(1.0, 0.8, {"best": 0.25}, N=2, workload="d"),
        *comparison(1.0, 1.0, {"best": 3.0}, mode="forward", workload="a"),
    ]
    graph = next(r for r in found if r.workload == "graph")
    graph_share = roofline.flops(graph) / (work / 64)
    seen = lines(found)
    assert [(line.value, line.floor, line.held) for line in seen.values()] == [
        (pytest.approx(4.0), "≥ 2.0", True),  # of 8 and 2
        (pytest.approx(4.0), "≥ 1.6", True),  # of 8, 2 and 4
        (0.5, "≥ 0.95", False),
        (0.25, "≥ 0.9", False),
        (pytest.approx(3.0), "", None),
        (None, "", None),
        (pytest.approx(0.9), "≥ 0.8", True),
        (pytest.approx(0.6), "≥ 0.65", False),
        (7.0, "≤ 40", True),
        (14.0, "≤ 40", True),
        (pytest.approx(99.0), "", None),  # of the graph
        (pytest.approx(99.0), "", None),
        (pytest.approx(graph_share), "", None),
        (None, "≤ 1.10", None),
        (0.8, "", None),
        (1.5, "", None),
    ]
    assert seen["speed-up at N = 1, geometric mean"].where == "3 workloads"
    assert seen["noise: fasthyper measured twice, ratio, most"].where == "b, 64 → 64"


def test_convolutions_have_floors_of_their_own():
    of = {"N": 49, "kernel": 3}
    convolutions = [
        *comparison(1.0, 1.0, {"best": 2.0}, workload="a", **of),
        *comparison(1.0, 1.0, {"best": 0.5}, workload="b", **of),
    ]
    layer = comparison(1.0, 1.0, {"best": 3.0}, N=2, workload="c")
    low_rank = comparison(1.0, 1.0, {"best": 7.0}, rank=8, workload="d")
    seen = lines([*layer, *low_rank, *convolutions])
    assert seen["convolutions: speed-up, geometric mean"][2:4] == (pytest.approx(1.0), "≥ 1.3")
    assert seen["convolutions: speed-up, least"][2:4] == (0.5, "≥ 0.95")
    assert seen["speed-up at N > 1, least"].value == 3.0
    assert seen["speed-up at N = 1, geometric mean"].value is None
    assert not any(name.startswith("convolutions") for name in lines(layer))


def test_functions_of_weights_have_means_of_their_own():
    mapped = [
        *comparison(peers={"best": 2.0}, weight_map="abs"),
        *comparison(peers={"best": 8.0}, weight_map="abs", R=8),
    ]
    seen = lines([*comparison(peers={"best": 3.0}), *mapped])
    assert seen["functions of the weights: speed-up, geometric mean"].value == pytest.approx(4.0)
    assert seen["functions of the weights: speed-up, least"].value == 2.0
    assert seen["speed-up at N = 1, geometric mean"].value == pytest.approx(3.0)
    assert seen["speed-up at N = 1, least"].value == 2.0
    assert not any(name.startswith("functions") for name in lines(comparison()))


def test_some_floors_need_amx():
    plain = comparison(dtype="bfloat16")
    with_amx = comparison(dtype="bfloat16", context=dataclasses.replace(HERE, device="Xeon, AVX512 + AMX, 2 threads"))
    name = "speed-up at N = 1, geometric mean"
    assert lines(plain, "bfloat16")[name].floor == ""
    assert lines(with_amx, "bfloat16")[name][2:4] == (2.0, "≥ 2.2 (AMX)")
    assert lines(with_amx, "bfloat16")[name].held is False


def test_the_summary_of_a_gpu():
    found = [
        *comparison(1.0, 1.0, {"best": 2.0}, B=1 << 16, product=0.8 * 6 * 2.0**34, context=GPU, workload="qm9 mpnn"),
        *comparison(
            1.0, 1.0, {"best": 8.0}, B=1 << 16, O=128, product=6 * 2.0**35 / 0.8, context=GPU, workload="modelnet"
        ),
        *comparison(1.0, 1.0, {"best": 0.5}, N=2, context=GPU, workload="d"),
    ]
    seen = list(lines(found).values())
    assert [(line.value, line.floor) for line in seen[:5]] == [
        (pytest.approx(4.0), "≥ 1.7"),
        (2.0, "≥ 0.95"),
        (8.0, "≥ 4"),
        (2.0, "≥ 2"),
        (0.5, ""),
    ]
    assert [(line.value, line.floor) for line in seen[7:10]] == [
        (pytest.approx(0.8), "≥ 0.75"),
        (pytest.approx(1.25), "≥ 0.6"),
        (1.0, "≤ 64"),
    ]


def test_the_share_of_the_roofline():
    # 100·64 + 100·64 + 64·64·64 + 100·64 numbers of 4 bytes, twice; the copy allows 10 byte/s
    work, moved = 6 * 100 * 64**3, 2 * 4 * (3 * 6400 + 64**3)
    like = comparison()[0]
    assert (roofline.flops(like), roofline.compulsory_bytes(like)) == (work, moved)
    forward = dataclasses.replace(like, mode="forward", dtype="bfloat16")
    assert (roofline.flops(forward), roofline.compulsory_bytes(forward)) == (work // 3, moved // 4)
    assert roofline.bound(like, 1e3, 1e9) == 1e3
    assert roofline.bound(like, 1e9, 10.0) == pytest.approx(10 * work / moved)
    many = dataclasses.replace(like, N=100)
    assert roofline.flops(many) == work + 6 * 100 * 100 * 64**2  # the weights once, then applied to each point
    primary = dataclasses.replace(like, hidden=32, O=1)
    assert roofline.flops(primary) == 6 * 100 * 64 * (64 * 32 + 32)
    # 1,000 terms: 64³ for each of 100 conditions, 80 sources or 60 targets, and 64² for each term
    over_terms = dataclasses.replace(like, B=1000)
    for rows in ({"C": 100}, {"C": 900, "S": 100}, {"C": 900, "S": 800, "T": 100}):
        of = dataclasses.replace(over_terms, **rows)
        assert roofline.flops(of) == 6 * (100 * 64**3 + 1000 * 64 * 64)
    numbers = 800 * 64 + 900 * 64 + 100 * 64 + 64**3
    assert roofline.compulsory_bytes(of) == 2 * 4 * numbers
    narrow = {"S": 100, "C": 100, "T": 100, "R": 32, "I": 16, "O": 8}  # conditions are rows: 16 · 8 for each term
    assert roofline.flops(dataclasses.replace(over_terms, **narrow)) == 6 * (100 * 32 * 16 * 8 + 1000 * 16 * 8)
    for rows, I, O in (({"T": 100}, 8, 16), ({"S": 100}, 16, 8)):  # R times the lesser of I and O for each term
        of = dataclasses.replace(over_terms, R=32, I=I, O=O, **rows)
        assert roofline.flops(of) == 6 * (100 * 32 * 16 * 8 + 1000 * 32 * 8)
    # a convolution: 32 · 9 in features of each of 100 pixels, of an image of 400; 100 kernels, then applied to pixels
    kernel = dataclasses.replace(like, N=100, I=64, O=64, kernel=3, stride=2, groups=2)
    assert roofline.flops(kernel) == 6 * 100 * (64 * 32 * 9 * 64 + 100 * 32 * 9 * 64)
    numbers = 100 * (400 * 64 + 100 * 64 + 64) + 64 * 32 * 9 * 64
    assert roofline.compulsory_bytes(kernel) == 2 * 4 * numbers
    mapped = dataclasses.replace(like, N=1, weight_map="abs")  # W is needed, then 64 · 64 numbers meet one point
    assert roofline.flops(mapped) == 6 * 100 * (mapped.R + 1) * 64 * 64
    few_experts = dataclasses.replace(kernel, N=1, R=2)
    assert roofline.flops(few_experts) == 6 * 100 * 2 * 32 * 9 * 64
    low_rank = dataclasses.replace(like, N=100, rank=8)
    assert roofline.flops(low_rank) == 6 * 100 * (64 + 100) * 2 * 8 * 64
    assert roofline.compulsory_bytes(low_rank) == 2 * 4 * (100 * (2 * 100 * 64 + 64) + 2 * 64 * 8 * 64)
    few = dataclasses.replace(over_terms, B=100, S=100, C=100, T=100)
    assert roofline.flops(few) == 6 * 100 * 64**3  # each term a row: no product of terms
    assert "| 1.00 | 0.50 | 1.0 |" in page.markdown(comparison(product=2 * work, copy=1e15))
    others = [
        *comparison(),
        *comparison(product=4 * work, copy=1e15, workload="other"),
    ]  # without ceilings: those of the file
    assert "| made up | 100 | 1 | 64 | 64 → 64 | 1,000 (900–1,200) | 2,000 (best) | 2.00 | 1.00 | 0.25 |" in (
        page.markdown(others)
    )


def test_the_planner_s_choice_is_compared_with_the_best_schedule():
    found = [r for r in realistic() if r.study == "scaling"]
    text = page.markdown(found)
    assert (
        "took more than 1.10 times the best schedule at 1 of 30 points:\n\n- qm9 mpnn, 64 → 64, N = 4 along N" in text
    )
    assert "float32: 1.25 times fasthyper, generate; noise 1.01\n" in text
    assert "| generate | **1.25** | 1.01 |" in text
    line = lines(found)["planner's choice over the best schedule, most"]
    assert (line.value, line.where, line.held) == (pytest.approx(1.25), "qm9 mpnn, 64 → 64, N = 4", False)
    assert "\n| 16,384 | fold / fold |" in text
    right = [r for r in found if (r.axis, r.N) != ("N", 4)]
    assert "at 0 of 29 points." in page.markdown(right)
    one = [dataclasses.replace(r, plan="generate") if r.plan == "fold / generate" and r.N == 4 else r for r in found]
    assert "at 0 of 30 points." in page.markdown(one)  # the planner chose one schedule: compares its forced run
