"""The training examples: all ways train the same network, which is the one that the docstring describes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib

import pytest
import torch

import fasthyper

ROOT = pathlib.Path(__file__).parents[2]

with pytest.MonkeyPatch.context() as path:
    path.syspath_prepend(str(ROOT))
    from benchmarks import context, training
    from benchmarks import training_examples as examples

HERE = context.Context(**dict.fromkeys((f.name for f in dataclasses.fields(context.Context)), ""))
CPU = torch.device("cpu")
NEVER = float("inf")

tiny_qm9 = functools.partial(examples.qm9, graphs=4, atoms=5, features=16, hidden=8)
tiny_siren = functools.partial(examples.siren, shrink=8, features=16, side=16, hidden=8)
TINY = pytest.mark.parametrize("tiny", [tiny_qm9, tiny_siren], ids=["qm9", "siren"])


def curves(recorded):
    """Group records by way."""
    return {way: [r for r in recorded if r.way == way] for way in dict.fromkeys(r.way for r in recorded)}


@TINY
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_all_ways_have_the_same_losses(tiny, dtype, tolerance):
    ours, *others = curves(training.train(tiny(steps=8, every=2), HERE, NEVER, CPU, dtype)).values()
    assert len(others) == (2 if tiny is tiny_qm9 else 1)
    for theirs in others:
        assert [r.loss for r in ours] == pytest.approx([r.loss for r in theirs], rel=tolerance)
    assert len({r.loss for r in ours}) == 4  # it trains


def test_each_way_forces_its_backend():
    example = tiny_qm9(steps=1)
    forced = []
    for way in training.WAYS:
        trainer = training.Trainer(example, way, CPU, torch.float64)
        trainer.network.start.register_forward_hook(lambda *_: forced.append(fasthyper.backends.current().backend))
        trainer.step(example.batch(0))
    assert forced == ["auto", "materialised", "materialised"]


@TINY
def test_the_loss_falls(tiny):
    example = dataclasses.replace(tiny(steps=100, every=10), rate=3e-3)  # smaller networks take larger steps
    ours, *_ = curves(training.train(example, HERE, NEVER, CPU, torch.float32)).values()
    assert ours[-1].loss < 0.4 * ours[0].loss


@TINY
def test_records_are_complete(tiny):
    example = tiny(steps=5, every=2)
    recorded = training.train(example, HERE, NEVER, CPU, torch.float32)
    for way, series in curves(recorded).items():
        assert [r.step for r in series] == [2, 4, 5]
        assert all(0 < a.median < b.median for a, b in itertools.pairwise(series))
        assert {r.role for r in series} == {"ours" if way == "fasthyper" else "peer"}
        assert len({r.temporary for r in series}) == 1
        assert series[0].temporary > 0
    assert {(r.study, r.mode, r.dtype, r.rounds, r.note) for r in recorded} == {
        ("training", "training step", "float32", 1, "")
    }
    assert len({r.subject for r in recorded}) == 1
    assert recorded[0].workload == example.name
    first = recorded[0]
    assert example.sizes == (first.B, first.N, first.R, first.I, first.O)


def test_the_sizes_are_those_of_the_layers():
    example = training.EXAMPLES["cpu"][1]()
    _, edges, sources, _ = example.batch(0)
    layer = example.network.message
    sizes = (len(sources), 1, layer.cond_features, layer.in_features, layer.out_features)
    assert example.sizes == sizes == (8 * 18 * 17, 1, 128, 64, 64)
    assert edges.shape == (8 * 18 * 17, 5)
    example = training.EXAMPLES["cpu"][0]()
    positions, codes, _ = example.batch(0)
    layer = example.network.primary[2]
    assert example.sizes == (*positions.shape[:2], layer.cond_features, layer.in_features, layer.out_features)
    assert example.sizes == (60, 1024, 256, 64, 64)
    assert len(codes) == 60


def test_fused_steps_take_less_memory():
    example = training.EXAMPLES["cpu"][1]()
    ours, theirs, kept = (training.temporary_bytes(example, way, CPU, torch.float32) for way in training.WAYS)
    W = 4 * 8 * 18 * 17 * 64 * 64
    assert kept > theirs > W
    assert ours < W / 2


def test_training_leaves_the_example_s_network_unchanged():
    example = tiny_qm9(steps=2, every=1)
    before = {name: t.clone() for name, t in example.network.state_dict().items()}
    first, second = (training.train(example, HERE, NEVER, CPU, torch.float64) for _ in range(2))
    for name, t in example.network.state_dict().items():
        assert torch.equal(t, before[name])
    assert [r.loss for r in first] == [r.loss for r in second]


@pytest.mark.parametrize(("budget", "notes"), [(0, 1), (1e6, 0)])
def test_stopping_early_leaves_a_note(budget, notes, monkeypatch):
    monkeypatch.setitem(training.EXAMPLES, "cpu", [lambda: tiny_siren(steps=4), lambda: tiny_qm9(steps=4, every=2)])
    recorded = [r for group in training.train_all(HERE, budget) for r in group]
    assert {r.workload for r in recorded} == {"qm9 network", "siren picture"}
    for _, group in itertools.groupby(
        sorted(recorded, key=lambda r: (r.workload, r.way)), lambda r: (r.workload, r.way)
    ):
        series = list(group)
        assert [r.note for r in series if r.note] == ["stopped after 1 of 4 steps: time was up"] * notes
        assert series[-1].step == (1 if notes else 4)


def test_bfloat16_is_autocast_and_float16_is_an_error(monkeypatch):
    monkeypatch.setitem(training.EXAMPLES, "cpu", [lambda: tiny_siren(steps=2), lambda: tiny_qm9(steps=2)])
    exact, rounded = (
        [r for group in training.train_all(HERE, 1e6, dtype=dtype) for r in group]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert {r.dtype for r in rounded} == {"bfloat16"}
    for a, b in zip(exact, rounded, strict=True):
        assert a.loss != b.loss
        assert a.loss == pytest.approx(b.loss, rel=0.1)
    with pytest.raises(ValueError, match=r"not torch\.float16"):
        next(training.train_all(HERE, 1e6, dtype=torch.float16))


def test_graphs_are_complete():
    graphs, atoms = 3, 18
    sources = examples.complete(graphs, atoms)
    targets = torch.arange(graphs * atoms).repeat_interleave(atoms - 1)
    pairs = set(zip(sources.tolist(), targets.tolist(), strict=True))
    assert len(pairs) == len(sources) == graphs * 18 * 17
    assert all(s != t and s // atoms == t // atoms for s, t in pairs)
    assert targets.bincount().eq(17).all()
    assert sources.bincount().eq(17).all()


def test_energies_are_those_of_the_edges():
    drawn = examples.molecules(6, 5, seed=3)
    charge = drawn.atoms @ torch.tensor(examples.CHARGES, dtype=torch.float64)
    targets = torch.arange(30).repeat_interleave(4)
    pair = charge[drawn.sources] * charge[targets] / (1 + drawn.edges[:, 4] ** 2).sqrt()
    torch.testing.assert_close(drawn.energy, torch.zeros(6, dtype=torch.float64).index_add(0, targets // 5, pair / 2))
    assert drawn.edges[:, :4].sum(1).le(1).all()
    assert drawn.edges[:, :4].sum() > 0
    assert drawn.atoms.sum(1).eq(1).all()


def test_batches_differ_and_targets_are_standardised():
    example = examples.qm9(graphs=500, steps=1)
    first, second = example.batch(1)[-1], example.batch(2)[-1]
    assert not torch.isclose(first, second).any()
    assert not any(torch.isclose(first, e).any() for e in example.held_out[-1][:5])
    assert first.mean().item() == pytest.approx(0, abs=0.2)
    assert first.std().item() == pytest.approx(1, abs=0.2)


def test_messages_are_the_defining_sums():
    example = tiny_qm9(steps=1)
    network = example.network.double()
    torch.nn.init.normal_(network.message.base_weight)
    _, edges, sources, _ = example.batch(1)
    targets = torch.arange(20).repeat_interleave(4)
    nodes, z = torch.randn(20, 16, dtype=torch.float64), network.edge(edges)
    weights = torch.einsum("oir,er->eoi", network.message.weight, z) + network.message.base_weight
    messages = torch.einsum("eoi,ei->eo", weights, nodes[sources])
    expected = torch.zeros_like(nodes).index_add(0, targets, messages / 4)
    torch.testing.assert_close(network.messages(nodes, z, sources), expected)


def test_molecules_are_independent():
    example = tiny_qm9(steps=1)
    network = example.network.double()
    atoms, edges, sources, _ = example.batch(1)
    together = network(atoms, edges, sources)
    alone = [network(a, e, sources[:20]) for a, e in zip(atoms.split(5), edges.split(20), strict=True)]
    torch.testing.assert_close(together, torch.cat(alone))
    assert together.std() > 0


def test_tiles_make_up_the_picture():
    picture = examples.photograph(4)
    assert picture.shape == (106, 160, 3)
    assert picture.min() >= -1
    assert picture.max() <= 1
    cut = examples.tiles(picture, 32)
    assert cut.shape == (3 * 5, 1024, 3)
    rows = [torch.cat(list(row.unflatten(1, (32, 32))), 1) for row in cut.split(5)]
    assert torch.equal(torch.cat(rows), picture[5:101])


def test_a_siren_starts_as_a_siren():
    torch.manual_seed(0)
    network = examples.siren_network(256)
    positions = torch.rand(1000, 2) * 2 - 1
    inner = 30 * network[:2](positions) @ network[2].weight.T  # has variance 1 at the next sine
    assert inner.std().item() == pytest.approx(1, abs=0.1)
    siren = examples.siren(shrink=8, features=16, steps=1, side=16)
    assert all(isinstance(siren.network.primary[i], fasthyper.HyperLinear) for i in (0, 2, 4))


def test_an_example_without_its_data_is_left_out(monkeypatch, capsys):
    def absent():
        raise ImportError("No module named 'sklearn'")

    monkeypatch.setitem(training.EXAMPLES, "cpu", [absent, lambda: tiny_qm9(steps=1)])
    assert [group[0].workload for group in training.train_all(HERE, 1e6)] == ["qm9 network"]
    assert "training example left out: No module named 'sklearn'" in capsys.readouterr().out
