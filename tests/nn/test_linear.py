import copy
import io
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fasthyper
from fasthyper.nn import HyperLinear

ALL = ("weight", "bias", "base_weight", "base_bias")


def filled(*args, dtype=torch.float64, **kwargs):
    """Return a HyperLinear with all parameters, base included, nonzero."""
    layer = HyperLinear(*args, dtype=dtype, **kwargs)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    return layer


def oracle(layer, x, z):
    """Compute the formula by einsum in float64, from the parameters."""
    w, b, w0, b0 = (None if getattr(layer, n) is None else getattr(layer, n).double() for n in ALL)
    x, z = x.double(), z.double()
    W = torch.einsum("oir,br->boi", w, z)
    if w0 is not None:
        W = W + w0
    y = torch.einsum("boi,b...i->b...o", W, x)
    if b is not None:
        y = y + (z @ b.T).reshape(z.shape[0], *[1] * (x.ndim - 2), b.shape[0])
    return y if b0 is None else y + b0


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(0, 7)] * 4),
    points=st.lists(st.integers(0, 4), max_size=2),
    bias=st.booleans(),
    base=st.booleans(),
)
def test_forward_and_materialize_are_the_formula(sizes, points, bias, base):
    B, I, O, R = sizes
    layer = filled(I, O, R, bias=bias, base=base)
    x, z = torch.randn(B, *points, I, dtype=torch.float64), torch.randn(B, R, dtype=torch.float64)
    y = layer(x, z)
    assert y.shape == (B, *points, O)
    torch.testing.assert_close(y, oracle(layer, x, z))
    W, b = layer.materialize(z)
    assert W.shape == (B, O, I)
    assert (b is not None) == bias
    y = torch.einsum("boi,b...i->b...o", W, x)
    if b is not None:
        y = y + b.reshape(B, *[1] * len(points), O)
    torch.testing.assert_close(y, oracle(layer, x, z))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("base", [False, True])
def test_which_parameters_exist(bias, base):
    layer = HyperLinear(3, 4, 5, bias=bias, base=base)
    expected = {"weight": (4, 3, 5)}
    if bias:
        expected["bias"] = (4, 5)
    if base:
        expected["base_weight"] = (4, 3)
    if bias and base:
        expected["base_bias"] = (4,)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == expected
    assert all(getattr(layer, name) is None for name in set(ALL) - set(expected))
    assert f"in_features=3, out_features=4, cond_features=5, bias={bias}, base={base}" in repr(layer)


@pytest.mark.parametrize("name", ["in_features", "out_features", "cond_features"])
def test_negative_size(name):
    sizes = {"in_features": 3, "out_features": 4, "cond_features": 5, name: -1}
    with pytest.raises(ValueError, match=f"{name} .*-1"):
        HyperLinear(**sizes)


def test_empty_sizes_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for init in ("hyperfan_in", "hyperfan_out", "bias_hyper"):
            HyperLinear(0, 3, 4, init=init)
            HyperLinear(3, 0, 4, init=init)
            HyperLinear(3, 4, 0, init=init)


def test_unknown_init():
    with pytest.raises(ValueError, match=r"hyperfan_in.*hyperfan_out.*bias_hyper.*'kaiming'"):
        HyperLinear(3, 4, 5, init="kaiming")
    with pytest.raises(ValueError, match="nope"):
        HyperLinear(3, 4, 5).reset_parameters("nope")


@pytest.mark.parametrize("reload", ["deepcopy", "pickle", "save", "state_dict"])
def test_copies(reload):
    layer = filled(3, 4, 5)
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
        other = HyperLinear(3, 4, 5, dtype=torch.float64)
        other.load_state_dict(layer.state_dict())
    x, z = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    assert torch.equal(other(x, z), layer(x, z))
    assert other.weight.data_ptr() != layer.weight.data_ptr()


def test_dtype_and_meta():
    assert {p.dtype for p in HyperLinear(3, 4, 5).to(torch.bfloat16).parameters()} == {torch.bfloat16}
    assert all(p.is_meta for p in HyperLinear(3, 4, 5, device="meta").parameters())
    empty = nn.utils.skip_init(HyperLinear, 3, 4, 5)
    assert empty.weight.shape == (4, 3, 5)
    assert not empty.weight.is_meta


