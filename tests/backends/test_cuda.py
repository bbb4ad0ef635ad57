"""The CUDA kernels: blocks, splits, and the calls that other backends compute. test_kernels.py tests their results.

They run on a GPU if there is one; else in the emulator of csrc/cuda, in a separate run of `make test`.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import fasthyper
from fasthyper import compiled, planner
from fasthyper.backends import cuda
from fasthyper.backends.cuda import library, primaries

ready = pytest.mark.skipif(cuda.unavailable() is not None, reason=f"CUDA kernels: {cuda.unavailable()}")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("x", "z", "weight", "bias", "base_weight", "g")
ALL = (True,) * 6


def everything(x, z, weight, bias, base_weight, g):
    """Return y, dx, dz, dH and the gradients of bias, W0, b0."""
    y = cuda.apply(x, z, weight, bias, base_weight, schedule="fold")
    return y, *cuda.grads(x, z, weight, bias, base_weight, g, ALL, schedule="fold")


@pytest.fixture
def launches(monkeypatch):
    """Return the calls of the operators that launch kernels, by name and arguments."""
    seen, ops = [], library.ops()

    class Ops:
        def __getattr__(self, name):
            op = getattr(ops, name)

            def call(*args):
                seen.append((name, args))
                return op(*args)

            return call if name in ("apply", "grads", "primary", "primary_grads") else op

    recorded = Ops()
    monkeypatch.setattr(library, "ops", lambda: recorded)
    return seen


@pytest.fixture
def force():
    """Return a function that changes a number by which calls are divided, until the end of the test."""
    before = {}

    def change(**numbers):
        for name, value in numbers.items():
            before.setdefault(name, library.ops().force(name, value))
            library.fits.cache_clear()
            library.fits_primary.cache_clear()

    yield change
    change(**before)


@pytest.fixture
def ops():
    """Return the operators of any library that can be loaded: no kernel runs."""
    for name in ("cuda_emulated", "cuda"):
        if compiled.load(name) is None:
            return getattr(torch.ops, f"fasthyper_{name}")
    pytest.skip(f"CUDA kernels: {compiled.load('cuda_emulated')}")


@ready
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        ((33, 1, 20, 60, 10), 64),  # the sums of y, dz and the parameters' gradients are split
        ((6, 50, 70, 40, 33), 64),  # the same with several points
        ((300, 1, 100, 5, 70), 2),  # blocks of many rows
        ((5, 60, 30, 40, 12), 2),
    ],
    ids=str,
)
def test_few_and_many_blocks(sizes, count, dtype, factors, oracle, force):
    force(processors=count)
    args = factors(sizes, dtype, NAMES)
    oracle.check_linear(args, everything(*args))


@ready
@pytest.mark.parametrize("sizes", [(8500, 1, 3, 4, 2), (8500, 1, 3, 80, 2)], ids=str)
def test_blocks_continue_with_further_rows(sizes, factors, oracle, force):
    """The tiles of H stay in shared memory, or do not fit there."""
    force(processors=1000, least_work=1 << 30)  # so that blocks have few rows, and not all run at once
    x, z, weight, *_ = factors(sizes, torch.bfloat16)
    oracle.check_op("apply", cuda.apply(x, z, weight, schedule="fold"), x, z, weight)


@ready
@pytest.mark.parametrize("mask", list(itertools.product((False, True), repeat=6))[1:], ids=str)
def test_every_mask(mask, factors):
    x, z, weight, bias, base_weight, g = factors((20, 2, 6, 7, 9), torch.float32, NAMES)
    every = cuda.grads(x, z, weight, bias, base_weight, g, ALL, schedule="fold")
    some = cuda.grads(x, z, weight, bias, base_weight, g, mask, schedule="fold")
    for wanted, expected, got in zip(mask, every, some, strict=True):
        assert (got is not None) == wanted
        if wanted:
            torch.testing.assert_close(got, expected)


@ready
def test_one_call_is_one_launch_each_way(factors, launches):
    """One call of an operator computes y with bias and base, and another all six gradients."""
    args = factors((40, 1, 16, 5, 6), torch.float32, (*NAMES[:5], "base_bias", "g"))
    tensors = [t.requires_grad_() for t in args[:-1]]
    x, z, weight, bias, base_weight, base_bias = tensors
    with fasthyper.use_backend("cuda"):
        y = fasthyper.hyper_linear(x[:, 0], z, weight, bias, base_weight=base_weight, base_bias=base_bias)
    torch.autograd.grad(y, tensors, args[-1][:, 0])
    assert [name for name, _ in launches] == ["apply", "grads"]


@ready
def test_float32_is_as_exact_as_torch_is_asked_to_be(factors):
    x, z, weight = factors((50, 1, 64, 20, 20), torch.float32, NAMES[:3])
    exact = torch.einsum("bni,br,oir->bno", x.double(), z.double(), weight.double())
    errors = {}
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            y = cuda.apply(x, z, weight, schedule="fold")
            errors[precision] = ((y - exact).norm() / exact.norm()).item()
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors["highest"] < 1e-6
    assert 1e-5 < errors["high"] < 2e-3


@ready
@pytest.mark.parametrize("neighbour", ["before", "behind"])
def test_numbers_beside_a_factor_are_not_read(neighbour, factors, oracle):
    """They are NaN: they would change results even if they were multiplied by zero."""
    args = []
    for t in factors((20, 1, 20, 7, 9), torch.bfloat16, NAMES):
        room = t.new_full((t.numel() + 64,), float("nan"))
        at = 64 if neighbour == "before" else 0
        inside = room[at : at + t.numel()].view_as(t)
        args.append(inside.copy_(t))
    oracle.check_linear(args, everything(*args))


@ready
def test_problems_that_do_not_fit_go_to_another_backend(factors, oracle, monkeypatch, launches):
    args = factors((30, 8, 20, 7, 9), torch.float32, NAMES)
    with monkeypatch.context() as patch:
        patch.setattr(planner, "get_workspace_limit", lambda: 2000)  # dz of several points has partial sums
        oracle.check_linear(args, everything(*args))
    assert [name for name, _ in launches] == ["apply"]
    wide = factors((3, 1, 4, 5, 3000), torch.float32, NAMES)  # g of a block does not fit beside H
    oracle.check_linear(wide, everything(*wide))
    assert [name for name, _ in launches] == ["apply", "apply"]


def test_sizes_that_an_int_does_not_count_are_not_taken(ops):
    """Neither by the operators, which would overflow, nor by the backend."""
    fits = lambda *sizes, itemsize=2, mask=3: ops.fits(0, *sizes, itemsize, mask, 32 << 20)
    assert fits(1, 1, 1, 1, 64)
    for power in range(14, 40):
        for itemsize, mask in ((2, 3), (4, 3), (2, 1), (4, 2)):
            assert not fits(1, 1, 1, 1, 1 << power, itemsize=itemsize, mask=mask), power
    assert not fits(1, (1 << 31) - 8, 1, 1, 1, mask=4)
    assert not fits(1 << 20, 1 << 11, 1, 1, 1, mask=4)
    problem = planner.Problem("apply", 1, 1, 1, 1, 1, torch.bfloat16, "cuda")
    assert cuda.takes(problem)
    for large in ({"points": (1 << 31) - 8}, {"batch": (1 << 31) - 8}, {"out_features": (65535 * 64) + 1}):
        assert not cuda.takes(problem._replace(**large))


@ready
def test_more_outputs_than_a_grid_has_blocks_for(launches):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    most = 65535 * 64
    weight = torch.arange(most + 2.0, device=device)[:, None, None]
    ones = torch.ones(1, 1, device=device)
    y = cuda.apply(ones[None], ones, weight[: most + 1], schedule="fold")
    assert not launches
    assert torch.equal(y.flatten(), weight[: most + 1].flatten())
    with pytest.raises(RuntimeError, match="more than a grid has blocks for"):
        library.ops().apply(ones[None], ones, weight[: most + 1], None, None, None, y, 32 << 20, False)


SIZES = {"B": 4, "N": 2, "R": 3, "I": 5, "J": 7, "O": 6}
LAYER, OTHER = ("OIR", "OR", "OI", "O"), ("JIR", "JR", "JI", "J")  # of one layer; of the first of two
SECOND = ("OJR", "OR", "OJ", "O")
ARGUMENTS = {
    "apply": ("BNI", "BR", *LAYER, "BNO"),
    "grads": ("BNI", "BR", *LAYER[:3], "BNO", "BNI", "BR", *LAYER),
    "primary": ("BNI", "BR", *OTHER, *SECOND, "BNJ", "BNO"),
    "primary_grads": ("BNI", "BR", *OTHER[:3], *SECOND[:3], "BNJ", "BNO", "BNI", "BR", *OTHER, *SECOND),
}
RESULTS = {"apply": 1, "grads": 6, "primary": 2, "primary_grads": 10}
WRONG = {
    "another dtype": lambda t: t.half(),
    "float64": lambda t: t.double(),
    "a shorter row": lambda t: t[..., :1].contiguous(),
    "a longer row": lambda t: torch.cat((t, t), -1),
    "more rows": lambda t: torch.cat((t, t)),
    "one axis": lambda t: t.flatten(),
    "no axis": lambda t: t.sum(),
    "another axis": lambda t: t[None],
    "empty": lambda t: t[:0],
}


@ready
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_operators_refuse_tensors_that_do_not_fit(name, wrong):
    """Whoever calls them: kernels would read or write beyond the tensors."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    good = [torch.randn([SIZES[axis] for axis in axes], device=device) for axes in ARGUMENTS[name]]
    op = getattr(library.ops(), name)
    options = (32 << 20, False, *((1,) if name.startswith("primary") else ()))
    op(*good, *options)
    for k, t in enumerate(good):
        other = WRONG[wrong](t)
        if other.shape == t.shape and other.dtype == t.dtype:
            continue
        with pytest.raises(RuntimeError):
            op(*good[:k], other, *good[k + 1 :], *options)
    for k in range(len(good) - RESULTS[name], len(good)):
        spread = torch.randn(*good[k].shape, 2, device=device)[..., 0]
        with pytest.raises(RuntimeError, match="must be contiguous"):
            op(*good[:k], spread, *good[k + 1 :], *options)


