"""Generated weights of low rank: values and derivatives against W written out, initialisation, transforms, memory."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from small_networks import TrunkByName
from torch import nn

import fasthyper
from fasthyper import Incidence
from fasthyper.nn import HyperLinear, Hypernetwork, hyperize, parameter_report, ungenerated

I, O, R, r, B = 6, 7, 5, 3, 4


def filled(*args, dtype=torch.float64, **kwargs):
    """Return a low-rank layer with all parameters, base included, nonzero."""
    layer = HyperLinear(*(args or (I, O, R)), dtype=dtype, **{"rank": r, "alpha": 4.0, **kwargs})
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    return layer


def written_out(layer, z, dtype=torch.float64):
    """Return W and the bias of each instance by einsum, from the parameters."""
    a, b, bias, base, base_bias = (
        None if p is None else p.to(dtype)
        for p in (layer.weight_a, layer.weight_b, layer.bias, layer.base_weight, layer.base_bias)
    )
    z = z.to(dtype)
    A, Bs = torch.einsum("kir,br->bki", a, z), torch.einsum("okr,br->bok", b, z)
    W = layer.alpha / layer.rank * torch.einsum("bok,bki->boi", Bs, A)
    W = W if base is None else W + base
    by = z.new_zeros(len(z), layer.out_features) if bias is None else z @ bias.T
    return W, by if base_bias is None else by + base_bias


def oracle(layer, x, z, dtype=torch.float64):
    W, by = written_out(layer, z, dtype)
    y = torch.einsum("boi,b...i->b...o", W, x.to(dtype))
    return y + by.reshape(len(x), *[1] * (x.dim() - 2), by.shape[1])


def inputs(*points, dtype=torch.float64):
    return torch.randn(B, *points, I, dtype=dtype), torch.randn(B, R, dtype=dtype)


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


# networks


def test_in_a_hypernetwork_and_not_fused(fusing):
    primary = nn.Sequential(HyperLinear(4, 5, R, rank=2), nn.ReLU(), HyperLinear(5, 3, R, rank=2))
    for p in primary.parameters():
        nn.init.normal_(p)
    model, x, cond = Hypernetwork(nn.Linear(6, R), primary), torch.randn(B, 4), torch.randn(B, 6)
    z = model.trunk(cond)
    torch.testing.assert_close(model(x, cond), primary[2](primary[0](x, z).relu(), z))
    report = parameter_report(model)
    assert report.n_g == (2 * 4 + 5 * 2 + 5) + (2 * 5 + 3 * 2 + 3)
    mixed = nn.Sequential(HyperLinear(4, 5, R), nn.ReLU(), HyperLinear(5, 3, R, rank=2))
    assert Hypernetwork(nn.Linear(6, R), mixed)(x, cond).shape == (B, 3)
    assert not fusing.calls


def test_z_by_name():
    primary = nn.Sequential(filled(4, 5, 7, dtype=torch.float32), nn.ReLU(), HyperLinear(5, 3, 7))
    model, x, cond = Hypernetwork(TrunkByName("0", "2"), primary), torch.randn(B, 4), torch.randn(B, 6)
    z = model.trunk(cond)
    torch.testing.assert_close(model(x, cond), primary[2](primary[0](x, z["0"]).relu(), z["2"]))


def test_hyperize():
    net = nn.ModuleDict({"q_proj": nn.Linear(I, O), "k_proj": nn.Linear(I, O), "v_proj": nn.Linear(I, O, bias=False)})
    converted = hyperize(net, R, ["*q_proj", "*v_proj"], rank=r, alpha=8, bias=False)
    assert ungenerated(converted) == ["k_proj.weight", "k_proj.bias"]
    q, v = converted["q_proj"], converted["v_proj"]
    assert (q.rank, q.alpha, v.rank) == (r, 8, r)
    assert q.weight_a.any()
    assert not q.weight_b.any()
    assert torch.equal(q.base_weight, net["q_proj"].weight)
    x, z = torch.randn(B, 2, I), torch.randn(B, R)
    torch.testing.assert_close(q(x, z), net["q_proj"](x))
    with pytest.raises(ValueError, match="rank must be positive, got 0"):
        hyperize(net, R, rank=0)
    assert hyperize(net, R, rank=r, base=False)["q_proj"].weight_b.any()


def test_hyperize_keeps_ties():
    net = nn.Sequential(nn.Linear(I, I), nn.Linear(I, I))
    net[1].weight = net[0].weight
    converted = hyperize(net, R, rank=r)
    for name in ("base_weight", "weight_a", "weight_b"):
        assert getattr(converted[0], name) is getattr(converted[1], name)
    assert converted[0].bias is not converted[1].bias


# transforms


@pytest.mark.parametrize("points", [(), (3,), (8,)])
def test_autocast(points):
    layer, (x, z) = filled(dtype=torch.float32), inputs(*points, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, z)
        assert y.dtype == torch.bfloat16
        assert layer(x.bfloat16(), z).dtype == torch.bfloat16
        assert layer.materialize(z)[0].shape == (B, O, I)
        norm = layer.weight_norm_sq(z)
        double = copy.deepcopy(layer).double()
        assert double(x.double(), z.double()).dtype == torch.float64
    assert torch.equal(norm, layer.weight_norm_sq(z))
    torch.testing.assert_close(y.double(), oracle(layer, x, z), rtol=0.05, atol=1)
    y.sum().backward()
    assert layer.weight_a.grad.dtype == torch.float32


@pytest.mark.parametrize("ragged", [False, True])
def test_compile(ragged):
    layer, (x, z) = filled(), inputs(2)
    incidence = Incidence.from_batch(torch.tensor([1, 0, 0]), num_conds=B) if ragged else None
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5):
        given = x.reshape(-1, I)[:3] if ragged else torch.randn(rows, 2, I, dtype=torch.float64)
        cond = z if ragged else torch.randn(rows, R, dtype=torch.float64)
        given.requires_grad_()
        y = compiled(given, cond, incidence)
        torch.testing.assert_close(y, layer(given, cond, incidence))
        got = torch.autograd.grad(y.square().sum(), (given, *layer.parameters()))
        expected = torch.autograd.grad(layer(given, cond, incidence).square().sum(), (given, *layer.parameters()))
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other)
        given = given.detach()


def test_export():
    layer, (x, z) = filled(), inputs(2)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(layer, (x, z), dynamic_shapes={"x": {0: batch}, "z": {0: batch}})
    x, z = torch.randn(9, 2, I, dtype=torch.float64), torch.randn(9, R, dtype=torch.float64)
    torch.testing.assert_close(program.module()(x, z), layer(x, z))


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0)])
@pytest.mark.parametrize("points", [2, 8])
def test_vmap(dims, points):
    layer = filled()
    x = torch.randn(*(3,) * (dims[0] == 0), B, points, I, dtype=torch.float64)
    z = torch.randn(*(3,) * (dims[1] == 0), B, R, dtype=torch.float64)
    expected = [layer(x if dims[0] is None else x[k], z if dims[1] is None else z[k]) for k in range(3)]
    torch.testing.assert_close(torch.func.vmap(layer, dims)(x, z), torch.stack(expected))


def test_vmap_of_the_norm():
    layer, z = filled(), torch.randn(3, B, R, dtype=torch.float64)
    expected = torch.stack([layer.weight_norm_sq(each) for each in z])
    torch.testing.assert_close(torch.func.vmap(layer.weight_norm_sq)(z), expected)


def test_per_sample_gradients():
    layer, (x, z) = filled(), inputs()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x, z):
        return torch.func.functional_call(layer, parameters, (x[None], z[None])).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, z)
    for b in range(B):
        layer.zero_grad()
        layer(x[b : b + 1], z[b : b + 1]).square().sum().backward()
        for name, p in layer.named_parameters():
            torch.testing.assert_close(each[name][b], p.grad)


@pytest.mark.parametrize("points", [2, 8])
def test_written_out_factors_or_not(points, monkeypatch):
    """With no room for A and B they are generated in tiles; the results are the same."""
    layer, (x, z) = filled(), inputs(points)
    expected = layer(x, z)
    monkeypatch.setattr("fasthyper.nn.low_rank.get_workspace_limit", lambda: 0)
    torch.testing.assert_close(layer(x, z), expected)


def test_temporary_memory_has_no_w():
    """Beside activations, a call has neither W nor its gradient: those would be B · O · I numbers."""
    from fasthyper.measure import peak_temporary_bytes

    instances, width = 64, 256
    layer = HyperLinear(width, width, 8, rank=4)
    x, z = torch.randn(instances, width, requires_grad=True), torch.randn(instances, 8, requires_grad=True)
    step = lambda: torch.autograd.grad(layer(x, z).sum(), (x, z, *layer.parameters()))
    assert fasthyper.get_workspace_limit() > 0
    assert peak_temporary_bytes(step) < 4 * instances * width * width / 4
