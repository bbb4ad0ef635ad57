"""Shared fixtures: random tensors with any strides, a float64 einsum oracle independent of the package, tiny tiles."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from importlib.metadata import version
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from torch import Tensor

import fasthyper
from fasthyper import backends, planner, processor
from fasthyper.backends import cuda, triton
from fasthyper.problem import SCHEDULES, TERM_SCHEDULES

settings.register_profile(
    "fasthyper", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fasthyper")

DEVICE = os.environ.get("FASTHYPER_TEST_DEVICE", "cpu")
"""The device of the factors; `make gpu` sets it to `cuda`."""


def _mend_interpreter() -> None:
    """Let the interpreter of Triton 3.6 count to a number in a tensor, which numpy 2.4 refuses, as later ones do."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda t: int(t.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_lang_tensor


if triton.interpreting() and triton.unavailable() is None and version("triton").startswith("3.6."):
    _mend_interpreter()


def _hows() -> Iterator[tuple[str, str | None]]:
    """Yield every backend that runs here with every schedule; if the CPU emulates a GPU, only that GPU backend."""
    emulated = "triton" if triton.interpreting() else "cuda" if cuda.emulating() else None
    for name, module in backends.BACKENDS.items():
        devices = module.devices()
        elsewhere = devices is not None and DEVICE not in devices
        if emulated and DEVICE == "cpu":
            elsewhere = name != emulated
        if not elsewhere and module.unavailable() is None:
            yield from ((name, s) for s in ((None,) if name == "materialised" else (None, *SCHEDULES)))


HOWS = list(_hows())
EMULATED = DEVICE == "cpu" and (triton.interpreting() or cuda.emulating())
# An interpreter is too slow for these tests; tests/backends/test_triton_terms.py has smaller ones.
ORDERS = [
    (name, schedule)
    for name in dict.fromkeys(name for name, schedule in HOWS if schedule and not EMULATED)
    for schedule in (None, *TERM_SCHEDULES)
]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(autouse=True)
def nothing_forced():
    """Reset backend and workspace limit after each test, and check that no backend stays forced in the thread."""
    torch.manual_seed(0)
    yield
    fasthyper.set_backend("auto")
    fasthyper.set_workspace_limit(32 << 20)
    assert backends.current() == backends.Choice()


@pytest.fixture(scope="session", params=HOWS, ids=["-".join(filter(None, how)) for how in HOWS])
def how(request) -> tuple[str, str | None]:
    """Return arguments of `use_backend`: every backend with every schedule."""
    return request.param


@pytest.fixture(scope="session", params=ORDERS, ids=["-".join(filter(None, order)) for order in ORDERS])
def order(request) -> tuple[str, str | None]:
    """Return arguments of `use_backend`: every backend with every schedule over terms."""
    return request.param


@pytest.fixture(scope="session", params=DTYPES, ids=[str(dtype).split(".")[1] for dtype in DTYPES])
def dtype(request) -> torch.dtype:
    return request.param


# B, N, R, I, O of a small problem. All differ, so that tests notice swapped axes.
SIZES = (4, 2, 5, 3, 6)
AXES = {"x": "bni", "z": "br", "weight": "oir", "g": "bno", "bias": "or", "base_weight": "oi", "base_bias": "o"}
FACTORS = ("x", "z", "weight", "g")
AFFINE = ("x", "z", "weight", "bias", "base_weight", "base_bias")


