from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fasthyper
from fasthyper.nn import PairwiseBilinear

ONES = [(False, False), (True, False), (False, True), (True, True)]


def layer_and_inputs(ones=(False, False), lead=(2,), bias=True, dtype=torch.float64):
    layer = PairwiseBilinear(5, 6, 8, bias, bias_x=ones[0], bias_y=ones[1], dtype=dtype)
    x = torch.randn(*lead, 3, 5, dtype=dtype, requires_grad=True)
    return layer, x, torch.randn(*lead, 4, 6, dtype=dtype, requires_grad=True)


def padded(t, one):
    return torch.cat([t, t.new_ones(*t.shape[:-1], int(one))], -1)


def by_loop(layer, x, z):
    """Return the scores of two matrices pair by pair, as torch.nn.functional.bilinear computes them."""
    x, z = padded(x, layer.bias_x), padded(z, layer.bias_y)
    rows = [torch.stack([nn.functional.bilinear(a, b, layer.weight, layer.bias) for b in z]) for a in x]
    return torch.stack(rows)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ones", ONES)
def test_every_pair_and_gradients(ones, bias):
    layer, x, z = layer_and_inputs(ones, bias=bias)
    g = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    expected = torch.stack([by_loop(layer, a, b) for a, b in zip(x, z, strict=True)])
    y = layer(x, z)
    torch.testing.assert_close(y, expected)
    leaves = [x, z, *layer.parameters()]
    assert len(leaves) == 3 + bias
    torch.testing.assert_close(torch.autograd.grad(y, leaves, g), torch.autograd.grad(expected, leaves, g))


@pytest.mark.parametrize("ones", ONES[1:])
def test_an_appended_one_is_a_column_of_ones(ones):
    layer, x, z = layer_and_inputs(ones)
    wide = PairwiseBilinear(5 + ones[0], 6 + ones[1], 8, dtype=torch.float64)
    wide.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x, z), wide(padded(x, ones[0]), padded(z, ones[1])))


@pytest.mark.parametrize("lead", [(), (0,), (2,), (2, 3), (2, 0, 3)])
def test_leading_dimensions(lead):
    layer, x, z = layer_and_inputs((True, True), lead)
    y = layer(x, z)
    assert y.shape == (*lead, 3, 4, 8)
    assert y.is_contiguous()
    expected = torch.einsum("...mi,oir,...nr->...mno", padded(x, True), layer.weight, padded(z, True)) + layer.bias
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_the_inputs_of_torch_modules_that_are_not_contiguous():
    layer, x, z = layer_and_inputs()
    x, z = (t.detach().transpose(0, 1).contiguous().transpose(0, 1) for t in (x, z))
    torch.testing.assert_close(layer(x, z), layer(x.contiguous(), z.contiguous()))