@ready
def test_gradients_need_the_factors_that_they_read(factors):
    x, z, weight, bias, base_weight, g = factors((4, 2, 3, 5, 6), torch.float32, NAMES)
    sizes, options = (x, z, weight, bias, base_weight, base_weight[:, 0]), (32 << 20, False)
    for k in range(6):
        out = [torch.empty_like(t).contiguous() if i == k else None for i, t in enumerate(sizes)]
        for missing in (0, 1):
            needed = k in ((0, 2, 3), (0, 1))[missing]
            args = [x, z, weight, bias, base_weight, g]
            args[1 + missing] = None
            if needed:
                with pytest.raises(RuntimeError, match=r"need (z|the weight)"):
                    library.ops().grads(*args, *out, *options)
            else:
                library.ops().grads(*args, *out, *options)


def test_auto_does_not_take_it(monkeypatch):
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    for device in ("cuda", "cpu"):
        assert fasthyper.backends.backend("auto", torch.device(device)) is not cuda
    assert fasthyper.backends.backend("cuda", torch.device("cuda")) is cuda


def test_activations_are_numbered(ops):
    """None has the number 0, which stands for no activation."""
    numbers = [ops.activation(name) for name in primaries.ACTIVATIONS]
    assert sorted(numbers) == list(range(1, len(numbers) + 1))
    with pytest.raises(RuntimeError, match="no activation is called height"):
        ops.activation("height")


