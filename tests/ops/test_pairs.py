"""The op `pairs` and its gradients: values, derivatives, transforms, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, vmap

import fasthyper
from fasthyper import planner
from fasthyper.backends.aten import pairs as aten
from fasthyper.ops.pairs import ops
from fasthyper.problem import Pairs

pairs, pairs_grads = ops.pairs, ops.pairs_grads
SIZES = (3, 4, 5, 2, 7, 6)  # B, M, N, I, R, O
AXES = {"x": "bmi", "z": "bnr", "weight": "oir", "bias": "o", "g": "bmno"}
ONES = [(False, False), (True, False), (False, True), (True, True)]
SCHEDULES = [None, "generate", "project"]


def shape(name, sizes, ones):
    size = dict(zip("bmniro", sizes, strict=True))
    if name == "weight":
        size["i"] += ones[0]
        size["r"] += ones[1]
    return [size[letter] for letter in AXES[name]]


def arguments(sizes=SIZES, dtype=torch.float64, ones=(False, False), names=("x", "z", "weight", "bias", "g"), **kwargs):
    ts = [torch.randn(*shape(name, sizes, ones), dtype=torch.float64).to(dtype) for name in names]
    return [t.requires_grad_(**kwargs) if kwargs else t for t in ts]


def append(t, one):
    return (
        torch.cat([t, torch.ones_like(t[..., :1])], -1)
        if one and t.shape[-1]
        else nn.functional.pad(t, (0, one), value=1)
    )


def truth(x, z, weight, bias, ones=(False, False)):
    return torch.einsum("bmi,oir,bnr->bmno", append(x, ones[0]), weight, append(z, ones[1])) + bias


def truth_of_grads(x, z, weight, bias, g, ones=(False, False)):
    """Return dx, dz, dH, dbias, and with absolute values of the arguments, the scales of their errors."""
    x1, z1 = append(x, ones[0]), append(z, ones[1])
    dx = torch.einsum("bmno,oir,bnr->bmi", g, weight, z1)[..., : x.shape[2]]
    dz = torch.einsum("bmno,oir,bmi->bnr", g, weight, x1)[..., : z.shape[2]]
    return dx, dz, torch.einsum("bmno,bmi,bnr->oir", g, x1, z1), g.sum((0, 1, 2))


def check_all(oracle, args, ones=(False, False), schedule=None):
    """Check y and all gradients against einsum in float64."""
    with fasthyper.use_backend("auto", schedule):
        y = pairs(*args[:4], *ones)
        found = pairs_grads(*args[:3], args[4], *ones, [True] * 4)
    exact, absolute = [t.double() for t in args], [t.double().abs() for t in args]
    oracle.check(y, truth(*exact[:4], ones), truth(*absolute[:4], ones), args[0].dtype)
    for got, expected, scale in zip(found, truth_of_grads(*exact, ones), truth_of_grads(*absolute, ones), strict=True):
        oracle.check(got, expected, scale, args[0].dtype)


@pytest.fixture(params=SCHEDULES, ids=str)
def schedule(request):
    return request.param


@pytest.fixture(params=[None, 20], ids=["one tile", "many tiles"])
def any_tiles(request, monkeypatch):
    """Tiles so small that every loop runs more than once, and that H[o] is cut."""
    if request.param is not None:
        monkeypatch.setattr(planner, "pair_tile_elements", lambda work, limit: request.param)
        monkeypatch.setattr("fasthyper.backends.aten.pairs._FEWEST_ROWS", 4)
        monkeypatch.setattr("fasthyper.backends.aten.pairs._TILES_OF_Y", 1)
    planner.forget()
    yield
    monkeypatch.undo()
    planner.forget()


class TestValues:
    @pytest.mark.parametrize("ones", ONES)
    def test_every_dtype_schedule_and_tile(self, dtype, schedule, ones, any_tiles, oracle):
        check_all(oracle, arguments(dtype=dtype, ones=ones), ones, schedule)

    @pytest.mark.parametrize("native", [False, True])
    def test_tiles_of_16_bits(self, native, schedule, any_tiles, native_low_precision, oracle):
        with native_low_precision(native):
            args = arguments((3, 5, 4, 9, 10, 2), torch.bfloat16, (True, True))
            with fasthyper.use_backend("auto", schedule):
                y = pairs(*args[:4], True, True)
                found = pairs_grads(*args[:3], args[4], True, True, [True] * 4)
        exact, absolute = [t.double() for t in args], [t.double().abs() for t in args]
        results = (truth(*exact[:4], (True, True)), *truth_of_grads(*exact, (True, True)))
        scales = (truth(*absolute[:4], (True, True)), *truth_of_grads(*absolute, (True, True)))
        for got, expected, scale in zip((y, *found), results, scales, strict=True):
            oracle.check(got, expected, scale, torch.bfloat16)

    @pytest.mark.parametrize("axis", range(6))
    @pytest.mark.parametrize("size", [0, 1, 13])
    @pytest.mark.parametrize("ones", [(False, False), (True, True)])
    def test_sizes(self, axis, size, ones, schedule, any_tiles, oracle):
        sizes = list(SIZES)
        sizes[axis] = size
        check_all(oracle, arguments(sizes, ones=ones), ones, schedule)

    @pytest.mark.parametrize("sizes", [(2, 67, 3, 31, 5, 1), (1, 1, 129, 3, 257, 2), (37, 2, 1, 1, 1, 19)])
    def test_primes(self, sizes, dtype, schedule, oracle):
        check_all(oracle, arguments(sizes, dtype), schedule=schedule)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_strides(self, dtype, schedule, any_tiles, oracle):
        x, z, weight, bias, g = arguments(dtype=dtype)
        reverse = lambda t: t.permute(*range(t.dim())[::-1]).contiguous().permute(*range(t.dim())[::-1])
        check_all(oracle, [reverse(t) for t in (x, z, weight, bias, g)], schedule=schedule)
        expanded = [x[:1].expand_as(x), z[:, :1].expand_as(z), weight[:1].expand_as(weight), bias]
        check_all(oracle, [*expanded, g[:1, :1, :1, :1].expand_as(g)], schedule=schedule)
        wide = weight.new_full((12, 5, 15), float("nan"))
        wide[::2, 1::2, 1::2] = weight
        check_all(oracle, [x, z, wide[::2, 1::2, 1::2], bias, g], schedule=schedule)

    @pytest.mark.parametrize("native", [False, True])
    def test_16_bits_err_at_most_twice_as_much_as_two_steps(self, native, schedule, native_low_precision):
        for dtype in (torch.bfloat16, torch.float16):
            args = arguments((4, 48, 32, 64, 64, 6), dtype)  # so large that products are in bfloat16 if `native`
            with fasthyper.use_backend("auto", schedule), native_low_precision(native):
                ours = [pairs(*args[:4], False, False)]
                ours += pairs_grads(*args[:3], args[4], False, False, [True] * 4)
            with fasthyper.use_backend("materialised"):
                theirs = [pairs(*args[:4], False, False)]
                theirs += pairs_grads(*args[:3], args[4], False, False, [True] * 4)
            exact = [t.double() for t in args]
            expected = (truth(*exact[:4]), *truth_of_grads(*exact))
            for a, b, e in zip(ours, theirs, expected, strict=True):
                assert (a - e).square().mean() <= 4 * (b - e).square().mean()

    @pytest.mark.parametrize("native", [False, True])
    def test_a_single_block_of_parts_of_lines(self, native, schedule, native_low_precision, monkeypatch, oracle):
        """A tile of 600 numbers has all rows, or all of the 40 outputs."""
        monkeypatch.setattr(planner, "pair_tile_elements", lambda work, limit: 600)
        monkeypatch.setattr("fasthyper.backends.aten.pairs._FEWEST_ROWS", 4)
        monkeypatch.setattr("fasthyper.backends.aten.pairs._by_outputs", None)
        with native_low_precision(native):
            check_all(oracle, arguments((3, 5, 4, 9, 10, 40), torch.bfloat16), schedule=schedule)

    @pytest.mark.parametrize("sizes", [(1, 600, 2, 1, 1, 1), (1, 2, 600, 1, 1, 1), (600, 1, 1, 1, 1, 1)])
    def test_sums_over_tiles_are_float32(self, sizes, schedule, monkeypatch, oracle):
        """A sum of ones in bfloat16 stays at 256."""
        monkeypatch.setattr(planner, "pair_tile_elements", lambda work, limit: 8)
        planner.forget()
        check_all(oracle, [torch.ones_like(t) for t in arguments(sizes, torch.bfloat16)], schedule=schedule)
        monkeypatch.undo()
        planner.forget()

    @pytest.mark.parametrize("native", [False, True])
    def test_a_product_that_leaves_the_range_of_float16(self, native, schedule, native_low_precision):
        x, z, weight = (torch.full(s, v).half() for s, v in (((1, 2, 4), 200.0), ((1, 3, 4), 1e-3), ((1, 4, 4), 200.0)))
        with native_low_precision(native), fasthyper.use_backend("auto", schedule):
            y = pairs(x, z, weight, None, False, False)
        assert y.isfinite().all()

    def test_two_calls_give_the_same_bits(self, schedule, any_tiles):
        args = arguments(dtype=torch.float32)
        with fasthyper.use_backend("auto", schedule):
            once, twice = (
                [pairs(*args[:4], False, False), *pairs_grads(*args[:3], args[4], False, False, [True] * 4)]
                for _ in range(2)
            )
        assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))

    @pytest.mark.parametrize("native", [False, True])
    @pytest.mark.parametrize("mask", [*itertools.product([False, True], repeat=4)])
    def test_masks(self, mask, native, schedule, any_tiles, native_low_precision):
        for dtype in (torch.float64, torch.bfloat16):
            args = arguments(dtype=dtype)
            with native_low_precision(native), fasthyper.use_backend("auto", schedule):
                every = pairs_grads(*args[:3], args[4], False, False, [True] * 4)
                some = pairs_grads(*args[:3], args[4], False, False, list(mask))
            for got, full, wanted in zip(some, every, mask, strict=True):
                assert got.shape == (full.shape if wanted else (0,))
                # The schedule depends on the mask, and with it the rounding of tiles in 16 bits.
                atol = 2**-7 * full.abs().max().item() if dtype == torch.bfloat16 else None
                torch.testing.assert_close(got, full if wanted else got, atol=atol, rtol=atol)

    def test_an_infinite_x_and_a_nan_affect_their_own_instance(self, schedule, any_tiles):
        x, z, weight, bias, g = arguments()
        broken = x.clone()
        broken[1, 0, 0], broken[1, 1, 0] = float("inf"), float("nan")
        with fasthyper.use_backend("auto", schedule):
            got, expected = (pairs(t, z, weight, bias, False, False) for t in (broken, x))
            dx, dz, *_ = pairs_grads(broken, z, weight, g, False, False, [True] * 4)
        torch.testing.assert_close(got[[0, 2]], expected[[0, 2]])
        assert dx.isfinite().all()
        assert dz[[0, 2]].isfinite().all()


class TestDerivatives:
    @pytest.mark.parametrize("ones", ONES)
    @pytest.mark.parametrize("how", [("auto", "generate"), ("auto", "project"), ("materialised", None)], ids=str)
    def test_all_orders(self, ones, how):
        args = arguments((2, 2, 3, 2, 3, 2), ones=ones, names=("x", "z", "weight", "bias"), requires_grad=True)
        f = lambda *ts: pairs(*ts, *ones)
        with fasthyper.use_backend(*how):
            assert gradcheck(f, args, check_forward_ad=True, check_batched_grad=True)
            assert gradgradcheck(f, args, check_fwd_over_rev=True, check_rev_over_rev=True)

    def test_gradients_alone(self):
        args = arguments((2, 2, 3, 2, 3, 2), names=("x", "z", "weight", "g"), requires_grad=True)
        assert gradcheck(lambda *ts: pairs_grads(*ts, False, False, [True] * 4), args, check_forward_ad=True)

    def test_without_a_bias(self):
        x, z, weight, bias, _ = arguments(requires_grad=True)
        y = pairs(x, z, weight, None, False, False)
        torch.testing.assert_close(y, truth(x, z, weight, torch.zeros_like(bias)))
        y.sum().backward()
        assert bias.grad is None

    @pytest.mark.parametrize("wanted", [*itertools.product([False, True], repeat=4)])
    def test_gradients_of_some_arguments(self, wanted):
        args = arguments(names=("x", "z", "weight", "bias"))
        leaves = [t.requires_grad_() for t, k in zip(args, wanted, strict=True) if k]
        if not leaves:
            assert not pairs(*args, False, False).requires_grad
            return
        g = torch.randn(shape("g", SIZES, (False, False)), dtype=torch.float64)
        got, expected = (torch.autograd.grad(y, leaves, g) for y in (pairs(*args, False, False), truth(*args)))
        torch.testing.assert_close(got, expected)

    def test_nothing_but_the_arguments_is_kept_for_backward(self):
        args = arguments(names=("x", "z", "weight", "bias"), requires_grad=True)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda t: t):
            pairs(*args, False, False)
        assert set(kept) <= {t.data_ptr() for t in args[:3]}


class TestTransforms:
    @pytest.mark.parametrize("batched", [k for n in range(1, 5) for k in itertools.combinations(range(4), n)])
    def test_vmap(self, batched):
        one = arguments(names=("x", "z", "weight", "bias"), ones=(True, True))
        args = [torch.randn(3, *t.shape, dtype=t.dtype) if k in batched else t for k, t in enumerate(one)]
        dims = tuple(0 if k in batched else None for k in range(4))
        f, expected = (lambda *ts: pairs(*ts, True, True)), (lambda *ts: truth(*ts, (True, True)))
        torch.testing.assert_close(vmap(f, dims)(*args), vmap(expected, dims)(*args))
        loss = lambda f: lambda *ts: f(*ts).square().sum()
        got, right = (vmap(grad(loss(h), (0, 1, 2, 3)), dims)(*args) for h in (f, expected))
        torch.testing.assert_close(got, right)

    def test_forward_mode_of_func(self):
        args = arguments((2, 2, 3, 2, 3, 2), names=("x", "z", "weight", "bias"))
        f = lambda *ts: pairs(*ts, False, False)
        torch.testing.assert_close(jacfwd(f, (0, 1, 2, 3))(*args), jacfwd(truth, (0, 1, 2, 3))(*args))

    @pytest.mark.parametrize("schedule", ["generate", "project"])
    def test_opcheck(self, schedule):
        for ones in [(False, False), (True, True)]:
            args = arguments(dtype=torch.float32, ones=ones, requires_grad=True)
            torch.library.opcheck(pairs.default, (*args[:4], *ones, "auto", schedule))
            plain = [t.detach() for t in args]
            torch.library.opcheck(pairs_grads.default, (*plain[:3], plain[4], *ones, [True, False, True, True]))

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_compiled(self, backend, compiled):
        f = compiled(lambda *ts: pairs(*ts, True, False).relu(), backend)
        for batch in (3, 4):
            sizes = (batch, *SIZES[1:])
            args = arguments(sizes, ones=(True, False), requires_grad=True)
            g = args.pop()
            y, expected = f(*args), truth(*args, (True, False)).relu()
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(
                torch.autograd.grad(y, args, g.detach()), torch.autograd.grad(expected, args, g.detach())
            )

    def test_export(self):
        class Scores(nn.Module):
            def forward(self, x, z, weight, bias):
                return pairs(x, z, weight, bias, False, False)

        args = tuple(arguments(names=("x", "z", "weight", "bias")))
        torch.testing.assert_close(torch.export.export(Scores(), args).module()(*args), truth(*args))


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x": (3, 4)}, r"x must have shape \(B, M, I\), got \(3, 4\)"),
            ({"z": (2, 5, 7)}, r"z must have shape \(3, N, R\), got \(2, 5, 7\)"),
            ({"weight": (6, 3, 7)}, r"weight must have shape \(O, P, Q\) with P = 2, got \(6, 3, 7\): x has shape"),
            ({"weight": (6, 2, 8)}, r"weight must have shape \(O, P, Q\) with Q = 7, got \(6, 2, 8\): z has shape"),
            ({"bias": (5,)}, r"bias must have shape \(6,\), got \(5,\)"),
        ],
    )
    def test_shapes(self, change, message):
        names = ("x", "z", "weight", "bias")
        given = dict(zip(names, arguments(names=names), strict=True))
        given |= {name: torch.randn(size, dtype=torch.float64) for name, size in change.items()}
        with pytest.raises(ValueError, match=message):
            pairs(*given.values(), False, False)

    def test_an_appended_one_needs_its_row(self):
        x, z, weight, bias, _ = arguments()
        with pytest.raises(ValueError, match="so 2 features and an appended one"):
            pairs(x, z, weight, bias, True, False)

    def test_dtypes(self):
        x, z, weight, bias, _ = arguments()
        with pytest.raises(TypeError, match="z must have the dtype of x"):
            pairs(x, z.float(), weight, bias, False, False)
        with pytest.raises(TypeError, match="x must be floating point"):
            pairs(x.long(), z, weight, bias, False, False)

    def test_a_schedule_that_it_does_not_have(self):
        args = arguments(names=("x", "z", "weight", "bias"))
        with (
            fasthyper.use_backend("auto", "fold"),
            pytest.raises(ValueError, match="auto, generate, project for pairs"),
        ):
            pairs(*args, False, False)


class TestPlans:
    def test_the_smaller_set_is_contracted_first(self):
        few = Pairs("pairs", 8, 2, 64, 32, 32, 10)
        assert planner.plan_pairs(few).schedule == "project"
        assert planner.plan_pairs(few.swapped()).schedule == "generate"
        assert planner.plan_pairs(few._replace(op="pairs_grads")).schedule == "project"
        assert planner.plan_pairs(few.swapped()._replace(op="pairs_grads")).schedule == "generate"

    def test_swapped_is_the_same_problem(self):
        p = Pairs("pairs_grads", 8, 3, 5, 7, 11, 10, needs=(True, False, True))
        assert p.swapped().swapped() == p
        assert planner.plan_pairs(p, "project").seconds == planner.plan_pairs(p.swapped(), "generate").seconds

    @pytest.mark.parametrize("schedule", ["generate", "project"])
    def test_the_schedule_is_run(self, schedule, monkeypatch):
        first = []
        for name in ("_apply", "_grads"):
            run = getattr(aten, name)
            monkeypatch.setattr(aten, name, lambda f, *rest, run=run: first.append(f.x) or run(f, *rest))
        x, z, weight, bias, g = arguments()
        pairs(x, z, weight, bias, False, False, "aten", schedule)
        pairs_grads(x, z, weight, g, False, False, [True] * 4, "aten", schedule)
        assert [t.data_ptr() for t in first] == [(z if schedule == "generate" else x).data_ptr()] * 2

    def test_what_is_run_is_what_is_planned(self, monkeypatch):
        asked = []
        plan = planner.plan_pairs
        monkeypatch.setattr(planner, "plan_pairs", lambda problem, s: asked.append((problem, s)) or plan(problem, s))
        args = arguments()
        pairs(*args[:4], False, False)
        pairs_grads(*args[:3], args[4], False, False, [True, False, False, True])
        B, M, N, I, R, O = SIZES
        expected = Pairs("pairs", B, M, N, I, R, O, torch.float64)
        grads = expected._replace(op="pairs_grads", needs=(True, False, False))
        assert asked == [(expected, "auto"), (grads, "auto")]
