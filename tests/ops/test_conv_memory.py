"""The ops of generated convolutions: temporary memory, memory formats and schedules."""

from __future__ import annotations

import pytest
import torch
from convolutions import GEOMETRIES, RUNNABLE, geometry, op, tensors, with_gradients

import fasthyper
from fasthyper import planner, processor
from fasthyper.backends.aten import conv_generate
from fasthyper.measure import peak_temporary_bytes
from fasthyper.problem import ConvProblem


def test_memory_format_is_kept():
    geo = GEOMETRIES["groups"]
    for transposed in (False, True):
        *args, g = tensors(geo, transposed)
        for last in (False, True):
            x = args[0].to(memory_format=torch.channels_last_3d if last else torch.contiguous_format)
            y, dx, *_ = with_gradients(lambda *t, tr=transposed: op(tr)(*t, *geo), (x, *args[1:]), g)
            for t in (y, dx):
                assert t.is_contiguous(memory_format=torch.channels_last_3d) == last


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


def test_schedules_follow_the_image():
    """Few pixels take `fold`, many `generate`, and a forced schedule is taken."""
    few = ConvProblem("apply", 64, 1, 128 * 16, 64, 8, 16, 1, 16)
    many = few._replace(image=196, pixels=196)
    assert planner.plan(few).schedule == "fold"
    assert planner.plan(many).schedule == "generate"
    assert planner.plan(many, "fold").schedule == "fold"
    with pytest.raises(ValueError, match="schedule must be one of fold, generate, got 'project'"):
        planner.plan(many, "project")
