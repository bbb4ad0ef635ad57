"""The compiled kernels of a function of the generated weights, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fasthyper
from fasthyper import maps, planner
from fasthyper.backends import cpu, cpu_mapped
from fasthyper.backends.aten import mapped
from fasthyper.measure import peak_temporary_bytes

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"compiled CPU kernels: {cpu.unavailable()}")
ALL = (True,) * 6


class Call:
    """Random operands of B instances, and what the kernels compute of them."""

    def __init__(self, B=150, O=5, I=7, R=6, inputs_first=False, name="abs", bases=True, dtype=torch.float32, N=1):
        torch.manual_seed(B + O)
        self.name = name
        self.x, self.z, self.g = (torch.randn(*shape, dtype=dtype) for shape in ((B, N, I), (B, R), (B, N, O)))
        head = torch.randn(I, O, R, dtype=dtype).transpose(0, 1) if inputs_first else torch.randn(O, I, R, dtype=dtype)
        self.weight = head.mul_(R**-0.5)
        shapes = (O, R), (O, I), (O,)
        self.bias, self.base, self.base_bias = (torch.randn(s, dtype=dtype) if bases else None for s in shapes)

    def takes(self) -> bool:
        return cpu_mapped.takes(self.x, self.z, self.weight, self.name)

    def run(self, mask: tuple[bool, ...] = ALL, module=cpu_mapped) -> list[Tensor | None]:
        operands = self.x, self.z, self.weight, self.bias, self.base
        y = module.apply(*operands, self.base_bias, self.name)
        return [y, *module.grads(*operands, self.g, mask, self.name)]

    def exact(self) -> list[Tensor]:
        given = self.x, self.z, self.weight, self.bias, self.base, self.base_bias
        operands = [None if t is None else t.double().requires_grad_() for t in given]
        x, z, weight, bias, base, base_bias = operands
        p = torch.einsum("oir,br->boi", weight, z)
        y = torch.einsum("boi,bni->bno", maps.value(self.name, p if base is None else p + base), x)
        y = y if bias is None else y + (z @ bias.T).unsqueeze(1) + base_bias
        wanted = [t for t in operands if t is not None]
        found = iter(torch.autograd.grad(y, wanted, self.g.double()))
        return [y.detach(), *(None if t is None else next(found) for t in operands)]

    def check(self) -> None:
        names = "y", "dx", "dz", "dH", "dbias", "dW0", "db0"
        for name, got, exact in zip(names, self.run(), self.exact(), strict=True):
            if exact is not None:
                torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=2e-6 * exact.abs().max(), msg=name)


SIZES = {  # B, O, I, R
    "one number": (16, 1, 1, 1),
    "narrow": (40, 3, 1, 2),
    "odd": (150, 5, 7, 6),
    "QMIX": (200, 32, 27, 64),
    "one output": (130, 1, 32, 9),
    "several slices": (1100, 3, 5, 4),
    "tall": (33, 70, 3, 5),
    "wide": (33, 3, 70, 5),
    "many features of z": (40, 2, 3, 130),
}


@pytest.mark.parametrize("inputs_first", [False, True], ids=["outputs first", "inputs first"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_size_and_layout(sizes, inputs_first):
    call = Call(*sizes, inputs_first)
    assert call.takes()
    call.check()


@pytest.mark.parametrize("inputs_first", [False, True], ids=["outputs first", "inputs first"])
@pytest.mark.parametrize("name", cpu_mapped.NAMES)
def test_every_map(name, inputs_first):
    call = Call(name=name, inputs_first=inputs_first)
    assert call.takes()
    call.check()


@pytest.mark.parametrize("name", cpu_mapped.NAMES)
def test_maps_of_special_numbers(name):
    """Values of every size, zero, infinities and NaN give what torch's own functions give."""
    p = torch.cat([torch.linspace(-110, 95, 3001), torch.linspace(-1, 1, 2001), torch.logspace(-30, 0, 99)])
    p = torch.cat([p, -p, torch.tensor([0.0, float("inf"), -float("inf"), float("nan")])])
    call = Call(len(p), 1, 1, 1, name=name, bases=False)
    call.x, call.z, call.weight, call.g = p.new_ones(len(p), 1, 1), p[:, None], p.new_ones(1, 1, 1), call.x * 0 + 1
    y, _, dz, *_ = call.run((False, True, False, False, False, False))
    torch.testing.assert_close(y.flatten(), maps.value(name, p), rtol=5e-7, atol=1e-44, equal_nan=True)
    dp = maps.vjp(name, p.double(), torch.ones_like(p, dtype=torch.double)).float()
    atol = 2e-7 if name in ("sigmoid", "tanh") else 1e-44  # 1 - W is rounded
    torch.testing.assert_close(dz.flatten(), dp, rtol=1e-6, atol=atol, equal_nan=True)


