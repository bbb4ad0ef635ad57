"""`Incidence`: what it accepts, what it refuses and how; when it sorts."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import fasthyper
from fasthyper import Incidence, hyper_linear, terms

X, Z, H = torch.randn(3, 4), torch.randn(2, 5), torch.randn(6, 4, 5)
EDGES = torch.tensor([[0, 2], [1, 1]])


@pytest.fixture
def sorts(monkeypatch):
    """Count the sorts."""
    calls = []
    made = terms.Sorted
    monkeypatch.setattr(terms, "Sorted", lambda *a: calls.append(a) or made(*a))
    return calls


def layer(incidence):
    return hyper_linear(X, Z, H, incidence=incidence)


def test_int32_indices():
    ids = torch.tensor([1, 0, 1], dtype=torch.int32)
    torch.testing.assert_close(layer(Incidence.from_batch(ids, 2)), layer(Incidence.from_batch(ids.long(), 2)))


def test_constructors():
    expected = hyper_linear(X, Z[[0, 0, 1]], H)
    torch.testing.assert_close(layer(Incidence.from_batch(torch.tensor([0, 0, 1]), 2)), expected)
    torch.testing.assert_close(layer(Incidence.from_ptr(torch.tensor([0, 2, 3]))), expected)
    y = layer(Incidence.from_edge_index(EDGES, 3, 4))
    assert y.shape == (4, 6)
    torch.testing.assert_close(y[1], hyper_linear(X[[0, 2]], Z, H).sum(0))
    assert not y[[0, 2, 3]].any()


def test_the_number_of_targets_is_the_largest_plus_one_by_default():
    assert Incidence.from_edge_index(EDGES).num_targets == 2
    assert Incidence(target=torch.tensor([], dtype=torch.int64)).num_targets == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"source": [0, 1]}, TypeError, "source must be a tensor"),
        ({"source": torch.ones(2)}, TypeError, r"source must be int64 or int32, got shape \(2,\) of torch.float32"),
        ({"cond": torch.ones(2, dtype=torch.bool)}, TypeError, "cond must be int64 or int32"),
        ({"target": torch.ones(2, 1, dtype=torch.int64)}, ValueError, r"target must have shape \(E,\), got \(2, 1\)"),
        (
            {"source": torch.zeros(3, dtype=torch.int64), "target": torch.zeros(2, dtype=torch.int64)},
            ValueError,
            r"target must have shape \(3,\), one value a term as source has, got \(2,\)",
        ),
        ({"source": torch.tensor([0, 3]), "num_sources": 3}, ValueError, "source must have values from 0 to 2.*got 3"),
        ({"target": torch.tensor([-1, 0])}, ValueError, "target must have values.*got -1 at term 0"),
        ({"cond": torch.tensor([0, 0]), "num_targets": 3}, ValueError, "num_targets must be 2"),
        ({"num_sources": 1.5}, TypeError, "num_sources must be an integer"),
        ({"num_targets": -1}, ValueError, "num_targets must not be negative, got -1"),
        ({"target": torch.eye(3).long().to_sparse()[0]}, TypeError, "target must be a dense tensor"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Incidence(**arguments)


def test_ptr_and_edge_index_are_checked():
    for ptr in ([1, 2], [0, 3, 2]):
        with pytest.raises(ValueError, match="ptr must start at 0 and never fall"):
            Incidence.from_ptr(torch.tensor(ptr))
    with pytest.raises(ValueError, match=r"edge_index must be a tensor of shape \(2, E\), got \(3, 2\)"):
        Incidence.from_edge_index(torch.zeros(3, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("incidence", "message"),
    [
        (
            Incidence(source=torch.tensor([0, 3])),
            r"source must have values from 0 to 2, since there are 3 sources, got 3",
        ),
        (Incidence(source=torch.tensor([-2, 0])), "source must have values from 0 to 2.*got -2 at term 0"),
        (Incidence(cond=torch.tensor([0, 1, 2])), "cond must have values from 0 to 1.*got 2 at term 2"),
        (Incidence(source=torch.tensor([0])), r"without a cond index.*z has 2 rows, but there are 1 terms"),
        (
            Incidence(source=torch.tensor([0, 1]), num_sources=5),
            "x must have 5 rows, the incidence's num_sources, got 3",
        ),
    ],
    ids=str,
)
def test_a_call_that_does_not_fit(incidence, message):
    with pytest.raises(ValueError, match=message):
        layer(incidence)


def test_other_bad_calls():
    with pytest.raises(TypeError, match=r"incidence must be a fasthyper.Incidence, got Tensor"):
        layer(EDGES)
    with pytest.raises(ValueError, match="reduce must be one of 'sum', 'mean', 'max', got 'min'"):
        hyper_linear(X, Z, H, incidence=Incidence.from_edge_index(EDGES), reduce="min")
    with pytest.raises(ValueError, match="reduce must be 'sum' without an incidence"):
        hyper_linear(X[:2], Z, H, reduce="mean")
    with pytest.raises(ValueError, match=r"x must have I = 4: weight \(O, I, R\) has shape"):
        hyper_linear(torch.ones(3, 7), Z, H, incidence=Incidence.from_edge_index(EDGES))


def test_changes_of_the_callers_tensor_have_no_effect():
    edges = EDGES.clone()
    incidence = Incidence.from_edge_index(edges, 3, 2)
    before = layer(incidence)
    edges.fill_(100)
    torch.testing.assert_close(layer(incidence), before)


def test_it_sorts_once_and_only_if_a_schedule_needs_the_order(sorts):
    incidence = Incidence.from_edge_index(EDGES, 3, 2)
    with fasthyper.use_backend("auto", schedule="fold"):
        layer(incidence)
    assert not sorts
    for _ in range(3):
        with fasthyper.use_backend("auto", schedule="aggregate"):
            layer(incidence)
    assert len(sorts) == 1
    with fasthyper.use_backend("auto", schedule="project"):
        layer(incidence)
    assert len(sorts) == 2


def test_a_changed_index_is_sorted_and_checked_again(sorts):
    index = torch.tensor([0, 1, 1])
    first = terms.sort(index, 2)
    assert terms.sort(index, 2) is first
    index[0] = 1
    assert terms.sort(index, 2).ptr.tolist() == [0, 0, 3]
    index[0] = 7
    with pytest.raises(ValueError, match="got 7"):
        terms.check_range("source", index, 2)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda i: pickle.loads(pickle.dumps(i))])
def test_copies_keep_their_order(copied, sorts):
    incidence = copied(Incidence.from_edge_index(EDGES, 3, 2))
    with fasthyper.use_backend("auto", schedule="aggregate"):
        layer(incidence), layer(incidence)
    assert len(sorts) == 1


def test_an_index_that_no_incidence_owns_is_sorted_in_every_call(sorts):
    """Generated code may write other values into the same tensor."""
    target = torch.tensor([1, 1])
    with fasthyper.use_backend("auto", schedule="aggregate"):
        for _ in range(2):
            torch.ops.fasthyper.apply_terms(X[:2].unsqueeze(1), Z, H, None, None, target, 2)
    assert len(sorts) == 2


def test_orders_go_with_their_index():
    before = len(terms._known)
    index = torch.tensor([0, 1, 1])
    terms.sort(index, 2)
    assert len(terms._known) == before + 1
    del index
    assert len(terms._known) == before


def test_inference_mode(sorts):
    with torch.inference_mode():
        incidence = Incidence.from_edge_index(EDGES.clone(), 3, 2)
        with fasthyper.use_backend("auto", schedule="aggregate"):
            layer(incidence), layer(incidence)
    assert len(sorts) == 1


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda i: pickle.loads(pickle.dumps(i))])
def test_copies(copied):
    incidence = Incidence.from_edge_index(EDGES, 3, 2)
    torch.testing.assert_close(layer(copied(incidence)), layer(incidence))


def test_a_copy_made_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        incidence = copy.deepcopy(Incidence.from_edge_index(EDGES, 3, 2))
    weight = H.clone().requires_grad_()
    hyper_linear(X, Z, weight, incidence=incidence).sum().backward()
    assert weight.grad is not None


def test_meta_tensors():
    incidence = Incidence.from_edge_index(EDGES.to("meta"), 3, 2)
    assert hyper_linear(X.to("meta"), Z.to("meta"), H.to("meta"), incidence=incidence).shape == (2, 6)


def test_torch_save():
    file = io.BytesIO()
    torch.save(Incidence.from_edge_index(EDGES, 3, 2), file)
    file.seek(0)
    torch.testing.assert_close(layer(torch.load(file)), layer(Incidence.from_edge_index(EDGES, 3, 2)))


def test_to():
    incidence = Incidence.from_edge_index(EDGES, 3, 2)
    assert incidence.to("cpu") is incidence
    moved = incidence.to("meta")
    assert moved.source.device.type == "meta"
    assert moved.num_targets == 2
    with pytest.raises(ValueError, match=r"source must be on the device of x, cpu, got meta"):
        layer(moved)


def test_it_is_a_pytree():
    incidence = Incidence.from_edge_index(EDGES, 3, 2)
    leaves, spec = torch.utils._pytree.tree_flatten(incidence)
    assert [None if t is None else t.tolist() for t in leaves] == [[0, 2], None, [1, 1]]
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert repr(again) == repr(incidence) == "Incidence(terms=2, source, target, num_sources=3, num_targets=2)"


def test_in_threads():
    from concurrent.futures import ThreadPoolExecutor

    incidence = Incidence.from_edge_index(EDGES, 3, 2)
    expected = layer(incidence)
    fresh = Incidence.from_edge_index(EDGES, 3, 2)
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: layer(fresh), range(20)):
            torch.testing.assert_close(y, expected)