def test_meta_to_empty_and_reset():
    layer = HyperLinear(3, 4, 5, init="bias_hyper", device="meta").to_empty(device="cpu")
    layer.reset_parameters()  # the init of the constructor
    assert not layer.weight.any()
    assert layer.base_weight.any()


# from_head


@pytest.mark.parametrize("head_bias", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_from_head_equals_the_usual_code(bias, head_bias):
    I, O, R = 3, 4, 5
    head = nn.Linear(R, O * I + (O if bias else 0), bias=head_bias, dtype=torch.float64)
    layer = HyperLinear.from_head(head, I, O, "oi")
    x, z = torch.randn(6, 2, I, dtype=torch.float64), torch.randn(6, R, dtype=torch.float64)
    out = head(z)
    y = torch.einsum("boi,bni->bno", out[:, : O * I].view(6, O, I), x)
    if bias:
        y = y + out[:, None, O * I :]
    torch.testing.assert_close(layer(x, z), y)
    assert (layer.bias is not None) == bias
    assert (layer.base_weight is not None) == head_bias
    assert (layer.base_bias is not None) == (bias and head_bias)
    assert layer.weight.dtype == torch.float64


@pytest.mark.parametrize("bias", [False, True])
def test_from_head_of_the_other_layout(bias):
    I, O, R = 3, 4, 5
    head = nn.Linear(R, O * I + (O if bias else 0), dtype=torch.float64)
    layer = HyperLinear.from_head(head, I, O, layout="io")
    x, z = torch.randn(6, 2, I, dtype=torch.float64), torch.randn(6, R, dtype=torch.float64)
    out = head(z)
    y = x @ out[:, : O * I].view(6, I, O)
    if bias:
        y = y + out[:, None, O * I :]
    torch.testing.assert_close(layer(x, z), y)
    assert layer.weight.data_ptr() == head.weight.data_ptr()
    ours, theirs = (torch.autograd.grad(t.square().sum(), [*head.parameters()]) for t in (layer(x, z), y))
    torch.testing.assert_close(ours, theirs)


def test_from_head_needs_the_layout_where_both_fit():
    with pytest.raises(ValueError, match=r"layout is needed: .*'oi'.* \(4, 3\).*'io'.* \(3, 4\)"):
        HyperLinear.from_head(nn.Linear(5, 12), 3, 4)
    with pytest.raises(ValueError, match="layout must be 'oi', 'io' or None, got 'OI'"):
        HyperLinear.from_head(nn.Linear(5, 12), 3, 4, layout="OI")
    for I, O in ((12, 1), (1, 12)):
        head, x, z = nn.Linear(5, 12), torch.randn(6, I), torch.randn(6, 5)
        y = HyperLinear.from_head(head, I, O)(x, z)
        for layout in ("oi", "io"):
            assert torch.equal(HyperLinear.from_head(head, I, O, layout)(x, z), y)


def test_from_head_shares_storage():
    head = nn.Linear(5, 16)
    layer = HyperLinear.from_head(head, 3, 4, "oi")
    x, z = torch.randn(6, 3), torch.randn(6, 5)
    before = head(z).detach()
    layer(x, z).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert not torch.allclose(head(z), before)
    old = layer(x, z).detach()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    head(z).sum().backward()
    optimizer.step()
    assert not torch.allclose(layer(x, z), old)
    torch.testing.assert_close(layer.weight.flatten(0, 1), head.weight[:12])
    torch.testing.assert_close(layer.bias, head.weight[12:])
    torch.testing.assert_close(layer.base_weight.flatten(), head.bias[:12])
    torch.testing.assert_close(layer.base_bias, head.bias[12:])


def test_from_head_keeps_a_subclass():
    class Mine(HyperLinear):
        pass

    assert type(Mine.from_head(nn.Linear(5, 12), 3, 4, "oi")) is Mine


class OwnForward(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_from_head_refuses():
    with pytest.raises(ValueError, match=r"12 or 16 .*in_features=3.*out_features=4.*\(13, 5\)"):
        HyperLinear.from_head(nn.Linear(5, 13), 3, 4, "oi")
    with pytest.raises(ValueError, match="out_features must not be negative, got -4"):
        HyperLinear.from_head(nn.Linear(5, 12), 3, -4)
    with pytest.raises(TypeError, match=r"head must be an nn\.Linear, got Conv1d"):
        HyperLinear.from_head(nn.Conv1d(5, 12, 1), 3, 4, "oi")
    with pytest.raises(TypeError, match="OwnForward"):
        HyperLinear.from_head(OwnForward(5, 12), 3, 4)
    with pytest.raises(TypeError, match="parametrization"):
        HyperLinear.from_head(nn.utils.parametrizations.weight_norm(nn.Linear(5, 12)), 3, 4, "oi")
    with pytest.raises(TypeError, match="lazy"):
        HyperLinear.from_head(nn.LazyLinear(12), 3, 4, "oi")
    hooked = nn.Linear(5, 12)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="hooks"):
        HyperLinear.from_head(hooked, 3, 4, "oi")


# weight_norm_sq


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("base", [False, True])
def test_weight_norm_sq(bias, base):
    layer = filled(6, 7, 5, bias=bias, base=base)
    z = torch.randn(4, 5, dtype=torch.float64)
    W = layer.materialize(z)[0]
    torch.testing.assert_close(layer.weight_norm_sq(z), W.square().sum((1, 2)))


def test_weight_norm_sq_gradients():
    layer = filled(2, 3, 4)
    z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    names = ("weight", "base_weight")

    def norm(z, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (z,))

    layer.forward = layer.weight_norm_sq  # functional_call runs forward
    inputs = (z, *(getattr(layer, name).detach().requires_grad_() for name in names))
    assert torch.autograd.gradcheck(norm, inputs)
    assert torch.autograd.gradgradcheck(norm, inputs)


def test_weight_norm_sq_is_never_negative():
    """If the base cancels the generated weights, only rounding decides the sign."""
    for seed in range(8):
        torch.manual_seed(seed)
        layer, z = HyperLinear(64, 64, 4), torch.randn(1, 4)
        with torch.no_grad():
            layer.base_weight.copy_(-layer.materialize(z)[0][0])
        assert (layer.weight_norm_sq(z * (1 + 1e-5 * torch.randn(50, 1))) >= 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_elements", [2**22, 1000])
def test_weight_norm_sq_low_precision(dtype, chunk_elements, monkeypatch):
    """Sums are in float32, in chunks or not: the error against float64 is that of float32."""
    monkeypatch.setattr("fasthyper.nn.generated_norm._CHUNK_ELEMENTS", chunk_elements)
    torch.manual_seed(0)
    layer = filled(64, 64, 24, dtype=dtype)
    z = torch.randn(5, 24).to(dtype).requires_grad_()
    norm = layer.weight_norm_sq(z)
    assert norm.dtype == torch.float32
    exact = copy.deepcopy(layer).double()
    z64 = z.detach().double().requires_grad_()
    expected = exact.weight_norm_sq(z64)
    assert expected.max() > 2**16  # beyond float16
    torch.testing.assert_close(norm.double(), expected, rtol=1e-5, atol=0)
    (norm.sum() / 2**16).backward()
    (expected.sum() / 2**16).backward()
    # the gradients are rounded once, to the parameters' dtype
    for ours, reference in ((z, z64), *zip(layer.parameters(), exact.parameters(), strict=True)):
        if reference.grad is None:
            assert ours.grad is None
        else:
            torch.testing.assert_close(ours.grad.double(), reference.grad.to(dtype).double(), rtol=2e-2, atol=1e-2)


def test_weight_norm_sq_chunks_keep_no_float32_head(monkeypatch):
    monkeypatch.setattr("fasthyper.nn.generated_norm._CHUNK_ELEMENTS", 1000)
    layer = filled(64, 64, 24, dtype=torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer.weight_norm_sq(torch.randn(5, 24).bfloat16())
    assert max(t.numel() for t in saved if t.dtype == torch.float32) <= 24 * 24


def test_weight_norm_sq_under_autocast():
    layer, z = filled(64, 64, 24, dtype=torch.float32), torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        norm = layer.weight_norm_sq(z)
        assert torch.isfinite(layer.weight_norm_sq(z.bfloat16())).all()
    assert torch.equal(norm, layer.weight_norm_sq(z))


@pytest.mark.parametrize("method", ["materialize", "weight_norm_sq"])
def test_z_is_checked(method):
    call = getattr(HyperLinear(3, 4, 5), method)
    with pytest.raises(ValueError, match=r"z must be \(B, R\) with R = 5, got \(2, 6\)"):
        call(torch.randn(2, 6))
    with pytest.raises(ValueError, match=r"z must be \(B, R\) with R = 5, got \(5,\)"):
        call(torch.randn(5))
    with pytest.raises(TypeError, match=r"float32.*float64"):
        call(torch.randn(2, 5, dtype=torch.float64))


# transforms that work on nn.Linear


def test_vmap_over_an_ensemble():
    layers = [filled(3, 4, 5) for _ in range(3)]
    params, _ = torch.func.stack_module_state(layers)
    x, z = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    y = torch.func.vmap(lambda p: torch.func.functional_call(layers[0], p, (x, z)))(params)
    torch.testing.assert_close(y, torch.stack([layer(x, z) for layer in layers]))


def test_autocast():
    layer = HyperLinear(3, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 3), torch.randn(2, 5)).dtype == torch.bfloat16
        assert layer.double()(torch.randn(2, 3).double(), torch.randn(2, 5).double()).dtype == torch.float64


def test_checkpointed_layer():
    layer = filled(3, 4, 5)
    x, z = (torch.randn(2, n, dtype=torch.float64, requires_grad=True) for n in (3, 5))
    plain = torch.autograd.grad(layer(x, z).sum(), (x, z))
    y = torch.utils.checkpoint.checkpoint(layer, x, z, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), (x, z)), plain)


