"""The ops of generated convolutions: values, derivatives, transforms, memory, errors."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacrev, vmap

import fasthyper
from fasthyper import planner, processor
from fasthyper.backends import BACKENDS
from fasthyper.backends.aten import conv_generate, conv_products
from fasthyper.geometry import Geometry, output_size
from fasthyper.measure import peak_temporary_bytes
from fasthyper.ops import reference
from fasthyper.problem import CONV_SCHEDULES, ConvProblem

ops = torch.ops.fasthyper
RUNNABLE = [name for name in ("aten", "cpu") if BACKENDS[name].unavailable() is None]
ALL = (True,) * 6


def geometry(image, kernel, stride=(1, 1, 1), padding=(0, 0, 0), dilation=(1, 1, 1), groups=1):
    of = zip(image, kernel, stride, padding, dilation, strict=True)
    return Geometry(*map(list, (stride, padding, dilation)), groups, [*image], [*kernel], [output_size(*o) for o in of])


GEOMETRIES = {
    "odd": geometry((1, 7, 6), (1, 3, 2), (1, 2, 1), (0, 1, 1), (1, 1, 2)),
    "groups": geometry((1, 7, 6), (1, 3, 3), padding=(0, 1, 1), groups=2),
    "depthwise": geometry((1, 9, 8), (1, 5, 5), (1, 2, 2), (0, 2, 2), groups=6),
    "three axes": geometry((4, 5, 6), (2, 3, 1), (2, 1, 1), (1, 2, 0), (1, 2, 1)),
    "pointwise": geometry((1, 5, 4), (1, 1, 1)),
    "pointwise in groups": geometry((1, 5, 4), (1, 1, 1), groups=3),
    "pointwise, stride 2": geometry((1, 5, 4), (1, 1, 1), (1, 2, 2)),
    "one pixel": geometry((1, 5, 4), (1, 5, 4)),
    "much padding": geometry((1, 2, 3), (1, 3, 3), padding=(0, 4, 4)),
    "pointwise with unreached pixels": geometry((1, 5, 4), (1, 1, 1), dilation=(1, 2, 2))._replace(output=[1, 4, 3]),
    "one axis": geometry((1, 1, 11), (1, 1, 4), (1, 1, 3)),
}


def tensors(geo, transposed, dtype=torch.float64, B=5, I=2, O=6, R=4):
    """Return x, z, H, bias, W0, b0, and a gradient of y."""
    X = I * geo.groups
    x, y = (torch.randn(B, X, *geo.image), torch.randn(B, O, *geo.output))
    x, y = (y, x) if transposed else (x, y)
    outputs = y.shape[1]
    kernel = O, I, *geo.kernel
    of = x, torch.randn(B, R), torch.randn(*kernel, R), torch.randn(outputs, R), torch.randn(kernel)
    return [t.to(dtype) for t in (*of, torch.randn(outputs), y)]


def truth(transposed, x, z, weight, bias, base_weight, base_bias, geo):
    apply = reference.conv_transpose_apply if transposed else reference.conv_apply
    y = apply(x, z, weight, geo) + apply(x, torch.ones_like(z[:, :1]), base_weight.unsqueeze(-1), geo)
    return y + (z @ bias.T + base_bias)[..., None, None, None]


def op(transposed):
    return ops.hyper_conv_transpose if transposed else ops.hyper_conv


def with_gradients(f, args, g):
    args = [t.detach().requires_grad_() for t in args]
    y = f(*args)
    return [y, *torch.autograd.grad(y, args, g)]


def error(found, exact):
    return [(a.double() - b).norm().item() for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("backend", RUNNABLE)
def test_values_and_gradients(backend, name, transposed):
    """Every schedule, dtype and memory format, against the definition in float64."""
    geo = GEOMETRIES[name]
    *args, g = tensors(geo, transposed)
    exact = with_gradients(lambda *t: truth(transposed, *t, geo), args, g)
    for schedule, dtype, last in itertools.product(
        CONV_SCHEDULES, (torch.float64, torch.float32, torch.bfloat16, torch.float16), (False, True)
    ):
        low = [t.to(dtype) for t in args]
        if last:
            low[0] = low[0].to(memory_format=torch.channels_last_3d)
        found = with_gradients(lambda *t, s=schedule: op(transposed)(*t, *geo, backend, s), low, g.to(dtype))
        if dtype == torch.float64:
            for a, b in zip(found, exact, strict=True):
                torch.testing.assert_close(a, b)
        else:
            plain = with_gradients(lambda *t: truth(transposed, *t, geo), [t.to(dtype) for t in args], g.to(dtype))
            unit = torch.finfo(dtype).eps
            for e, of_plain, b in zip(error(found, exact), error(plain, exact), exact, strict=True):
                assert e <= 2 * of_plain + 4 * unit * b.norm().item(), (schedule, dtype)


@pytest.mark.skipif("cpu" not in RUNNABLE, reason="the kernels are not built")
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["pointwise", "pointwise in groups", "odd", "groups"])
def test_kernels_in_bfloat16(name, transposed, native, monkeypatch):
    """Where the processor multiplies bfloat16, these are torch's batched products: the errors of W written out."""
    called = []
    for product in ("convolve", "spread", "kernels"):
        of = getattr(conv_products, product)
        monkeypatch.setattr(conv_products, product, lambda *a, f=of: called.append(a[0].dtype) or f(*a))
    for asked in ("kernels_multiply", "has_fast"):
        monkeypatch.setattr(f"fasthyper.processor.{asked}", lambda dtype: native and dtype == torch.bfloat16)
    planner.forget()
    geo = GEOMETRIES[name]
    *args, g = (t.bfloat16() for t in tensors(geo, transposed))
    found = with_gradients(lambda *t: op(transposed)(*t, *geo, "cpu", "generate"), args, g)
    plain = with_gradients(lambda *t: truth(transposed, *t, geo), args, g)
    exact = with_gradients(lambda *t: truth(transposed, *t, geo), [t.double() for t in args], g.double())
    for e, of_plain, b in zip(error(found, exact), error(plain, exact), exact, strict=True):
        assert e <= 2 * of_plain + 4 * torch.finfo(torch.bfloat16).eps * b.norm().item()
    assert set(called) == ({torch.bfloat16} if native and (geo.pointwise or geo.groups == 1) else set())
    planner.forget()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("schedule", CONV_SCHEDULES)
