import copy
import pickle

import pytest
import torch
from torch import nn

from fasthyper.nn import Bilinear


def pair(*args, dtype=torch.float64, **kwargs):
    """Return our layer and torch's, with the same parameters."""
    theirs = nn.Bilinear(*args, dtype=dtype, **kwargs)
    ours = Bilinear(*args, dtype=dtype, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(), (4,), (0,), (1,), (2, 3), (2, 0, 3), (2, 1, 3, 2)])
def test_forward_and_gradients(lead, bias):
    ours, theirs = pair(5, 6, 8, bias=bias)
    results = []
    x, z = torch.randn(*lead, 5, dtype=torch.float64), torch.randn(*lead, 6, dtype=torch.float64)
    g = torch.randn(*lead, 8, dtype=torch.float64)
    for module in (ours, theirs):
        inputs = [t.clone().requires_grad_() for t in (x, z)]
        y = module(*inputs)
        results.append((y, *torch.autograd.grad(y, [*inputs, *module.parameters()], g)))
    torch.testing.assert_close(*results)


def test_second_order():
    ours, _ = pair(3, 4, 2)
    inputs = [torch.randn(5, n, dtype=torch.float64, requires_grad=True) for n in (3, 4)]
    assert torch.autograd.gradcheck(ours, inputs)
    assert torch.autograd.gradgradcheck(ours, inputs)


def test_non_contiguous():
    ours, theirs = pair(7, 7, 5)
    g = torch.randn(4, 10, 5, dtype=torch.float64)
    x, z = (torch.randn(4, 7, 10, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y = ours(x.transpose(1, 2), z.transpose(1, 2))
    expected = theirs(x.transpose(1, 2).contiguous(), z.transpose(1, 2).contiguous())
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, (x, z), g), torch.autograd.grad(expected, (x, z), g))


def test_expanded():
    ours, theirs = pair(5, 6, 8)
    x, z = torch.randn(1, 5).double().expand(9, 5), torch.randn(9, 1).double().expand(9, 6)
    torch.testing.assert_close(ours(x, z), theirs(x, z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    ours, _ = pair(5, 6, 8, dtype=dtype)
    x, z = torch.randn(9, 5, dtype=dtype), torch.randn(9, 6, dtype=dtype)
    y = ours(x, z)
    assert y.dtype == dtype
    exact = copy.deepcopy(ours).double()(x.double(), z.double())
    torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_state_dict_both_ways():
    ours, theirs = Bilinear(5, 6, 8), nn.Bilinear(5, 6, 8)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    other = nn.Bilinear(5, 6, 8)
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other.weight, theirs.weight)
    assert torch.equal(other.bias, theirs.bias)


@pytest.mark.parametrize("bias", [False, True])
def test_same_initialisation_and_repr(bias):
    torch.manual_seed(3)
    ours = Bilinear(5, 6, 8, bias=bias)
    torch.manual_seed(3)
    theirs = nn.Bilinear(5, 6, 8, bias=bias)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert repr(ours) == repr(theirs)
    assert (ours.bias is None) == (not bias)
    assert ours.__constants__ == theirs.__constants__


def test_construction():
    with pytest.raises(ValueError, match="in1_features must be > 0"):
        Bilinear(0, 0, 0)
    assert Bilinear(2, 3, 4, False, "meta", torch.float16).weight.is_meta
    assert nn.utils.skip_init(Bilinear, 2, 3, 4).weight.shape == (4, 2, 3)


def test_copies():
    ours = Bilinear(5, 6, 8)
    x, z = torch.randn(9, 5), torch.randn(9, 6)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x, z), ours(x, z))


@pytest.mark.parametrize(
    ("x", "z", "message"),
    [
        ((3, 4), (3, 6), r"input1 must be \(\*, 5\), got \(3, 4\)"),
        ((), (6,), r"input1 must be \(\*, 5\), got \(\)"),
        ((3, 5), (3, 5), r"input2 must be \(\*, 6\), got \(3, 5\)"),
        ((3, 5), (), r"input2 must be \(\*, 6\), got \(\)"),
        ((3, 5), (1, 6), r"leading sizes, got \(3, 5\) and \(1, 6\)"),
        ((2, 3, 5), (6, 6), r"leading sizes, got \(2, 3, 5\) and \(6, 6\)"),
        ((3, 5), (6,), r"leading sizes, got \(3, 5\) and \(6,\)"),
    ],
)
def test_wrong_sizes(x, z, message):
    with pytest.raises(ValueError, match=message):
        Bilinear(5, 6, 8)(torch.randn(x), torch.randn(z))


def test_wrong_dtypes():
    with pytest.raises(TypeError):
        Bilinear(5, 6, 8)(torch.randn(3, 5), torch.randn(3, 6, dtype=torch.float64))
    with pytest.raises(TypeError):
        Bilinear(5, 6, 8)(torch.ones(3, 5, dtype=torch.int64), torch.randn(3, 6))


def test_compiled_with_leading_sizes():
    ours, theirs = pair(5, 6, 8)
    f = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for lead in ((2, 3), (4, 5)):
        x, z = torch.randn(*lead, 5, dtype=torch.float64), torch.randn(*lead, 6, dtype=torch.float64)
        torch.testing.assert_close(f(x, z), theirs(x, z))


def test_vmap():
    ours, theirs = pair(5, 6, 8)
    x, z = torch.randn(4, 3, 5, dtype=torch.float64), torch.randn(4, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(ours)(x, z), theirs(x, z))