def test_second_order():
    layer, x, z = layer_and_inputs((True, False))
    assert torch.autograd.gradcheck(layer, (x, z))
    assert torch.autograd.gradgradcheck(layer, (x, z))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    layer, x, z = layer_and_inputs((True, True), dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        y = layer(x, z.to(torch.bfloat16))
    y.float().sum().backward()
    assert y.dtype == dtype
    assert x.grad.dtype == z.grad.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x, z), rtol=5e-2, atol=5e-2)
    assert layer.double()(x.double(), z.double()).dtype == torch.float64
    with torch.autocast("cpu", dtype):
        assert layer(x.double(), z.double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    layer, x, z = layer_and_inputs((True, True), dtype=dtype)
    y = layer(x, z)
    assert y.dtype == dtype
    exact = copy.deepcopy(layer).double()(x.double(), z.double())
    torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


def test_state_dict_of_torch_bilinear():
    theirs = nn.Bilinear(6, 7, 8, dtype=torch.float64)
    layer, x, z = layer_and_inputs((True, True))
    layer.load_state_dict(theirs.state_dict())
    a, b = padded(x, True)[:, :, None].expand(2, 3, 4, 6), padded(z, True)[:, None].expand(2, 3, 4, 7)
    torch.testing.assert_close(layer(x, z), theirs(a.contiguous(), b.contiguous()))


def test_state_dict_with_outputs_last():
    weight = torch.randn(6, 7, 8, dtype=torch.float64)
    layer, x, z = layer_and_inputs((True, True), bias=False)
    layer.load_state_dict({"weight": weight.permute(2, 0, 1)})
    torch.testing.assert_close(layer(x, z), torch.einsum("bmi,iro,bnr->bmno", padded(x, True), weight, padded(z, True)))


@pytest.mark.parametrize("bias", [False, True])
def test_same_initialisation_as_torch_bilinear(bias):
    torch.manual_seed(3)
    ours = PairwiseBilinear(5, 6, 8, bias, bias_x=True)
    torch.manual_seed(3)
    theirs = nn.Bilinear(6, 6, 8, bias)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert (ours.bias is None) == (not bias)


def test_construction():
    assert PairwiseBilinear(2, 3, 4, False, device="meta", dtype=torch.float16).weight.is_meta
    assert nn.utils.skip_init(PairwiseBilinear, 2, 3, 4, bias_y=True).weight.shape == (4, 2, 4)
    assert "in1_features=2, in2_features=3, out_features=4, bias=True, bias_x=False, bias_y=True" in repr(
        PairwiseBilinear(2, 3, 4, bias_y=True)
    )
    with pytest.raises(ValueError, match="in2_features must not be negative, got -3"):
        PairwiseBilinear(2, -3, 4)
    with pytest.raises(TypeError, match=r"out_features must be an integer, got 4\.0"):
        PairwiseBilinear(2, 3, 4.0)


def test_copies():
    layer, x, z = layer_and_inputs((True, False))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x, z), layer(x, z))


@pytest.mark.parametrize(
    ("x", "z", "message"),
    [
        ((3, 4), (4, 6), r"input1 must have shape \(\*, M, 5\), got \(3, 4\)"),
        ((5,), (4, 6), r"input1 must have shape \(\*, M, 5\), got \(5,\)"),
        ((3, 5), (4, 7), r"input2 must have shape \(\*, N, 6\), got \(4, 7\)"),
        ((2, 3, 5), (3, 4, 6), r"input1 and input2 must have the same sizes .* got \(2, 3, 5\) and \(3, 4, 6\)"),
        ((2, 3, 5), (4, 6), r"input1 and input2 must have the same sizes .* got \(2, 3, 5\) and \(4, 6\)"),
    ],
)
def test_wrong_sizes(x, z, message):
    with pytest.raises(ValueError, match=message):
        PairwiseBilinear(5, 6, 8)(torch.randn(x), torch.randn(z))


def test_wrong_types():
    layer = PairwiseBilinear(5, 6, 8)
    with pytest.raises(TypeError, match=r"input2 must have the dtype of input1: input2 has shape \(4, 6\)"):
        layer(torch.randn(3, 5), torch.randn(4, 6, dtype=torch.float64))
    with pytest.raises(TypeError, match="weight must have the dtype of input1"):
        layer(torch.randn(3, 5).double(), torch.randn(4, 6).double())
    with pytest.raises(TypeError, match="input1 must be a tensor, got list"):
        layer([1.0], torch.randn(4, 6))


def test_compiled():
    layer, *_ = layer_and_inputs((True, True))
    f = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for lead, m, n in (((2,), 3, 4), ((5,), 6, 3), ((2, 3), 4, 5)):
        x = torch.randn(*lead, m, 5, dtype=torch.float64)
        z = torch.randn(*lead, n, 6, dtype=torch.float64)
        torch.testing.assert_close(f(x, z), layer(x, z))


def test_vmap():
    layer, x, z = layer_and_inputs((True, True), (4, 2))
    torch.testing.assert_close(torch.func.vmap(layer)(x, z), layer(x, z))


@pytest.mark.parametrize("schedule", ["generate", "project"])
def test_the_schedule_of_a_call(schedule):
    layer, x, z = layer_and_inputs((True, True))
    expected = layer(x, z)
    with fasthyper.use_backend("aten", schedule):
        torch.testing.assert_close(layer(x, z), expected)