def test_small_tiles(backend, schedule, transposed, monkeypatch):
    """Many chunks of instances and of outputs, as a large problem has."""
    some = ("odd", "groups", "depthwise", "pointwise in groups", "one pixel")
    args_of = {name: tensors(GEOMETRIES[name], transposed, B=3) for name in some}
    exact = {
        name: with_gradients(lambda *t, geo=GEOMETRIES[name]: truth(transposed, *t, geo), args, g)
        for name, (*args, g) in args_of.items()
    }
    plan = planner.plan
    for tile in (1, 60):
        with monkeypatch.context() as m:

            def small(problem, *schedule, tile=tile):
                found = plan(problem, *schedule)
                return dataclasses.replace(found, tile=tile) if isinstance(problem, ConvProblem) else found

            m.setattr(planner, "plan", small)
            for name, (*args, g) in args_of.items():
                geo = GEOMETRIES[name]
                found = with_gradients(lambda *t, geo=geo: op(transposed)(*t, *geo, backend, schedule), args, g)
                for a, b in zip(found, exact[name], strict=True):
                    torch.testing.assert_close(a, b)
                low = with_gradients(
                    lambda *t, geo=geo: op(transposed)(*t, *geo, backend, schedule),
                    [t.bfloat16() for t in args],
                    g.bfloat16(),
                )
                for a, b in zip(low, exact[name], strict=True):
                    assert (a.double() - b).norm() <= 0.03 * b.norm() + 1e-3