def test_views_of_larger_tensors():
    call = Call(150, 5, 7, 6)
    plain = call.run()
    wide = lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]]
    call.x, call.z, call.weight, call.g = (wide(t) for t in (call.x, call.z, call.weight, call.g))
    call.base, call.bias = call.base.T.contiguous().T, wide(call.bias)
    assert call.takes()
    assert not call.weight.is_contiguous()
    for got, want in zip(call.run(), plain, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("wanted", range(6))
def test_one_gradient_alone(wanted):
    call = Call(1100, 3, 5, 4)
    mask = tuple(k == wanted for k in range(6))
    for k, (got, want) in enumerate(zip(call.run(mask)[1:], call.run()[1:], strict=True)):
        assert torch.equal(got, want) if k == wanted else got is None


@pytest.mark.parametrize("inputs_first", [False, True], ids=["outputs first", "inputs first"])
def test_threads_give_the_same_bits(inputs_first):
    call, before = Call(2100, 8, 9, 16, inputs_first), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = call.run()
        torch.set_num_threads(2)
        two = call.run()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


LEFT_TO_ATEN = {
    "float64": {"dtype": torch.float64},
    "a head too large to convert": {"dtype": torch.bfloat16, "O": 128, "I": 128, "R": 65},
    "several points": {"N": 3},
    "softplus": {"name": "softplus"},
    "normalize": {"name": "normalize"},
    "few instances": {"B": 3},
}


@pytest.mark.parametrize("options", LEFT_TO_ATEN.values(), ids=LEFT_TO_ATEN)
def test_aten_computes_the_rest(options):
    call = Call(**options)
    assert not call.takes()
    for got, want in zip(call.run(), call.run(module=mapped), strict=True):
        assert torch.equal(got, want)


def test_operands_without_contiguous_rows_are_left_to_aten():
    by_columns = lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2)
    call, plain = Call(), Call().run()
    for name in ("z", "weight"):
        call = Call()
        setattr(call, name, by_columns(getattr(call, name)))
        assert not call.takes()
        for got, want in zip(call.run(), plain, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_op_calls_the_kernels(monkeypatch):
    called = []

    def watched(function):
        return lambda *args: (called.append(function), function(*args))[1]

    for name in ("apply", "grads"):
        monkeypatch.setattr(cpu_mapped, name, watched(getattr(cpu_mapped, name)))
    call = Call()
    weight = call.weight.requires_grad_()
    for backend, calls in (("aten", 0), ("cpu", 2)):
        with fasthyper.use_backend(backend):
            y = fasthyper.hyper_linear(call.x[:, 0], call.z, weight, weight_map="abs")
        torch.autograd.grad(y.sum(), weight)
        assert len(called) == calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wanted", [*range(6), None])
def test_parts_of_16_bits(wanted, dtype, monkeypatch):
    """Each result is rounded once, also if there are several parts."""
    monkeypatch.setattr(cpu_mapped, "_parts", lambda x, weight, limit: mapped.blocks(len(x), 70))
    call = Call(dtype=dtype)
    assert call.takes()
    mask = ALL if wanted is None else tuple(k == wanted for k in range(6))
    y, *got = call.run(mask)
    for t, exact, k in zip((y, *got), call.exact(), (True, *mask), strict=True):
        assert (t is not None) == k
        if t is not None:
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(t.double(), exact, rtol=2 * eps, atol=2 * eps * exact.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_small_workspace_is_enough(dtype):
    call = Call(1100, 16, 15, 8, dtype=dtype)
    want, limit = call.run(), planner.get_workspace_limit()
    results = sum(t.nbytes for t in want)
    planner.set_workspace_limit(1 << 20)
    try:
        got = call.run()
        assert peak_temporary_bytes(call.run) <= results + (1 << 20)
    finally:
        planner.set_workspace_limit(limit)
    for a, b in zip(got, want, strict=True):
        close = 1e-4 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps * b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=close, atol=close)
