import pytest
import torch
from torch import nn

from fasthyper.nn import (
    EmbeddingNetwork,
    HyperLinear,
    Hypernetwork,
    ParameterReport,
    hyperize,
    parameter_report,
)

R = 50


def trunk():
    return nn.Sequential(nn.Linear(64, R), nn.ReLU())


TRUNK = 64 * R + R


def test_weights_only():
    g = nn.Sequential(HyperLinear(64, 10, R, False, False), nn.ReLU(), HyperLinear(10, 12, R, False, False))
    n_g = 64 * 10 + 10 * 12
    report = parameter_report(Hypernetwork(trunk(), g))
    n_f = TRUNK + n_g * R
    assert report == ParameterReport(n_f, n_g, None, None, 0, n_f, n_f)


def test_biases_bases_and_ungenerated_parameters():
    net = nn.Sequential(nn.Linear(64, 10), nn.LayerNorm(10), nn.Linear(10, 12))
    n_g = 64 * 10 + 10 + 10 * 12 + 12
    report = parameter_report(Hypernetwork(trunk(), hyperize(net, R)))
    n_f = TRUNK + n_g * R + n_g
    assert report == ParameterReport(n_f, n_g, None, None, 20, n_f + 20, n_f + 20)


def test_ungenerated_bias():
    report = parameter_report(Hypernetwork(trunk(), hyperize(nn.Linear(64, 10), R, bias=False)))
    assert report.n_g == 640
    assert report.n_f == TRUNK + 640 * R + 640 + 10


def test_frozen():
    net = nn.Sequential(nn.Linear(64, 10), nn.LayerNorm(10)).requires_grad_(False)
    model = Hypernetwork(trunk(), hyperize(net, R))
    n_f = TRUNK + 650 * R
    assert parameter_report(model) == ParameterReport(n_f, 650, None, None, 0, n_f, n_f + 650 + 20)


def test_shared_is_counted_once():
    layer = HyperLinear(8, 8, R)
    n_f = TRUNK + 72 * R + 72
    report = parameter_report(Hypernetwork(trunk(), nn.Sequential(layer, layer)))
    assert (report.n_f, report.n_g, report.trainable) == (n_f, 72, n_f)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].weight = net[0].weight
    report = parameter_report(Hypernetwork(trunk(), hyperize(net, R)))
    assert report.n_g == 64 + 8 + 8
    assert report.n_f == report.trainable == TRUNK + (64 + 8 + 8) * (R + 1)


def test_embedding():
    h, E = 64, 10 * 64 + 10  # the sizes of the rotation comparison
    q = nn.Sequential(nn.Linear(h + E, 10), nn.ReLU(), nn.Linear(10, 12))
    report = parameter_report(EmbeddingNetwork(nn.Sequential(trunk(), nn.Linear(R, E)), q))
    n_e, n_q = TRUNK + R * E + E, (h + E + 1) * 10 + 11 * 12
    assert report == ParameterReport(None, None, n_e, n_q, None, n_e + n_q, n_e + n_q)
    assert str(report).splitlines() == [
        f"N_e         {n_e:>13,}  trainable, embedding",
        f"N_q         {n_q:>13,}  trainable, primary",
        f"trainable   {n_e + n_q:>13,}  all",
        f"total       {n_e + n_q:>13,}  all, frozen ones included",
    ]


def test_other_models():
    with pytest.raises(TypeError, match="Hypernetwork or an EmbeddingNetwork, got Linear"):
        parameter_report(nn.Linear(2, 2))


def test_n_g_is_what_materialize_gives():
    model = Hypernetwork(trunk(), hyperize(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3, bias=False)), R))
    z = torch.randn(1, R)
    sizes = [t.numel() for layer in model.primary for t in layer.materialize(z) if t is not None]
    assert parameter_report(model).n_g == sum(sizes)