def test_a_sum_is_split_where_blocks_are_few_and_has_work(ops):
    assert ops.fold_splits(64, 784, 50, 10, 132, 32 << 20) > 16
    assert ops.fold_splits(64, 784, 50, 10, 132, 0) == 1
    assert ops.fold_splits(64, 10, 10, 10, 132, 32 << 20) == 1  # too little work to share
    assert ops.fold_splits(39168, 64, 128, 64, 132, 32 << 20) == 1


def test_the_last_wave_is_split_where_it_would_be_nearly_empty(ops):
    assert ops.whole_waves(39168, 64, 132) == 132 * 256  # of 153 tiles
    assert ops.whole_waves(132 * 256, 64, 132) == 132 * 256
    assert ops.whole_waves(100 * 256, 64, 132) == 100 * 256
    assert ops.whole_waves(260 * 256, 64, 132) == 260 * 256  # nearly full


@ready
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_kernels_for_hopper_compute_large_problems(dtype, factors, oracle, force):
    """The last wave has few blocks and is split."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("this GPU is not of compute capability 9.0")
    force(hopper_work=1, least_work=64, processors=4)
    args = factors((1100, 1, 24, 32, 16), dtype, NAMES)
    oracle.check_linear(args, everything(*args))
    x, z, weight, bias, base_weight, _ = args
    y, *gradients = everything(*args)
    options = (planner.get_workspace_limit(), False)
    assert library.ops().apply(x, z, weight, bias, base_weight, None, y, *options) == 2
    assert library.ops().grads(*args, *gradients, *options) == 2
    oracle.check_linear(args, (y, *gradients))
    force(hopper_work=1 << 60)
    assert library.ops().apply(x, z, weight, bias, base_weight, None, y, *options) == 0
    assert library.ops().grads(*args, *gradients, *options) == 0


class TestPrimary:
    """Whole primaries of two layers, through the Hypernetwork."""

    @staticmethod
    def models(sizes, activation, dtype, bias, base):
        """Return a Hypernetwork of the sizes B, N, R, I, J, O."""
        from fasthyper.nn import HyperLinear, Hypernetwork

        _, _, R, I, J, O = sizes
        kinds = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "silu": nn.SiLU, "gelu": nn.GELU}
        make = lambda i, o: HyperLinear(i, o, cond_features=R, bias=bias, base=base)
        model = Hypernetwork(nn.Linear(4, R), nn.Sequential(make(I, J), kinds[activation](), make(J, O)))
        for parameter in model.primary.parameters():
            nn.init.normal_(parameter, std=0.1)  # most of a is where σ is not flat
        return model.to("cuda" if torch.cuda.is_available() else "cpu", dtype)

    @ready
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("bias", "base"), [(True, True), (False, True), (True, False), (False, False)])
    @pytest.mark.parametrize(
        ("sizes", "activation"),
        [
            ((20, 1, 12, 30, 10, 12), "relu"),
            ((7, 3, 20, 10, 32, 1), "gelu"),
            ((64, 1, 50, 40, 10, 12), "tanh"),
            ((5, 1, 8, 3, 60, 50), "silu"),
            ((12, 2, 5, 6, 7, 8), "sigmoid"),
        ],
        ids=str,
    )
    def test_as_exact_as_one_layer_after_the_other(self, sizes, activation, dtype, bias, base, launches, force):
        force(least_work=64)  # so that some sums are split
        model = self.models(sizes, activation, dtype, bias, base)
        B, N, _, I, *_ = sizes
        device = next(model.parameters()).device
        x = torch.randn(B, N, I, device=device).to(dtype).requires_grad_()
        cond = torch.randn(B, 4, device=device).to(dtype)
        tensors = (x, *model.parameters())

        def step(backend, wanted, x, cond):
            tensors = (x, *wanted.parameters())
            with fasthyper.use_backend(backend):
                y = wanted(x, cond)
            return y, *torch.autograd.grad(y.double().square().sum(), tensors)

        ours = step("cuda", model, x, cond)
        assert [name for name, _ in launches] == ["primary", "primary_grads"]
        usual = step("materialised", model, x, cond)
        double = self.models(sizes, activation, torch.float64, bias, base)
        double.load_state_dict(model.state_dict())
        exact = step("aten", double, x.detach().double().requires_grad_(), cond.double())
        assert len(ours) == len(tensors) + 1
        for got, one_by_one, truth in zip(ours, usual, exact, strict=True):
            assert got.dtype == dtype
            # float32: a fold is one sum over both I and R, and adds up more rounding than two sums do.
            eps = torch.finfo(dtype).eps * (24 if dtype == torch.float32 else 2)
            error, allowed = (got.double() - truth).norm(), (one_by_one.double() - truth).norm()
            assert error <= 2 * allowed + eps * truth.norm()

    @ready
    def test_any_strides(self):
        """Also those of a: a hook may have stored it in another layout."""
        torch.manual_seed(0)
        made = lambda *shapes: tuple(torch.randn(s).to(device) for s in shapes)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        x, z, g = made((20, 2, 6), (20, 8), (20, 2, 3))
        first, second = made((5, 6, 8), (5, 8), (5, 6), (5,)), made((3, 5, 8), (3, 8), (3, 5), (3,))
        swapped = lambda t: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else t
        y, a = cuda.primary(x, z, first, second, "tanh")
        grads = cuda.primary_grads(x, z, first, second, "tanh", a, g, (True,) * 10)
        others = tuple(map(swapped, first)), tuple(map(swapped, second))
        torch.testing.assert_close(cuda.primary(swapped(x), swapped(z), *others, "tanh"), (y, a))
        again = cuda.primary_grads(swapped(x), swapped(z), *others, "tanh", swapped(a), swapped(g), (True,) * 10)
        torch.testing.assert_close(again, grads)

    @ready
    def test_masks(self, factors):
        x, z, g = (torch.randn(shape) for shape in ((20, 2, 6), (20, 8), (20, 2, 3)))
        first = tuple(torch.randn(shape) for shape in ((5, 6, 8), (5, 8), (5, 6), (5,)))
        second = tuple(torch.randn(shape) for shape in ((3, 5, 8), (3, 8), (3, 5), (3,)))
        x, z, g, *layers = (t.to("cuda" if torch.cuda.is_available() else "cpu") for t in (x, z, g, *first, *second))
        first, second = tuple(layers[:4]), tuple(layers[4:])
        _, a = cuda.primary(x, z, first, second, "tanh")
        every = cuda.primary_grads(x, z, first, second, "tanh", a, g, (True,) * 10)
        for chosen in range(10):
            mask = tuple(k == chosen for k in range(10))
            some = cuda.primary_grads(x, z, first, second, "tanh", a, g, mask)
            assert [t is not None for t in some] == list(mask)
            torch.testing.assert_close(some[chosen], every[chosen])

    @ready
    @pytest.mark.parametrize(
        "sizes", [(4, 1, 8, 5, 65, 3), (4, 1, 8, 5, 6, 65), (0, 1, 8, 5, 6, 3), (1 << 20, 1, 8, 5, 60, 3)], ids=str
    )
    def test_other_sizes_are_left_to_the_layers(self, sizes):
        B, N, R, I, J, O = sizes
        meta = lambda *shape: torch.empty(shape, device="meta")
        x, z = meta(B, N, I), meta(B, R)
        first = (meta(J, I, R), None, None, None)
        second = (meta(O, J, R), None, None, None)
        assert not primaries.fuses(x, z, first, second, "relu")
        first, second = (meta(6, 5, 8), *[None] * 3), (meta(3, 6, 8), *[None] * 3)
        assert primaries.fuses(meta(9, 1, 5), meta(9, 8), first, second, "relu")
