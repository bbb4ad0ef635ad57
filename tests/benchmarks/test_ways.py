"""Every way computes the defining sum, and the check of results finds wrong ones."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[2]

with pytest.MonkeyPatch.context() as path:
    path.syspath_prepend(str(ROOT))
    path.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    from example_records import (
        COMPLETE,
        CONVOLUTIONS,
        DEPTHWISE,
        FORMS,
        GRAPH,
        LOW_RANK,
        MAPPED,
        OVER_TERMS,
        PAIRS,
        POWER,
        RAGGED,
        TINY,
        Workload,
    )

    from benchmarks import conv_ways, inputs, mapped_ways, records, steps, studies, term_ways, terms, ways, workloads


def all_ways(w, dtype=torch.float64):
    return [*ways.ours(w, "cpu"), *ways.peers(w, dtype, "cpu")]


def cases():
    for w in FORMS:
        for peer in all_ways(w):
            marks = [pytest.mark.slow] if peer.compiled else []
            yield pytest.param(w, peer, marks=marks, id=f"{w.name}{w.N}-{peer.name}")


@pytest.mark.parametrize(("w", "peer"), list(cases()))
@pytest.mark.parametrize("mode", records.MODES)
def test_every_way_computes_the_definition(w, peer, mode):
    if why := peer.reason_to_skip(w, torch.float64, 1 << 30):
        pytest.skip(why)
    dtype = torch.float32 if "grouped_mm" in peer.name else torch.float64  # it has no float64
    if dtype == torch.float32:
        w = dataclasses.replace(w, I=8, O=8)  # it needs rows of 16 bytes
    first = inputs.inputs(w, dtype)
    run = steps.step(peer.function(w), mode, inputs.Sets([first]), peer.layout)
    results = run()
    truth = steps.step(steps.definition(w, "cpu"), mode, inputs.Sets([first]))()
    steps.Truth(w, mode, first).check(peer.name, results, peer.layout)
    for got, expected in zip(results, truth, strict=True):
        if mode != records.FORWARD and got is results[-1] and peer.layout != steps.DEFAULT:
            expected = expected.permute(peer.layout)
        close = {} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-3}
        torch.testing.assert_close(got, expected, **close)


@pytest.mark.parametrize("w", FORMS, ids=lambda w: f"{w.name}{w.N}")
def test_the_definition_is_the_sum_instance_by_instance(w):
    given = inputs.inputs(w, torch.float64)

    def layer(x, z, head):
        H, bias, base, base_bias = head if len(head) == 4 else (*head, None, None, None)
        W = (H @ z).abs() if w.weight_map == "abs" else H @ z
        y = x @ W.T
        return y if bias is None else y + x @ base.T + bias @ z + base_bias

    if w.kernel:
        y = torch.stack([convolution(w, x, given.head[0] @ z) for x, z in zip(given.x, given.z, strict=True)])
    elif w.draw:
        x, z = given.x.view(-1, w.I), given.z.view(-1, w.R)
        y = torch.zeros(w.T or w.B, w.O, dtype=torch.float64)
        for e in range(w.B):
            s, c, t = (e if index is None else int(index[e]) for index in terms.indices(w))
            y[t] += layer(x[s], z[c], given.head)
        y = y.view(given.g.shape)
    else:
        rows = []
        for x, z in zip(given.x, given.z, strict=True):
            x = torch.relu(layer(x, z, given.head[:4])) if w.hidden else x
            x = layer(x, z, given.head[:1]) if w.rank else x
            rows.append(layer(x, z, given.head[4:] if w.hidden else given.head[-1:]))
        y = torch.stack(rows)
    torch.testing.assert_close(steps.definition(w, "cpu")(*given.leaves), y)


def convolution(w, x, W):
    """Sum over the taps of each output pixel."""
    padded = torch.nn.functional.pad(x, [w.kernel // 2] * 4)
    side = w.side // w.stride
    y = torch.zeros(w.O, side, side, dtype=x.dtype)
    for o, c, u, v, i, j in itertools.product(*map(range, (*W.shape, side, side))):
        channel = o // (w.O // w.groups) * (w.I // w.groups) + c
        y[o, i, j] += W[o, c, u, v] * padded[channel, i * w.stride + u, j * w.stride + v]
    return y


@pytest.mark.parametrize("wrong", range(4))
def test_a_wrong_result_is_found(wrong):
    first = inputs.inputs(TINY, torch.float32)
    truth = steps.Truth(TINY, records.FORWARD_BACKWARD, first)
    results = list(steps.step(ways.materialised, records.FORWARD_BACKWARD, inputs.Sets([first]))())
    truth.check("right", results)
    results[wrong] = results[wrong] * 1.01
    name = ("y", "dx", "dz", "the head's gradient")[wrong]
    with pytest.raises(AssertionError, match=rf"wrong: {name} is off by 0\.01"):
        truth.check("wrong", results)
    results[wrong] = results[wrong].unsqueeze(0)
    with pytest.raises(AssertionError, match="off by inf"):
        truth.check("wrong shape", results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_missing_feature_is_found(dtype):
    w = workloads.Workload("wide", 8, 1, 128, 16, 16, "made up")
    first = inputs.inputs(w, dtype)
    truth = steps.Truth(w, records.FORWARD, first)
    x, z, H = first.leaves
    truth.check("whole", [ways.materialised(x, z, H)])
    with pytest.raises(AssertionError, match="y is off"):
        truth.check("without", [ways.materialised(x, z[:, :-1], H[..., :-1].contiguous())])


def test_large_results_are_checked_in_part(monkeypatch):
    monkeypatch.setattr(steps.Truth, "MAX_BYTES", 8 * TINY.I * TINY.O * 2)
    first = inputs.inputs(TINY, torch.float32)
    truth = steps.Truth(TINY, records.FORWARD_BACKWARD, first)
    y, dx, dz, dH = steps.step(ways.materialised, records.FORWARD_BACKWARD, inputs.Sets([first]))()
    truth.check("right", [y, dx, dz, dH])
    with pytest.raises(AssertionError, match="y is off"):
        truth.check("wrong", [y + 1, dx, dz, dH])
    with pytest.raises(AssertionError, match="head's gradient is off"):
        truth.check("wrong", [y, dx, dz, 2 * dH])


def test_a_training_step_trains():
    sets = inputs.Sets(inputs.inputs(dataclasses.replace(TINY, B=64), torch.float32, seed=k) for k in range(2))
    train = steps.step(ways.fused, records.TRAINING_STEP, sets)
    losses = [train()[0].item() for _ in range(400)]
    assert losses[0] != losses[1]  # another set
    assert losses[-2] < 0.95 * losses[0]
    assert losses[-1] < 0.95 * losses[1]


def test_sets_fill_the_cache_twice_and_are_taken_in_turns():
    sets = inputs.rotated(TINY, torch.float32, 1 << 14)
    size = sum(t.nbytes for t in (*sets[0].leaves, sets[0].g))
    assert len(sets) * size >= 2 << 14
    assert (len(sets) - 1) * size < 2 << 14
    calls = [steps.step(function, records.FORWARD, sets) for function in (ways.materialised, ways.fused)]
    for turn, one in enumerate((*sets, sets[0])):  # every call takes the next set
        torch.testing.assert_close(calls[turn % 2]()[0], ways.materialised(*one.leaves))
    sets.rewind()
    torch.testing.assert_close(calls[0]()[0], ways.materialised(*sets[0].leaves))
    assert len(inputs.rotated(TINY, torch.float32, 0)) == 1


def test_ways_that_take_each_term_alone_are_skipped_if_that_is_much_more_work():
    few = dataclasses.replace(RAGGED, R=64, I=64, O=64)  # 50 · 64³ for each term alone, 4 · 64³ + 50 · 64² together
    each = next(p for p in ways.peers(few, torch.float32, "cpu") if p.each)
    assert each.reason_to_skip(few, torch.float32, 1 << 40) is None  # 10 times
    many = dataclasses.replace(few, B=5000)
    assert each.reason_to_skip(many, torch.float32, 1 << 40) == "61 times the work"
    assert [way.name for way in ways.ours(GRAPH, "cpu")][2:] == ["fasthyper, project", "fasthyper, aggregate"]


def test_a_complete_graph_has_every_edge_once():
    source, cond, target = terms.indices(COMPLETE)
    assert cond is None
    assert source.tolist() == sorted(source.tolist())
    edges = {(s, t) for s in range(8) for t in range(8) if s // 4 == t // 4 and s != t}
    assert len(source) == len(edges) == 24
    assert set(zip(source.tolist(), target.tolist(), strict=True)) == edges


def test_drawn_indices():
    source, cond, target = terms.indices(GRAPH)
    assert cond is None
    assert target.tolist() != sorted(target.tolist())
    counts = terms.indices(dataclasses.replace(POWER, B=4000, T=100)).target.bincount()
    assert counts[:10].sum() > 3 * counts[-10:].sum()
    source, cond, target = terms.indices(RAGGED)
    assert source is None
    assert target is None
    assert cond.tolist() == sorted(cond.tolist())
    assert 5 <= cond.bincount().min() < cond.bincount().max() <= 30
    source, cond, _ = terms.indices(PAIRS)  # two sentences of 3 × 4 tokens
    assert terms.pair_sizes(PAIRS) == (2, 3, 4)
    pairs = [(3 * b + m, 4 * b + n) for b in range(2) for m in range(3) for n in range(4)]
    assert list(zip(source.tolist(), cond.tolist(), strict=True)) == pairs


@pytest.mark.parametrize("w", [w for w in workloads.WORKLOADS if w.draw], ids=lambda w: w.label)
def test_the_indices_of_a_workload_fit_its_sizes(w):
    drawn = terms.indices(w)
    for index, rows in zip(drawn, (w.S, w.C, w.T), strict=True):
        assert (index is None) == (rows == 0)
        if index is not None:
            assert len(index) == w.B
            assert index.min() >= 0
            assert index.max() < rows
    assert all(torch.equal(a, b) for a, b in zip(drawn, terms.DRAWS[w.draw](w, seeded()), strict=True) if a is not None)


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("ratio", [1.0, 1.25, float("inf")])
def test_buckets_have_every_term_once(ratio):
    index = torch.tensor([3, 1, 1, 5, 1, 3, 1])
    found = terms.buckets(index, 7, ratio)
    assert len(found) == (1 if ratio > 4 else 3)  # of 1, 2 and 4 terms
    seen = []
    for b in found:
        kept = torch.arange(b.term.numel()) if b.kept is None else b.kept
        assert torch.equal(index[b.term], b.row.unsqueeze(1).expand_as(b.term))  # padded slots repeat a term of the row
        seen += b.of(None)[kept].tolist()
        assert torch.equal(b.of(index), index[b.term].flatten())
    assert sorted(seen) == list(range(7))


def test_the_fold_in_chunks_has_several_chunks():
    first = inputs.inputs(GRAPH, torch.float64)
    truth = steps.Truth(GRAPH, records.FORWARD_BACKWARD, first)
    function = term_ways.fold_in_chunks(GRAPH, "cpu", 5 * GRAPH.I * GRAPH.R * 8)  # 24 terms, five at a time
    truth.check("fold", steps.step(function, records.FORWARD_BACKWARD, inputs.Sets([first]))())


@pytest.mark.parametrize("instances", [1, 2, 5])
@pytest.mark.parametrize("w", CONVOLUTIONS, ids=lambda w: w.name)
def test_kernels_in_chunks(w, instances):
    first = inputs.inputs(w, torch.float64)
    truth = steps.Truth(w, records.FORWARD_BACKWARD, first)
    size = instances * w.O * w.I // w.groups * w.kernel**2 * 8
    function = conv_ways.in_chunks(w, "cpu", size)
    layout = ways.EXPERTS_FIRST
    results = steps.step(function, records.FORWARD_BACKWARD, inputs.Sets([first]), layout)()
    truth.check("chunks", results, layout)


@pytest.mark.parametrize("instances", [1, 2, 5])
@pytest.mark.parametrize("w", MAPPED, ids=lambda w: f"N{w.N}")
def test_functions_of_weights_in_chunks(w, instances):
    first = inputs.inputs(w, torch.float64)
    run = lambda function: steps.step(function, records.FORWARD_BACKWARD, inputs.Sets([first]))()
    results = run(mapped_ways.in_chunks(w, "cpu", instances * w.O * w.I * 8))
    torch.testing.assert_close(results, run(steps.definition(w, "cpu")))


@pytest.mark.parametrize("w", MAPPED, ids=lambda w: f"N{w.N}")
def test_signed_weights_are_wrong_for_a_function_of_weights(w):
    first = inputs.inputs(w, torch.float32)
    truth = steps.Truth(w, records.FORWARD, first)
    truth.check("right", [mapped_ways.materialised(w, "cpu")(*first.leaves)])
    with pytest.raises(AssertionError, match="y is off"):
        truth.check("signed", [ways.materialised(*first.leaves)])


@pytest.mark.parametrize("w", [LOW_RANK, *MAPPED, *CONVOLUTIONS], ids=lambda w: f"{w.name}{w.N}")
@pytest.mark.parametrize("wrong", range(4))
def test_a_wrong_result_of_another_form_is_found(w, wrong):
    first = inputs.inputs(w, torch.float32)
    truth = steps.Truth(w, records.FORWARD_BACKWARD, first)
    results = list(steps.step(steps.definition(w, "cpu"), records.FORWARD_BACKWARD, inputs.Sets([first]))())
    truth.check("right", results)
    results[wrong] = results[wrong] * 1.01
    with pytest.raises(AssertionError, match=r"is off by 0\.01"):
        truth.check("wrong", results)


def test_ways_of_convolutions():
    assert [way.name for way in ways.ours(DEPTHWISE, "cpu")[2:]] == ["fasthyper, fold", "fasthyper, generate"]
    assert [way.name for way in ways.ours(LOW_RANK, "cuda")] == ["fasthyper", "fasthyper again"]
    many = dataclasses.replace(DEPTHWISE, N=784, R=64)
    reasons = {way.name: way.reason_to_skip(many, torch.float32, 1 << 40) for way in all_ways(many, torch.float32)}
    folds = {"fasthyper, fold", "R convolutions, mixed", "compiled R convolutions, mixed", "x ⊗ z first"}
    assert {name for name, reason in reasons.items() if reason == "59 times the work"} == folds
    grouped = next(way for way in ways.peers(many, torch.float32, "cpu") if way.name == "instances as groups")
    size = 2 * many.B * many.O * many.kernel**2 * 4
    assert grouped.reason_to_skip(many, torch.float32, size) is None
    assert grouped.reason_to_skip(many, torch.float32, size - 1)


@pytest.mark.parametrize("w", OVER_TERMS, ids=lambda w: w.name)
def test_a_wrong_sum_over_terms_is_found(w):
    first = inputs.inputs(w, torch.float32)
    truth = steps.Truth(w, records.FORWARD, first)
    right = steps.definition(w, "cpu")
    truth.check("right", [right(*first.leaves)])
    x, z, H = first.leaves
    lacking = z.clone()
    lacking.view(-1, w.R)[-1] = 0  # one term, or one row of z, is left out
    with pytest.raises(AssertionError, match="y is off"):
        truth.check("lacking", [right(x, lacking, H)])


def test_the_workloads():
    ones = [w for w in workloads.WORKLOADS if w.N == 1 and not w.extra and w.form == "layer"]
    assert (len(ones), sum(w.O >= 16 for w in ones)) == (12, 6)
    mapped = [w for w in workloads.WORKLOADS if w.form == "mapped"]
    assert [(w.B, w.R, w.layers) for w in mapped] == [
        (5_760, 64, "10 → 32, abs"), (5_760, 64, "32 → 1, abs"), (5_760, 64, "27 → 32, abs")
    ]  # fmt: skip
    assert all(w.source for w in workloads.WORKLOADS)
    forms = [w.form for w in workloads.WORKLOADS if w.draw]
    assert [forms.count(form) for form in ("graph", "relations", "ragged", "pairs")] == [6, 1, 4, 1]
    assert Workload("layer", 2, 1, 3, 4, 5, "made up").form == "layer"
    convolutions = [w for w in workloads.WORKLOADS if w.form == "convolution"]
    assert sum(w.kernel == 1 for w in convolutions) == 8
    assert [(w.kernel, w.stride, w.side, w.I) for w in convolutions if w.groups > 1] == [
        (5, 1, 14, 480), (5, 1, 14, 672), (5, 2, 14, 672), (5, 1, 7, 1152), (3, 1, 7, 1152)
    ]  # fmt: skip
    assert all(math.isqrt(w.N) ** 2 == w.N and w.I % w.groups == w.O % w.groups == 0 for w in convolutions)
    assert [w.B for w in studies.select("qm9 mpnn", False, "cuda")] == [39_168]
    assert [w.B for w in studies.select("qm9 mpnn", False, "cpu")] == [4_896]
    over_terms = studies.select("graph, ragged,pairs", False, "cpu")
    assert over_terms == [w for w in workloads.WORKLOADS if w.draw]
    assert not studies.select("mothernet", False, "cpu")
    assert studies.select("mothernet", True, "cpu")


def test_axes_vary_one_size():
    for axis in workloads.AXES:
        points = list(axis.workloads())
        varied = {name for name in "BNRIO" if len({getattr(w, name) for w in points}) > 1}
        assert varied == ({"I", "O"} if axis.name == "width" else {axis.name})
        assert len(list(axis.workloads("cuda"))) == len(points) + len(axis.more)
        assert all(min(w.B, w.N, w.R, w.I, w.O) > 0 for w in points)