@pytest.mark.parametrize("instances", [3, 40])  # fewer than features: by W; more: by the Gram matrix
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weight_norm_sq_by_chunks_under_func(monkeypatch, instances, dtype):
    layer, z = filled(8, 8, 24, dtype=dtype), torch.randn(instances, 24).to(dtype)
    weight = layer.weight.double().detach().requires_grad_()

    def expected(z):
        return (torch.einsum("oir,br->boi", weight, z) + layer.base_weight.double()).square().sum((1, 2)).sum()

    whole = torch.func.grad(expected)(z.double())
    monkeypatch.setattr("fasthyper.nn.generated_norm._CHUNK_ELEMENTS", 100)
    by_chunks = torch.func.grad(lambda z: layer.weight_norm_sq(z).sum())(z)
    torch.testing.assert_close(by_chunks.double(), whole, rtol=0.02 if dtype == torch.bfloat16 else 1e-9, atol=1e-2)
    layer.weight_norm_sq(z).sum().backward()
    (head,) = torch.autograd.grad(expected(z.double()), weight)
    torch.testing.assert_close(
        layer.weight.grad.double(),
        head,
        rtol=0.02 if dtype == torch.bfloat16 else 1e-9,
        atol=1e-1 if dtype == torch.bfloat16 else 1e-9,
    )


