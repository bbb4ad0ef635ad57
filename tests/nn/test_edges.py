"""The cache of edges that graph layers share: what is kept, what is noticed, and for how long."""

import gc
import threading

import pytest
import torch
from edge_networks import I, data, definition, layer
from graphs import EDGES

from fasthyper.nn import edges


@pytest.fixture
def made(monkeypatch):
    """Return a list that grows whenever an incidence is made."""
    calls, make = [], edges.incidence

    def counted(*args):
        calls.append(args)
        return make(*args)

    monkeypatch.setattr(edges, "incidence", counted)
    return calls


def test_edges_are_kept(made):
    edge_index = EDGES["random"]()
    x, a = data(edge_index)
    convs = layer(), layer(aggr="mean")
    for conv in convs:
        for _ in range(3):
            conv(x, edge_index, a).sum().backward()
    assert len(made) == 1
    convs[0]((x, torch.randn(9, I).double()), edge_index, a)
    convs[0](x, edge_index, a)
    assert len(made) == 2  # a number of targets of its own
    convs[0](x, edge_index.clone(), a)
    assert len(made) == 3


def test_changed_edges_are_noticed(made):
    edge_index, conv = EDGES["random"](), layer()
    x, a = data(edge_index)
    for change in (lambda: edge_index.flip(0), lambda: torch.randint(0, 6, (2, 30))):
        conv(x, edge_index, a)
        edge_index.copy_(change())
        torch.testing.assert_close(conv(x, edge_index, a), definition(conv, x, x, edge_index, a, 6))
    edge_index.data = edge_index.flip(1)  # other storage
    torch.testing.assert_close(conv(x, edge_index, a), definition(conv, x, x, edge_index, a, 6))
    assert len(made) == 4


def test_nothing_is_kept_after_the_edges():
    edge_index, conv = EDGES["random"](), layer()
    x, a = data(edge_index)
    conv(x, edge_index, a)
    before = len(edges._made)
    del edge_index
    gc.collect()
    assert len(edges._made) == before - 1


def test_inference_then_training(made):
    edge_index, conv = EDGES["random"](), layer()
    x, a = data(edge_index)
    with torch.inference_mode():
        expected = conv(x, edge_index, a)
        conv(x, edge_index.clone(), a)  # has no version: it is not kept
    y = conv(x, edge_index, a)
    y.sum().backward()
    assert torch.equal(y, expected)
    assert len(made) == 2


def test_threads():
    jobs, conv = [EDGES["random"]() for _ in range(4)], layer()
    x, a = data(jobs[0])
    expected, wrong, start = [definition(conv, x, x, e, a, 6) for e in jobs], [], threading.Barrier(8)

    def work(i):
        start.wait()
        for k in range(20):
            edge_index = jobs[(i + k) % 4]
            try:
                torch.testing.assert_close(conv(x, edge_index, a), expected[(i + k) % 4])
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
