"""The contract with torch: autocast, checkpointing, saved tensors, the gradients computed, sizes beyond 2³¹."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import fasthyper
from fasthyper import hyper_linear

OPS = ("apply", "cond_grad", "weight_grad")


def affine(x, z, weight, bias, base_weight, base_bias):
    return hyper_linear(x, z, weight, bias, base_weight=base_weight, base_bias=base_bias)


class TestAutocast:
    @pytest.mark.parametrize("region", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
    def test_the_result_has_the_region_s_dtype(self, region, given, factors):
        args = factors(dtype=given, names=factors.AFFINE)
        with torch.autocast("cpu", region):
            y = affine(*args)
        assert y.dtype == region
        assert torch.equal(y, affine(*(t.to(region) for t in args)))

    @pytest.mark.parametrize("region", [torch.bfloat16, torch.float16])
    def test_a_region_does_not_reach_inside(self, region, how, factors, oracle):
        """An op called with float32 inside a region computes in float32: forward, backward, and only backward."""
        args = factors((64, 2, 17, 33, 29), torch.float32, requires_grad=True)
        *leaves, g = args
        with fasthyper.use_backend(*how):
            with torch.autocast("cpu", region):
                y = fasthyper.ops.apply(*leaves)
                outs = [getattr(fasthyper.ops, op)(*(args[i] for i in oracle.INPUTS[op])) for op in OPS]
                grads = torch.autograd.grad(y, leaves, g.detach())
            outside = hyper_linear(*leaves)
        with torch.autocast("cpu", region):
            within = torch.autograd.grad(outside, leaves, g.detach())
        oracle.check_op("apply", y, *leaves)
        for op, out in zip(OPS, outs, strict=True):
            oracle.check_op(op, out, *(args[i] for i in oracle.INPUTS[op]))
        oracle.check_all(grads, oracle.grads, *args)
        oracle.check_all(within, oracle.grads, *args)

    def test_a_region_does_not_reach_inside_the_second_order(self, factors):
        args = factors((64, 2, 17, 33, 29), torch.float32, factors.AFFINE, requires_grad=True)

        def second(region):
            y = affine(*args)
            with torch.autocast("cpu", torch.bfloat16, enabled=region):
                first = torch.autograd.grad(y, args, torch.ones_like(y), create_graph=True)
            return torch.autograd.grad(sum(t.sum() for t in first[:3]), args[:3])

        torch.testing.assert_close(second(True), second(False))

    def test_mixed_dtypes_are_brought_together(self, factors):
        x, z, weight, _ = factors(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            assert hyper_linear(x.bfloat16(), z.half(), weight).dtype == torch.bfloat16

    def test_float64_is_left_alone(self, factors, oracle):
        args = factors(names=factors.AFFINE, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = affine(*args)
            torch.testing.assert_close(y, oracle.linear(*args))
            got = torch.autograd.grad(y.sum(), args, create_graph=True)
            second = torch.autograd.grad(sum((t**2).sum() for t in got), args[:3])
        expected = torch.autograd.grad(oracle.linear(*args).sum(), args, create_graph=True)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(second, torch.autograd.grad(sum((t**2).sum() for t in expected), args[:3]))

    def test_dtypes_are_those_of_linear(self):
        """In every region, the dtype of the result is that of nn.functional.linear."""
        for given in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            x, w = torch.randn(4, 3, dtype=given), torch.randn(6, 3, dtype=given)
            for region in (torch.bfloat16, torch.float16):
                with torch.autocast("cpu", region):
                    expected = torch.nn.functional.linear(x, w).dtype
                    assert hyper_linear(x, x.new_ones(4, 1), w[:, :, None]).dtype == expected

    def test_a_disabled_region_within(self, factors):
        x, z, weight, _ = factors(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.autocast("cpu", enabled=False):
                assert hyper_linear(x, z, weight).dtype == torch.float32
            assert hyper_linear(x, z, weight).dtype == torch.bfloat16
        assert hyper_linear(x, z, weight).dtype == torch.float32

    def test_a_region_of_another_device(self, factors):
        x, z, weight, _ = factors(dtype=torch.float32)
        with torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available()):
            assert hyper_linear(x, z, weight).dtype == torch.float32

    @pytest.mark.parametrize("backward_within", [False, True])
    def test_gradients_have_the_dtype_of_the_parameters(self, backward_within, factors, oracle):
        args = factors((64, 2, 5, 3, 6), torch.float32, factors.AFFINE, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = affine(*args).sum()
            if backward_within:
                loss.backward()
        if not backward_within:
            loss.backward()
        ones = torch.ones(64, 2, 6)
        truth = oracle.linear_grads(*args[:5], ones)
        scale = oracle.linear_grads(*(t.abs() for t in args[:5]), ones)
        for t, d, s in zip(args, truth, scale, strict=True):
            assert t.grad.dtype == torch.float32
            assert ((t.grad - d).abs() <= 4 * torch.finfo(torch.bfloat16).eps * s).all()


class TestModes:
    @pytest.mark.parametrize("how_", [("aten", None), ("materialised", None)])
    def test_inference_mode(self, how_, factors, oracle):
        args = factors(names=factors.AFFINE, requires_grad=True)
        with torch.inference_mode(), fasthyper.use_backend(*how_):
            y = affine(*args)
        assert y.is_inference()
        torch.testing.assert_close(y, oracle.linear(*args).detach())

    def test_no_grad(self, factors):
        args = factors(names=factors.AFFINE, requires_grad=True)
        with torch.no_grad():
            assert not affine(*args).requires_grad
        assert affine(*args).requires_grad
        assert not affine(*(t.detach() for t in args)).requires_grad

    def test_fake_and_meta(self, factors, dtype):
        args = factors(dtype=dtype, names=factors.AFFINE, requires_grad=True)
        for f in (affine, lambda x, z, w, *_: fasthyper.ops.apply(x, z, w)):
            y = f(*(t.detach().to("meta").requires_grad_() for t in args))
            assert (y.shape, y.dtype, y.device.type) == ((4, 2, 6), dtype, "meta")
            with FakeTensorMode() as mode:
                fake = [mode.from_tensor(t) for t in args]
                y = f(*fake)
                grads = torch.autograd.grad(y.sum(), fake[:3])
            assert (y.shape, y.stride(), y.dtype) == ((4, 2, 6), (12, 6, 1), dtype)
            assert [t.shape for t in grads] == [t.shape for t in args[:3]]

    def test_meta_gradients(self, factors):
        args = [t.to("meta").requires_grad_() for t in factors(names=factors.AFFINE)]
        grads = torch.autograd.grad(affine(*args).sum(), args)
        assert [t.shape for t in grads] == [t.shape for t in args]

    @pytest.mark.parametrize("op", OPS)
    def test_meta_of_the_members(self, op, factors, oracle):
        ts = [t.to("meta") for t in factors()]
        result = {"apply": 3, "cond_grad": 1, "weight_grad": 2}[op]
        out = getattr(fasthyper.ops, op)(*(ts[i] for i in oracle.INPUTS[op]))
        assert out.shape == ts[result].shape
        assert out.is_contiguous()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant, factors, oracle):
    args = factors(names=factors.AFFINE, requires_grad=True)
    y = checkpoint(affine, *args, use_reentrant=reentrant)
    (y**2).sum().backward()
    expected = torch.autograd.grad((oracle.linear(*args) ** 2).sum(), args)
    torch.testing.assert_close([t.grad for t in args], list(expected))


def test_checkpoint_recomputes_by_the_same_backend(factors):
    args = factors(names=factors.AFFINE, requires_grad=True)
    with fasthyper.use_backend("aten", "fold"):
        y = checkpoint(affine, *args, use_reentrant=False)
        y.sum().backward()
    assert all(t.grad is not None for t in args)


@pytest.fixture
def asked(monkeypatch):
    """Return the masks of needed gradients that reach the backend."""
    masks = []
    original = fasthyper.backends.BACKENDS["aten"].grads

    def spy(*args, schedule):
        masks.append(tuple(args[6]))
        return original(*args, schedule=schedule)

    monkeypatch.setattr(fasthyper.backends.BACKENDS["aten"], "grads", spy)
    return masks


@pytest.mark.parametrize("some", range(1, 64))
def test_only_needed_gradients_are_computed(some, asked, factors):
    wanted = tuple(bool(some >> k & 1) for k in range(6))
    args = [t.requires_grad_(w) for t, w in zip(factors(names=factors.AFFINE), wanted, strict=True)]
    affine(*args).sum().backward()
    assert asked == [wanted]
    assert [t.grad is not None for t in args] == list(wanted)


@pytest.mark.parametrize("some", range(1, 8))
def test_only_needed_gradients_of_apply_are_computed(some, asked, factors):
    wanted = tuple(bool(some >> k & 1) for k in range(3))
    args = [t.requires_grad_(w) for t, w in zip(factors()[:3], wanted, strict=True)]
    fasthyper.ops.apply(*args).sum().backward()
    assert asked == [(*wanted, False, False, False)]


def test_forward_computes_no_gradient(asked, factors):
    affine(*factors(names=factors.AFFINE, requires_grad=True))
    assert asked == []


def test_only_inputs_are_saved_for_backward(factors):
    """Only inputs are saved, and nothing of the size of W."""
    saved = []
    args = factors(names=factors.AFFINE, requires_grad=True)

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = affine(*args)
    y.sum().backward()
    storages = {t.untyped_storage().data_ptr() for t in args}
    assert saved
    assert {t.untyped_storage().data_ptr() for t in saved} <= storages
    assert max(t.numel() for t in saved) < 4 * 6 * 3 * 5


def test_saved_tensors_may_be_packed_away(factors, oracle):
    """Backward works on the tensors that hooks such as save_on_cpu return."""
    args = factors(names=factors.AFFINE, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t + 0):
        y = affine(*args)
    got = torch.autograd.grad((y**2).sum(), args)
    torch.testing.assert_close(got, torch.autograd.grad((oracle.linear(*args) ** 2).sum(), args))


def test_an_input_changed_in_place_is_an_error(factors):
    for k in range(3):
        args = factors(requires_grad=True)[:3]
        copies = [t.clone() for t in args]
        y = hyper_linear(*copies)
        copies[k].data = copies[k].data  # not a change
        with torch.no_grad():
            copies[k].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_a_base_bias_changed_in_place_is_allowed(factors):
    """As in nn.Linear, no gradient reads the bias."""
    *args, base_bias = factors(names=factors.AFFINE, requires_grad=True)
    y = affine(*args, base_bias)
    with torch.no_grad():
        base_bias.add_(1)
    y.sum().backward()
    torch.testing.assert_close(base_bias.grad, torch.full((6,), 8.0, dtype=torch.float64))


def test_backward_twice(factors):
    args = factors(names=factors.AFFINE, requires_grad=True)
    y = affine(*args)
    first = torch.autograd.grad(y.sum(), args, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), args), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), args)


def test_the_same_bits_every_time(how, dtype, factors):
    args = factors((67, 3, 17, 19, 23), dtype, factors.AFFINE, requires_grad=True)

    def once():
        with fasthyper.use_backend(*how):
            y = affine(*args)
        return y, *torch.autograd.grad(y.sum(), args)

    first = once()
    for _ in range(3):
        for a, b in zip(first, once(), strict=True):
            assert torch.equal(a, b)


def test_one_tensor_in_two_places(factors):
    """x as its own z: it receives both gradients."""
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: hyper_linear(x, x, w), (x, weight), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x, w: hyper_linear(x, x, w), (x, weight))


@pytest.mark.parametrize(
    "schedule",
    ["fold", pytest.param("generate", marks=pytest.mark.slow), pytest.param("project", marks=pytest.mark.slow)],
)
def test_more_than_2_31_elements_of_W(schedule):
    """B·O·I = 2³¹ + 2²⁰, R = 2: every instance is right, and the sums over instances too."""
    B, R, I, O = 2049, 2, 1024, 1024
    x, z = torch.randn(B, I, requires_grad=True), torch.randn(B, R, requires_grad=True)
    weight = (torch.randn(O, I, R) / I**0.5).requires_grad_()
    assert B * O * I > 2**31
    with fasthyper.use_backend("aten", schedule):
        y = hyper_linear(x, z, weight)
    g = torch.randn_like(y)
    dx, dz, dh = torch.autograd.grad(y, (x, z, weight), g)
    with torch.no_grad():
        by_feature = [weight[:, :, r] for r in range(R)]
        truth = sum(z[:, r : r + 1] * (x @ w.T) for r, w in enumerate(by_feature))
        torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(
            dx, sum(z[:, r : r + 1] * (g @ w) for r, w in enumerate(by_feature)), rtol=1e-4, atol=1e-3
        )
        expected = torch.stack([((x @ w.T) * g).sum(1) for w in by_feature], 1)
        torch.testing.assert_close(dz, expected, rtol=1e-4, atol=1e-2)
        expected = torch.stack([(g * z[:, r : r + 1]).T @ x for r in range(R)], 2)
        torch.testing.assert_close(dh, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("schedule", ["fold", "generate", "project"])
def test_offsets_beyond_2_31(schedule):
    """x is expanded over the batch: B·N·I exceeds 2³¹, but its storage stays small."""
    B, N, R, I, O = 1 << 17, 2, 1, 1 << 14, 1
    x, z, weight = torch.randn(1, N, I).expand(B, N, I), torch.randn(B, R), torch.randn(O, I, R)
    assert x.numel() > 2**31
    with fasthyper.use_backend("aten", schedule):
        y = fasthyper.ops.apply(x[: 1 << 17], z, weight)
    truth = (x[0] @ weight[:, :, 0].T)[None] * z[:, None]
    torch.testing.assert_close(y, truth, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("some", range(1, 8))
def test_autograd_grad_of_some_intermediate_inputs_computes_those_alone(some, asked, factors):
    """torch.autograd.grad of some of the tensors that require grad: the mask has only those."""
    wanted = tuple(bool(some >> k & 1) for k in range(3))
    args = [t * 1 for t in factors(requires_grad=True)[:3]]
    y = hyper_linear(*args)
    torch.autograd.grad(y.sum(), [t for t, w in zip(args, wanted, strict=True) if w])
    assert asked == [(*wanted, False, False, False)]


@pytest.mark.parametrize("some", range(1, 8))
def test_autograd_grad_of_some_leaves_computes_those_alone(some, asked, factors):
    wanted = tuple(bool(some >> k & 1) for k in range(3))
    args = factors(requires_grad=True)[:3]
    y = hyper_linear(*args)
    torch.autograd.grad(y.sum(), [t for t, w in zip(args, wanted, strict=True) if w])
    assert asked == [(*wanted, False, False, False)]