def _shape(name: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    size = dict(zip("bnrio", sizes, strict=True))
    return tuple(size[axis] for axis in AXES[name])


def _strided(t: Tensor, name: str, strides: str) -> Tensor:
    """Return the tensor with other strides: the same shape and, except for `expanded`, the same values."""
    if strides == "expanded":  # the batch shares x and z; g as in sum().backward()
        if name == "g":
            return t.flatten()[:1].view(1, 1, 1).expand(t.shape) if t.numel() else t
        return t[:1].expand(t.shape) if name in ("x", "z") and len(t) else t
    if strides == "transposed":
        return t.permute(*range(t.dim())[::-1]).contiguous().permute(*range(t.dim())[::-1])
    if strides == "swapped":  # the two outer axes: a transposed head, points before instances
        return t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else t
    if strides == "sliced":
        wide = t.new_full([2 * n + 1 for n in t.shape], float("nan"))
        view = wide[tuple(slice(1, None, 2) for _ in t.shape)]
        view.copy_(t)
        return view
    assert strides == "contiguous"
    return t


class Factors:
    """Makes random factors by name."""

    SIZES, STRIDES = SIZES, ("contiguous", "transposed", "swapped", "sliced", "expanded")
    NAMES, AFFINE, DEVICE = FACTORS, AFFINE, DEVICE

    def __call__(
        self,
        sizes: tuple[int, ...] = SIZES,
        dtype: torch.dtype = torch.float64,
        names: tuple[str, ...] = FACTORS,
        strides: str = "contiguous",
        requires_grad: bool = False,
        lead: int | None = None,
    ) -> list[Tensor]:
        """Return factors of sizes (B, N, R, I, O); `lead` is the size of an extra leading dimension."""
        front = () if lead is None else (lead,)
        ts = [torch.randn(*front, *_shape(name, sizes), dtype=torch.float64).to(DEVICE, dtype) for name in names]
        ts = [_strided(t, name, strides) for t, name in zip(ts, names, strict=True)]
        return [t.requires_grad_(requires_grad) for t in ts]


@pytest.fixture(scope="session")
def factors() -> Factors:
    return Factors()


class Oracle:
    """The defining sum as a float64 einsum. The sum of absolute values is the scale of its rounding errors."""

    OPS: ClassVar = {"apply": "bni,br,oir->bno", "cond_grad": "bni,bno,oir->br", "weight_grad": "bni,br,bno->oir"}
    INPUTS: ClassVar = {"apply": (0, 1, 2), "cond_grad": (0, 3, 2), "weight_grad": (0, 1, 3)}

    @staticmethod
    def op(name: str, *tensors: Tensor) -> Tensor:
        return torch.einsum(Oracle.OPS[name], *(t.detach().double() for t in tensors))

    @staticmethod
    def grads(x: Tensor, z: Tensor, weight: Tensor, g: Tensor) -> list[Tensor]:
        x, z, weight, g = (t.detach().double() for t in (x, z, weight, g))
        dx = torch.einsum("bno,br,oir->bni", g, z, weight)
        return [dx, Oracle.op("cond_grad", x, g, weight), Oracle.op("weight_grad", x, z, g)]

    @staticmethod
    def linear(x, z, weight, bias=None, base_weight=None, base_bias=None) -> Tensor:
        """Return y in the dtype of the arguments, differentiable and without W."""
        y = torch.einsum("bni,br,oir->bno", x, z, weight)
        if bias is not None:
            y = y + torch.einsum("br,or->bo", z, bias)[:, None]
        if base_weight is not None:
            y = y + torch.einsum("bni,oi->bno", x, base_weight)
        return y if base_bias is None else y + base_bias

    @staticmethod
    def linear_grads(x, z, weight, bias, base_weight, g) -> list[Tensor]:
        """Return dx, dz, dH, dbias, dW0, db0."""
        dx, dz, dh = Oracle.grads(x, z, weight, g)
        x, z, bias, base_weight, g = (t.detach().double() for t in (x, z, bias, base_weight, g))
        return [
            dx + torch.einsum("bno,oi->bni", g, base_weight),
            dz + torch.einsum("bno,or->br", g, bias),
            dh,
            torch.einsum("bno,br->or", g, z),
            torch.einsum("bno,bni->oi", g, x),
            torch.einsum("bno->o", g),
        ]

    @staticmethod
    def check(actual: Tensor, truth: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        """Assert shape, dtype, contiguity, and an error within the rounding of `dtype` relative to `scale`."""
        assert actual.shape == truth.shape
        assert actual.dtype == dtype
        assert actual.is_contiguous()
        info = torch.finfo(dtype)
        # In float64 and float32, errors add up over the sum; in 16 bits, only terms and results are rounded.
        allowed = (16 if info.bits > 16 else 4) * info.eps * scale + 16 * info.eps * info.smallest_normal
        excess = (actual.detach().double() - truth).abs() - allowed
        assert not excess.isnan().any()
        worst = excess.max().item() if excess.numel() else 0.0
        assert worst <= 0, f"the error exceeds rounding by {worst:.3g}"

    def check_op(self, name: str, actual: Tensor, *tensors: Tensor) -> None:
        scale = self.op(name, *(t.detach().abs() for t in tensors))
        self.check(actual, self.op(name, *tensors), scale, tensors[0].dtype)

    def check_all(self, actual, formula, *tensors: Tensor) -> None:
        """Check all results of a formula such as `linear_grads`."""
        absolute = [t.detach().abs() for t in tensors]
        for got, truth, scale in itertools.zip_longest(actual, formula(*tensors), formula(*absolute)):
            self.check(got, truth, scale, tensors[0].dtype)

    def check_linear(self, args: list[Tensor], results) -> None:
        """Check y and the gradients of x, z, H, bias, W0 and b0; `args` are x, z, weight, bias, base_weight, g."""
        y = lambda tensors: self.linear(*(t.detach().double() for t in tensors[:5]))
        self.check(results[0], y(args), y([t.abs() for t in args]), args[0].dtype)
        self.check_all(results[1:], self.linear_grads, *args)


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle()


@contextlib.contextmanager
def _planning(module=planner, **replaced) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in replaced.items():
            patch.setattr(module, name, value)
        planner.forget()
        yield
    planner.forget()


@pytest.fixture(scope="session")
def tiles():
    """Return `tiles`: `with tiles(7):` limits tiles to 7 elements, so that loops over tiles run more than once."""
    return lambda elements: _planning(tile_elements=lambda problem, mach, limit: elements)


@pytest.fixture(scope="session")
def native_low_precision():
    """Return a context manager: given True, tiles are computed in 16 bits, as on a CPU with 16-bit products."""
    return lambda native: _planning(processor, has_fast=lambda dtype: native)


class Fusing:
    """Methods of a backend that fuses a primary, computed in float64; `mark` is added to `a` to recognise it."""

    SIGMA: ClassVar = {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "silu": F.silu, "gelu": F.gelu}

    def __init__(self) -> None:
        self.mark = 0.25
        self.calls: list[str] = []
        self.layers: list[tuple] = []
        self.masks: list[tuple[bool, ...]] = []
        self.refused: set[object] = set()  # activations and sizes

    @property
    def ran(self) -> list[str]:
        return [call for call in self.calls if call != "fuses"]

    def fuses(self, x, z, first, second, activation):
        self.calls.append("fuses")
        assert x.dim() == 3
        assert len(first) == len(second) == 4
        return not self.refused & {activation, *x.shape}

    def primary(self, x, z, first, second, activation):
        self.calls.append("primary")
        self.layers.append((first, second))
        x_, z_, *parts = (t if t is None else t.double() for t in (x, z, *first, *second))
        a = Oracle.linear(x_, z_, *parts[:4])
        y = Oracle.linear(self.SIGMA[activation](a), z_, *parts[4:])
        return y.to(x.dtype).contiguous(), (a + self.mark).to(x.dtype).contiguous()

    def primary_grads(self, x, z, first, second, activation, a, g, mask):
        self.calls.append("primary_grads")
        self.layers.append((first, second))
        self.masks.append(mask)
        self.a = a
        (J, I, R), O = first[0].shape, second[0].shape[0]
        shapes = (x.shape, z.shape, (J, I, R), (J, R), (J, I), (J,), (O, J, R), (O, R), (O, J), (O,))
        given = [x.new_zeros(s) if t is None else t for s, t in zip(shapes, (x, z, *first, *second), strict=True)]
        # NaN stands for what no gradient reads. The line with `- h` reads all, and takes its value off again.
        leaves = [t.detach().double().nan_to_num().requires_grad_() for t in given]
        with torch.inference_mode(False), torch.enable_grad():  # a backend runs without autograd
            h = Oracle.linear(*leaves[:6])
            h = h + (a.double() - self.mark - h).detach()  # the saved value of a, with the gradient of h
            y = Oracle.linear(self.SIGMA[activation](h), leaves[1], *leaves[6:])
            out = torch.autograd.grad(y, leaves, g.double())
        return tuple(d.to(x.dtype).contiguous() if k else None for d, k in zip(out, mask, strict=True))


@pytest.fixture
def fusing(monkeypatch) -> Fusing:
    """Make the backend that auto chooses here one that fuses."""
    fake, best = Fusing(), backends.backend("auto", torch.device(DEVICE))
    for method in ("fuses", "primary", "primary_grads"):
        monkeypatch.setattr(best, method, getattr(fake, method), raising=False)
    return fake
