"""Generated weights of low rank: values and derivatives against W written out, arguments, initialisation."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from low_rank_layers import B, I, O, R, filled, inputs, oracle, r, written_out
from torch import nn

from fasthyper import Incidence
from fasthyper.nn import HyperLinear, Hypernetwork, parameter_report


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("points", [(), (2,), (2, 3), (0,)])
@pytest.mark.parametrize("alpha", [None, 7])
def test_the_formula(bias, base, points, alpha):
    layer = filled(bias=bias, base=base, alpha=alpha)
    assert layer.alpha == (alpha or r)
    x, z = inputs(*points)
    torch.testing.assert_close(layer(x, z), oracle(layer, x, z))
    W, by = layer.materialize(z)
    expected, expected_bias = written_out(layer, z)
    torch.testing.assert_close(W, expected)
    assert (by is not None) == bias
    if bias:
        torch.testing.assert_close(by, expected_bias)
    torch.testing.assert_close(layer.weight_norm_sq(z), expected.square().sum((1, 2)))


def test_empty_sizes():
    for sizes in ((0, O, R), (I, 0, R), (I, O, 0)):
        layer = filled(*sizes)
        x, z = torch.randn(B, sizes[0], dtype=torch.float64), torch.randn(B, sizes[2], dtype=torch.float64)
        torch.testing.assert_close(layer(x, z), oracle(layer, x, z))
        assert layer.weight_norm_sq(z).shape == (B,)
    x, z = inputs()
    assert filled()(x[:0], z[:0]).shape == (0, O)
    assert filled().weight_norm_sq(z[:0]).shape == (0,)


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("points", [(), (2,), (2, 4)])  # eight: A and B are written out
def test_gradients(base, points):
    layer, (x, z) = filled(base=base), inputs(*points)
    leaves = [x.requires_grad_(), z.requires_grad_(), *layer.parameters()]
    g = torch.randn(*x.shape[:-1], O, dtype=torch.float64)
    ours = torch.autograd.grad(layer(x, z), leaves, g)
    theirs = torch.autograd.grad(oracle(layer, x, z), leaves, g)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("method", "points"), [("forward", 1), ("forward", 4), ("materialize", 1), ("weight_norm_sq", 1)]
)
def test_gradcheck(method, points):
    layer = HyperLinear(2, 3, 2, rank=2, alpha=3, dtype=torch.float64)
    names, values = zip(*((n, torch.randn_like(p).requires_grad_()) for n, p in layer.named_parameters()), strict=True)
    x = torch.randn(2, points, 2, dtype=torch.float64, requires_grad=True)
    z = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    if method != "forward":
        layer.forward = getattr(layer, method)  # functional_call runs forward

    def run(x, z, *values):
        args = (x, z) if method == "forward" else (z,)
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), args)

    assert torch.autograd.gradcheck(run, (x, z, *values), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, (x, z, *values))


def test_norm_by_chunks(monkeypatch):
    layer, z = filled(), torch.randn(9, R, dtype=torch.float64, requires_grad=True)
    leaves = z, layer.weight_a, layer.weight_b, layer.base_weight
    g = torch.randn(9, dtype=torch.float64)
    whole = layer.weight_norm_sq(z)
    gradients = torch.autograd.grad(whole, leaves, g)
    monkeypatch.setattr("fasthyper.nn.low_rank._CHUNK_ELEMENTS", 150)
    chunked = layer.weight_norm_sq(z)
    torch.testing.assert_close(chunked, whole)
    for got, expected in zip(torch.autograd.grad(chunked, leaves, g), gradients, strict=True):
        torch.testing.assert_close(got, expected)


def test_norm_is_never_negative_and_is_computed_in_float32():
    layer, z = filled(64, 64, 8, rank=4, dtype=torch.float16), torch.randn(5, 8).half()
    norm = layer.weight_norm_sq(z)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(
        norm.double(), copy.deepcopy(layer).double().weight_norm_sq(z.double()), rtol=1e-5, atol=0
    )
    for seed in range(8):
        torch.manual_seed(seed)
        layer, z = HyperLinear(64, 64, 4, rank=2), torch.randn(1, 4)
        with torch.no_grad():
            layer.base_weight.copy_(-layer.materialize(z)[0][0])
        assert (layer.weight_norm_sq(z * (1 + 1e-5 * torch.randn(50, 1))) >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("points", [3, 16])
def test_low_precision_errs_at_most_twice_as_much_as_w_written_out(dtype, points):
    layer = HyperLinear(48, 40, 16, rank=8, alpha=12, dtype=dtype)
    with torch.no_grad():
        layer.base_weight.normal_(std=48**-0.5)
    x, z = torch.randn(32, points, 48).to(dtype), torch.randn(32, 16).to(dtype)
    y = layer(x, z)
    assert y.dtype == dtype
    truth = oracle(layer, x, z)
    W, b = layer.materialize(z)
    materialised = torch.baddbmm(b.unsqueeze(1), x, W.mT)
    error = lambda t: (t.double() - truth).square().mean().sqrt()
    assert error(y) <= 2 * error(materialised) + torch.finfo(dtype).eps * truth.square().mean().sqrt()


# parameters and arguments


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("base", [False, True])
def test_which_parameters_exist(bias, base):
    layer = HyperLinear(I, O, R, bias=bias, base=base, rank=r)
    expected = {"weight_a": (r, I, R), "weight_b": (O, r, R)}
    expected |= {"bias": (O, R)} if bias else {}
    expected |= {"base_weight": (O, I)} if base else {}
    expected |= {"base_bias": (O,)} if bias and base else {}
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == expected
    assert layer.weight is None
    assert f"bias={bias}, base={base}, rank=3, alpha=3)" in repr(layer)
    whole = HyperLinear(I, O, R)
    assert whole.rank is whole.alpha is whole.weight_a is whole.weight_b is None
    assert "rank" not in repr(whole)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be positive, got 0"),
        ({"rank": 2.0}, TypeError, r"rank must be an integer, got 2\.0"),
        ({"rank": True}, TypeError, "rank must be an integer, got True"),
        ({"alpha": 2}, ValueError, "needs a rank, got alpha=2"),
        ({"rank": 2, "alpha": 0}, ValueError, "alpha must be positive and finite, got 0"),
        ({"rank": 2, "alpha": float("inf")}, ValueError, "alpha must be positive and finite, got inf"),
        ({"rank": 2, "alpha": "8"}, TypeError, "alpha must be a number, got '8'"),
        ({"rank": 2, "init": "nope"}, ValueError, "nope"),
        ({"rank": 2, "init": "bias_hyper", "base": False}, ValueError, "base=True"),
    ],
)
def test_arguments_are_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        HyperLinear(I, O, R, **arguments)


@pytest.mark.parametrize("points", [2, 8])
def test_inputs_are_checked(points):
    layer, (x, z) = filled(), inputs(points)
    with pytest.raises(ValueError, match=rf"x must have .*got \(4, {points}, 5\)"):
        layer(x[..., :-1], z)
    with pytest.raises(ValueError, match=r"z must .*got \(4, 4\)"):
        layer(x, z[:, :-1])
    with pytest.raises(ValueError, match="z must"):
        layer(x, z[:-1])
    for given in ((x, z.float()), (x.float(), z), (x.float(), z.float())):
        with pytest.raises(TypeError, match="must have the dtype of x"):
            layer(*given)
    with pytest.raises(TypeError, match="x must be a tensor"):
        layer(None, z)
    with pytest.raises(TypeError, match="incidence must be"):
        layer(x, z, incidence=3)
    with pytest.raises(ValueError, match=r"z must be \(B, R\) with R = 5, got \(4, 4\)"):
        layer.materialize(z[:, :-1])
    with pytest.raises(TypeError, match=r"float64.*float32"):
        layer.weight_norm_sq(z.float())


@pytest.mark.parametrize("reload", ["deepcopy", "pickle", "save", "state_dict"])
def test_copies(reload):
    layer, (x, z) = filled(), inputs()
    if reload == "deepcopy":
        other = copy.deepcopy(layer)
    elif reload == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    elif reload == "save":
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = HyperLinear(I, O, R, rank=r, alpha=4.0, dtype=torch.float64)
        other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, z), layer(x, z))
    assert other.weight_a.data_ptr() != layer.weight_a.data_ptr()


def test_a_layer_that_was_pickled_before_there_were_ranks():
    layer = HyperLinear(I, O, R)
    for name in ("rank", "alpha"):
        del vars(layer)[name]
    for name in ("weight_a", "weight_b"):
        del layer._parameters[name]
    z = torch.randn(B, R)
    assert layer(torch.randn(B, I), z).shape == (B, O)
    assert layer.weight_norm_sq(z).shape == (B,)
    assert "rank" not in repr(layer)
    assert parameter_report(Hypernetwork(nn.Identity(), layer)).n_g == O * I + O


def test_meta_and_empty():
    layer = HyperLinear(I, O, R, rank=r, init="bias_hyper", device="meta")
    assert all(p.is_meta for p in layer.parameters())
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert not layer.weight_b.any()
    assert layer.weight_a.any()


# ragged points


def test_ragged_points():
    ids = torch.tensor([2, 0, 0, 3, 2, 2, 0])  # none of instance 1
    layer, z = filled(), torch.randn(B, R, dtype=torch.float64, requires_grad=True)
    x = torch.randn(len(ids), I, dtype=torch.float64, requires_grad=True)
    y = layer(x, z, incidence=Incidence.from_batch(ids, num_conds=B))
    expected = oracle(layer, x, z[ids])
    torch.testing.assert_close(y, expected)
    leaves, g = (x, z, *layer.parameters()), torch.randn_like(y)
    theirs = torch.autograd.grad(expected, leaves, g)
    for got, gradient in zip(torch.autograd.grad(y, leaves, g), theirs, strict=True):
        torch.testing.assert_close(got, gradient)
    for reduce in ("mean", "max"):  # a target has one term
        torch.testing.assert_close(layer(x, z, Incidence.from_batch(ids, num_conds=B), reduce), expected)
    with pytest.raises(ValueError, match="reduce"):
        layer(x, z, Incidence.from_batch(ids), "median")


@pytest.mark.parametrize("index", ["source", "target"])
def test_an_incidence_with_edges_is_refused(index):
    with pytest.raises(ValueError, match="incidence must have no sources and no targets"):
        filled()(*inputs(), incidence=Incidence(**{index: torch.arange(B)}))


# initialisation


@pytest.mark.parametrize("alpha", [None, 16])
@pytest.mark.parametrize("init", ["hyperfan_in", "hyperfan_out"])
@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("nonlinearity", ["linear", "relu"])
def test_ten_layers_keep_the_variance(alpha, init, base, nonlinearity):
    """W is quadratic in z, so that ten layers have the 20th power of its norm: z is normalised here."""
    width, features, instances, depth = 64, 64, 4096, 10
    z = F.normalize(torch.randn(instances, features), dim=1) * features**0.5
    activation = torch.relu if nonlinearity == "relu" else lambda t: t

    def variances(layers, rows, *z):
        x = start = torch.randn(rows, width, requires_grad=True)
        for layer in layers:
            x = activation(layer(x, *z))
        (g,) = torch.autograd.grad(x, start, torch.randn_like(x))
        return torch.stack([x.square().mean(), g.square().mean()])

    def ordinary():
        layers = [nn.Linear(width, width, bias=False) for _ in range(depth)]
        for linear in layers:
            nn.init.normal_(linear.weight, std=nn.init.calculate_gain(nonlinearity) * width**-0.5)
        return variances(layers, 64)

    layers = [HyperLinear(width, width, features, bias=False, base=base, rank=8, alpha=alpha) for _ in range(depth)]
    for layer in layers:
        layer.reset_parameters(init, nonlinearity=nonlinearity)
    ratio = variances(layers, instances, z) / torch.stack([ordinary() for _ in range(200)]).mean(0)
    assert (ratio > 0.5).all()
    assert (ratio < 2).all()


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize(("moment", "nonlinearity"), [(1.0, "linear"), (0.5, "relu"), (9.0, "relu")])
def test_one_layer_keeps_the_variance(base, moment, nonlinearity):
    gain_sq = nn.init.calculate_gain(nonlinearity) ** 2
    instances, width, out, features = 2048, 48, 96, 256
    z = moment**0.5 * torch.randn(instances, features)
    layer = HyperLinear(width, out, features, base=base, rank=4, alpha=10)
    layer.reset_parameters("hyperfan_in", moment, nonlinearity)
    x = torch.randn(instances, width, requires_grad=True)
    y = layer(x, z)
    assert y.square().mean().item() == pytest.approx(gain_sq, rel=0.1)
    at_zero = layer(torch.zeros(instances, width), z)
    assert at_zero.square().mean().item() == pytest.approx(gain_sq / 2, rel=0.1)
    layer.reset_parameters("hyperfan_out", moment, nonlinearity)
    y = layer(x, z)
    assert y.square().mean().item() == pytest.approx(gain_sq, rel=0.1)  # since O > I
    (g,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert g.square().mean().item() == pytest.approx(gain_sq, rel=0.1)


def test_bias_hyper_starts_from_the_base_as_lora_does():
    layer = HyperLinear(I, O, R, rank=r, init="bias_hyper")
    x, z = torch.randn(B, I), torch.randn(B, R)
    torch.testing.assert_close(layer(x, z), F.linear(x, layer.base_weight, layer.base_bias))
    assert not layer.weight_b.any()
    assert not layer.bias.any()
    assert layer.base_weight.any()
    wide = HyperLinear(256, 256, R, rank=r, init="bias_hyper")
    assert wide.base_weight.var().item() == pytest.approx(1 / 256, rel=0.05)
    layer(x, z).square().sum().backward()
    assert layer.weight_b.grad.any()  # A is not zero, so that B learns from the first step