@pytest.mark.parametrize("instances", [1, 600])
@pytest.mark.parametrize("backend", RUNNABLE)
def test_sums_over_instances_are_float32(backend, instances, monkeypatch):
    """A sum of ones in bfloat16 stays at 256."""
    plan = planner.plan
    monkeypatch.setattr("fasthyper.processor.kernels_multiply", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.setattr("fasthyper.processor.has_fast", lambda dtype: dtype == torch.bfloat16)
    planner.forget()
    tile = lambda *a: dataclasses.replace(plan(*a), tile=instances)
    monkeypatch.setattr(planner, "plan", tile)
    geo = geometry((1, 1, 1), (1, 1, 1))
    *args, g = (torch.ones_like(t).bfloat16() for t in tensors(geo, False, B=600, I=1, O=1, R=1))
    found = with_gradients(lambda *t: op(False)(*t, *geo, backend, "generate"), args, g)
    assert [t.item() for t in found[3:]] == [600] * 4
    planner.forget()


@pytest.mark.parametrize(("instances", "passes"), [(2, 2), (3, 3)])
def test_dz_and_a_large_dh_are_sums_of_the_same_products(instances, passes, monkeypatch):
    """In 16 bits, dH and dW0 are summed a tile at a time. If dz fits a tile, it is not computed apart from them."""
    plan, product, called = planner.plan, conv_products.kernels, []
    monkeypatch.setattr("fasthyper.processor.has_fast", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(
        conv_products, "kernels", lambda x, g, w, geo: called.append(w.numel()) or product(x, g, w, geo)
    )
    planner.forget()
    geo = GEOMETRIES["pointwise"]
    *args, g = (t.bfloat16() for t in tensors(geo, False, B=instances))
    monkeypatch.setattr(planner, "plan", lambda *a: dataclasses.replace(plan(*a), tile=11))
    assert (args[1].numel() <= 11 < args[4].numel()) == (instances == 2)
    with_gradients(lambda *t: op(False)(*t, *geo, "aten", "generate"), args, g)
    assert sum(called) == passes * instances * args[4].numel()
    planner.forget()


@given(
    sizes=st.tuples(*[st.integers(0, 3)] * 4),
    groups=st.integers(1, 3),
    kernel=st.tuples(*[st.integers(1, 3)] * 2),
    more=st.tuples(*[st.integers(0, 4)] * 2),
    stride=st.tuples(*[st.integers(1, 3)] * 2),
    padding=st.tuples(*[st.integers(0, 3)] * 2),
    dilation=st.tuples(*[st.integers(1, 2)] * 2),
    transposed=st.booleans(),
    schedule=st.sampled_from(CONV_SCHEDULES),
)
@settings(max_examples=40, deadline=None)
def test_any_sizes(sizes, groups, kernel, more, stride, padding, dilation, transposed, schedule):
    B, I, O, R = sizes
    image = [d * (k - 1) + 1 + n for d, k, n in zip(dilation, kernel, more, strict=True)]
    geo = geometry((1, *image), (1, *kernel), (1, *stride), (0, *padding), (1, *dilation), groups)
    *args, g = tensors(geo, transposed, B=B, I=I, O=O * groups, R=R)
    exact = with_gradients(lambda *t: truth(transposed, *t, geo), args, g) if 0 not in sizes else None
    for backend in RUNNABLE:
        found = with_gradients(lambda *t, b=backend: op(transposed)(*t, *geo, b, schedule), args, g)
        single = [t.float() for t in args]
        also = with_gradients(lambda *t, b=backend: op(transposed)(*t, *geo, b, schedule), single, g.float())
        for k, (a, b) in enumerate(zip(found, also, strict=True)):
            assert torch.isfinite(a).all()
            if exact is not None:
                torch.testing.assert_close(a, exact[k])
                torch.testing.assert_close(b.double(), exact[k], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
def test_derivatives(transposed):
    geo = geometry((1, 3, 3), (1, 2, 2), (1, 2, 1), (0, 1, 0), groups=2)
    *args, _ = tensors(geo, transposed, B=2, I=1, O=2, R=2)
    args = [t.requires_grad_() for t in args]

    def f(*t):
        return op(transposed)(*t, *geo)

    assert gradcheck(f, args, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, args)


@pytest.mark.parametrize("name", ["conv_apply", "conv_transpose_apply", "conv_cond_grad", "conv_weight_grad"])
def test_family(name):
    """Each op of the family: its definition, its derivatives, and vmap over every subset of its arguments."""
    geo = geometry((1, 4, 3), (1, 2, 2), (1, 2, 1), (0, 1, 0), groups=2)
    x, z, weight, *_, y = tensors(geo, False, B=3, I=1, O=4, R=2)
    args = {
        "conv_apply": (x, z, weight),
        "conv_transpose_apply": (y, z, weight),
        "conv_cond_grad": (x, y, weight),
        "conv_weight_grad": (x, z, y),
    }[name]
    f = lambda *t: getattr(ops, name)(*t, *geo)
    torch.testing.assert_close(f(*args), getattr(reference, name)(*args, geo))
    leaves = [t.clone().requires_grad_() for t in args]
    torch.library.opcheck(getattr(ops, name).default, (*leaves, *geo))
    assert gradcheck(f, leaves, check_forward_ad=True)
    for batched in itertools.product((False, True), repeat=3):
        if any(batched):
            many = [torch.stack([t, 2 * t, t + 1]) if b else t for t, b in zip(args, batched, strict=True)]
            dims = tuple(0 if b else None for b in batched)
            each = [f(*(t[v] if b else t for t, b in zip(many, batched, strict=True))) for v in range(3)]
            torch.testing.assert_close(vmap(f, dims)(*many), torch.stack(each))


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(transposed):
    geo = GEOMETRIES["groups"]
    *args, g = tensors(geo, transposed, dtype=torch.float32)
    args = [t.requires_grad_() for t in args]
    name = "hyper_conv_transpose" if transposed else "hyper_conv"
    torch.library.opcheck(getattr(ops, name).default, (*args, *geo))
    of = *args[:5], g, *geo, [*ALL]
    torch.library.opcheck(getattr(ops, f"{name}_grads").default, tuple(of))


def test_transforms():
    geo = GEOMETRIES["groups"]
    x, z, weight, *_ = tensors(geo, False)
    loss = lambda w, x, z: ops.conv_apply(x, z, w, *geo).square().sum()
    each = [
        torch.autograd.functional.jacobian(lambda w, k=k: loss(w, x[k, None], z[k, None]), weight) for k in range(5)
    ]
    per_sample = vmap(grad(loss), (None, 0, 0))(weight, x.unsqueeze(1), z.unsqueeze(1))
    torch.testing.assert_close(per_sample, torch.stack(each))
    torch.testing.assert_close(jacrev(loss, 2)(weight, x, z), grad(loss, 2)(weight, x, z))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_compiled(transposed, last, compiled):
    """Compiled code gives the same values, gradients and memory formats, for any batch size."""
    geo = GEOMETRIES["groups"]
    f = compiled(lambda *t: op(transposed)(*t, *geo))
    for B in (5, 3, 2):
        *args, g = tensors(geo, transposed, B=B)
        if last:
            args[0] = args[0].to(memory_format=torch.channels_last_3d)
        found, exact = with_gradients(f, args, g), with_gradients(lambda *t: op(transposed)(*t, *geo), args, g)
        for a, b in zip(found, exact, strict=True):
            torch.testing.assert_close(a, b)
            assert a.stride() == b.stride()


def test_memory_format_is_kept():
    geo = GEOMETRIES["groups"]
    for transposed in (False, True):
        *args, g = tensors(geo, transposed)
        for last in (False, True):
            x = args[0].to(memory_format=torch.channels_last_3d if last else torch.contiguous_format)
            y, dx, *_ = with_gradients(lambda *t, tr=transposed: op(tr)(*t, *geo), (x, *args[1:]), g)
            for t in (y, dx):
                assert t.is_contiguous(memory_format=torch.channels_last_3d) == last


def test_views_of_the_head():
    """Heads stored with R first, as expert mixtures have them, or with other orders of axes."""
    geo = GEOMETRIES["odd"]
    *args, g = tensors(geo, False)
    exact = with_gradients(lambda *t: truth(False, *t, geo), args, g)
    for order in ((5, 0, 1, 2, 3, 4), (1, 0, 2, 3, 4, 5), (2, 3, 4, 5, 0, 1), (5, 4, 3, 2, 1, 0)):
        back = [order.index(k) for k in range(6)]
        weight = args[2].permute(order).contiguous().permute(back)
        for backend, schedule in itertools.product(RUNNABLE, CONV_SCHEDULES):
            of = [*args[:2], weight, *args[3:]]
            found = with_gradients(lambda *t, b=backend, s=schedule: ops.hyper_conv(*t, *geo, b, s), of, g)
            for a, b in zip(found, exact, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", RUNNABLE)
def test_expanded_and_sliced(backend):
    geo = GEOMETRIES["odd"]
    *args, g = tensors(geo, False)
    x = torch.randn(1, 2, *geo.image).double().expand(5, -1, -1, -1, -1)
    wide = torch.randn(10, 4, 1, 8, 9).double()
    for case in (x, wide[::2, 1:3, :, 1:, 2:8], wide[5:, :2, :, :7, :6].flip(3)):
        exact = with_gradients(lambda *t: truth(False, *t, geo), [case, *args[1:]], g)
        found = with_gradients(lambda *t: ops.hyper_conv(*t, *geo, backend, ""), [case, *args[1:]], g)
        for a, b in zip(found, exact, strict=True):
            torch.testing.assert_close(a, b)
        g_sliced = torch.stack([g, g], -1)[..., 0]
        found = with_gradients(lambda *t: ops.hyper_conv(*t, *geo, backend, ""), [case, *args[1:]], g_sliced)
        torch.testing.assert_close(found[1:], exact[1:])


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case", ["dense", "depthwise", "many features", "one huge kernel", "pointwise", "transposed", "few pixels"]
)
def test_memory(backend, dtype, case):
    """Temporary memory stays within the workspace and does not grow with the batch."""
    image, kernel, padding, groups, I, O, R = {
        "dense": ((1, 14, 14), (1, 3, 3), (0, 1, 1), 1, 128, 128, 4),
        "depthwise": ((1, 14, 14), (1, 3, 3), (0, 1, 1), 240, 1, 240, 4),
        "many features": ((1, 5, 5), (1, 3, 3), (0, 1, 1), 1, 64, 64, 128),
        "one huge kernel": ((1, 3, 3), (1, 3, 3), (0, 1, 1), 1, 1024, 1024, 2),
        "pointwise": ((1, 7, 7), (1, 1, 1), (0, 0, 0), 1, 192, 1152, 4),
        "transposed": ((1, 14, 14), (1, 4, 4), (0, 1, 1), 1, 64, 128, 8),
        "few pixels": ((1, 4, 4), (1, 4, 4), (0, 0, 0), 1, 128, 64, 8),
    }[case]
    transposed = case == "transposed"
    geo = geometry(image, kernel, (1, 2, 2) if transposed else (1, 1, 1), padding, groups=groups)

    def temporary(B):
        *args, g = tensors(geo, transposed, torch.float32, B=B, I=I, O=O, R=R)
        args = [t.to(dtype).requires_grad_() for t in args]

        def step():
            y = op(transposed)(*args, *geo, backend, "")
            return y, torch.autograd.grad(y, args, g.to(dtype))

        return peak_temporary_bytes(step)

    B = 2 if case == "one huge kernel" else 48
    once, twice = temporary(B), temporary(2 * B)
    limit = planner.get_workspace_limit()
    assert once < limit * 5 // 4
    assert twice < limit * 5 // 4


@pytest.mark.skipif("cpu" not in RUNNABLE, reason="the kernels are not built")
@pytest.mark.parametrize("sizes", [(3, 64, 64, 8, 16), (2, 256, 256, 8, 8), (3, 64, 64, 14, 64)], ids=str)
def test_memory_of_dz_alone_in_bfloat16(sizes, monkeypatch):
    """torch's gradient of a kernel takes several times the memory of dW: so tiles are those of torch's operations."""
    has_fast, tiles, real = processor.has_fast(torch.bfloat16), [], conv_generate.grads
    monkeypatch.setattr(conv_generate, "grads", lambda *a: tiles.append(a[-2].elements) or real(*a))
    for asked in ("kernels_multiply", "has_fast"):
        monkeypatch.setattr(f"fasthyper.processor.{asked}", lambda dtype: dtype == torch.bfloat16)
    fasthyper.set_workspace_limit(1 << 20)
    B, I, O, pixels, R = sizes
    geo = geometry((1, pixels, pixels), (1, 3, 3), padding=(0, 1, 1))
    x, z, weight, *_, g = (t.bfloat16() for t in tensors(geo, False, torch.float32, B=B, I=I, O=O, R=R))

    z.requires_grad_()
    of = {name: op(False)(x, z, weight, None, None, None, *geo, name, "generate") for name in ("cpu", "aten")}
    dz = lambda name: torch.autograd.grad(of[name], z, g, retain_graph=True)
    if has_fast:  # elsewhere torch's convolutions of bfloat16 take other memory
        assert peak_temporary_bytes(lambda: dz("cpu")) < 1 << 20
    for name in of:
        dz(name)
    assert tiles[-2] == tiles[-1]
    planner.forget()


def test_schedules_follow_the_image():
    """Few pixels take `fold`, many `generate`, and a forced schedule is taken."""
    few = ConvProblem("apply", 64, 1, 128 * 16, 64, 8, 16, 1, 16)
    many = few._replace(image=196, pixels=196)
    assert planner.plan(few).schedule == "fold"
    assert planner.plan(many).schedule == "generate"
    assert planner.plan(many, "fold").schedule == "fold"
    with pytest.raises(ValueError, match="schedule must be one of fold, generate, got 'project'"):
        planner.plan(many, "project")


WRONG = {
    "x without channels": ({"x": torch.randn(5, 4, 4)}, r"x must have shape \(B, X, h, w\), got \(5, 4, 4\)"),
    "other batch": ({"z": torch.randn(4, 3)}, r"z must have B = 5"),
    "other features": ({"z": torch.randn(5, 2)}, r"z must have shape \(5, 3\)"),
    "channels": ({"x": torch.randn(5, 3, 4, 4)}, "x must have groups · I = "),
    "groups": ({"groups": 3}, "x must have groups · I = "),
    "no groups": ({"groups": 0}, "groups must be at least 1"),
    "stride": ({"stride": 0}, "stride must be at least 1"),
    "strides": ({"stride": (1, 1, 1)}, "stride must be an integer or 2 of them"),
    "padding": ({"padding": -1}, "padding must be at least 0"),
    "padding by name": ({"padding": "full"}, "padding must be numbers, 'same' or 'valid'"),
    "same with stride": ({"padding": "same", "stride": 2}, "stride must be 1 with padding='same'"),
    "small image": ({"x": torch.randn(5, 4, 1, 4)}, "the kernel fits into"),
    "bias": ({"bias": torch.randn(3, 3)}, r"bias must have (O = 4|shape \(4, 3\))"),
    "base weight": ({"base_weight": torch.randn(4, 2, 3, 3)}, "base_weight must have"),
    "device": ({"z": torch.randn(5, 3, device="meta")}, "z must be on the device of x"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_argument(case):
    change, message = WRONG[case]
    of = {"x": torch.randn(5, 4, 4, 4), "z": torch.randn(5, 3), "weight": torch.randn(4, 4, 3, 3, 3), **change}
    with pytest.raises(ValueError, match=message):
        fasthyper.hyper_conv2d(**of)


def test_wrong_types():
    x, z, weight = torch.randn(5, 4, 4, 4), torch.randn(5, 3), torch.randn(4, 4, 3, 3, 3)
    with pytest.raises(TypeError, match="z must have the dtype of x"):
        fasthyper.hyper_conv2d(x, z.double(), weight)
    with pytest.raises(TypeError, match="stride must be an integer"):
        fasthyper.hyper_conv2d(x, z, weight, stride=1.5)
    with pytest.raises(TypeError, match="weight must be a tensor"):
        fasthyper.hyper_conv2d(x, z, None)
    with pytest.raises(ValueError, match="output_padding must be smaller"):
        fasthyper.hyper_conv_transpose2d(x, z, weight, output_padding=1)


def test_wrong_geometry_of_the_op():
    geo = GEOMETRIES["odd"]
    *args, _ = tensors(geo, False)
    for change, message in (
        ({"output": [1, 9, 9]}, "output must be at most"),
        ({"image": [1, 7, 7]}, "image must be"),
        ({"stride": [1, 2]}, "stride must have three numbers"),
        ({"groups": 2}, "channels"),
        ({"dilation": [1, 0, 1]}, "must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.hyper_conv(*args, *geo._replace(**change))