@pytest.mark.parametrize("weight_map", ["abs", "softmax", torch.square])
def test_a_layer_with_a_weight_map(weight_map):
    layer = HyperLinear(4, 3, 5, weight_map=weight_map, dtype=torch.float64)
    x, z = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    W, b = layer.materialize(z)
    p = torch.einsum("br,oir->boi", z, layer.weight) + layer.base_weight
    torch.testing.assert_close(W, {"abs": p.abs(), "softmax": p.softmax(-1)}.get(weight_map, p**2))
    y = layer(x, z)
    torch.testing.assert_close(y, torch.einsum("boi,bi->bo", W, x) + b)
    torch.testing.assert_close(layer.weight_norm_sq(z), W.square().sum((1, 2)))
    torch.testing.assert_close(copy.deepcopy(layer)(x, z), y)
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x, z), y)
    assert f"weight_map={getattr(weight_map, '__name__', weight_map)}" in repr(layer)
    model = fasthyper.Hypernetwork(nn.Identity(), nn.Sequential(layer, nn.ReLU(), HyperLinear(3, 2, 5).double()))
    torch.testing.assert_close(model(x, z), model.primary[2](y.relu(), z))


def test_errors_of_weight_maps():
    with pytest.raises(ValueError, match="weight_map must be one of"):
        HyperLinear(4, 3, 5, weight_map="cube")
    with pytest.raises(TypeError, match="weight_map must be a string"):
        HyperLinear(4, 3, 5, weight_map=2)
