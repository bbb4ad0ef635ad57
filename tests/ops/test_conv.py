"""The ops of generated convolutions: values and gradients."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from convolutions import GEOMETRIES, RUNNABLE, error, geometry, op, ops, tensors, truth, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from fasthyper import planner
from fasthyper.backends.aten import conv_products
from fasthyper.problem import CONV_SCHEDULES, ConvProblem


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
