"""The planner's decision in words and numbers: the text that ``fasthyper plan`` prints."""

from __future__ import annotations

from typing import cast

import torch

from . import backends, planner
from .geometry import AXES, Geometry, output_size
from .problem import AUTO, ConvProblem, Plan, Problem, TermProblem

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
_GRADIENTS = ("x", "z", "the head")
_ORDERS = {
    "fold": "x ⊗ z first, then one product with K = I·R",
    "generate": "z · H first, a tile of W at a time, then x",
    "project": "x · H first, then z",
    "aggregate": "the sum of x ⊗ z of each target first, then one product with K = I·R",
}


def explain(
    *,
    batch: int | None = None,
    points: int = 1,
    cond: int,
    in_features: int,
    out_features: int,
    edges: int | None = None,
    sources: int | None = None,
    conds: int | None = None,
    targets: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    backend: str | None = None,
) -> str:
    """Return, as text, the predicted cost of every schedule, the schedule that is taken, and the reason.

    Args:
        batch: B, instances; None with `edges`.
        points: N, points per instance, or rows of x per source.
        cond: R, features of z.
        in_features: I.
        out_features: O.
        edges: E, the terms of a call with an incidence.
        sources: S, rows of x; by default E, without an index.
        conds: C, rows of z; by default E.
        targets: T, rows of y; by default E.
        dtype: ``"float64"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: a device type, such as ``"cpu"`` or ``"cuda"``.
        backend: the name of a backend, whether it can run here or not; None for the current choice.

    Raises:
        ValueError: if a size is negative, the dtype, the device type or the backend is unknown, or not exactly one of
            `batch` and `edges` is given.

    Example:
        >>> print(explain(batch=4800, points=1, cond=128, in_features=64, out_features=64))
        B = 4,800, N = 1, R = 128, I = 64, O = 64, float32 on cpu, backend ..., workspace at most 32.0 MiB
        written out, W would take 75.0 MiB
        ...
    """
    if (batch is None) == (edges is None):
        raise ValueError(f"one of batch and edges must be given, got batch={batch} and edges={edges}")
    counts = {"sources": sources, "conds": conds, "targets": targets}
    if edges is None and (given := [name for name, size in counts.items() if size is not None]):
        raise ValueError(f"{given[0]} must come with edges, got {given[0]}={counts[given[0]]} alone")
    sizes = {"batch": batch, "edges": edges, **counts}
    sizes.update({"points": points, "cond": cond, "in": in_features, "out": out_features})
    for name, size in sizes.items():
        if size is not None and size < 0:
            raise ValueError(f"{name} must not be negative, got {size}")
    _check_dtype(dtype)
    device = _device(device)
    features = points, cond, in_features, out_features
    forward: Problem | TermProblem
    if edges is None:
        letters, counted = "B", [cast(int, batch)]
        forward = Problem("apply", cast(int, batch), *features, DTYPES[dtype], device)
    else:
        letters, counted = "ESCT", [edges, *(edges if size is None else size for size in counts.values())]
        E, S, C, T = counted
        forward = TermProblem("apply", E, S, C, T, *features, DTYPES[dtype], device)
    backend = _backend(forward, backend or backends.current().backend)
    forward = forward._replace(backend=backend)
    named = [f"{letter} = {size:,}" for letter, size in zip(letters + "NRIO", [*counted, *features], strict=True)]
    rows = edges if edges is not None and conds is None else conds if edges is not None else batch
    written_out = cast(int, rows) * in_features * out_features * DTYPES[dtype].itemsize
    lines = [
        f"{', '.join(named)}, {dtype} on {device}, "
        f"backend {backend}, workspace at most {_mib(planner.get_workspace_limit())}",
        f"written out, W would take {_mib(written_out)}",
    ]
    lines += ["", "forward", *_table(planner.plans(forward))]
    backward = forward._replace(op="grads")
    groups = planner.costs_of(backward).backward(backward) if isinstance(backward, Problem) else (backward.needs,)
    for needs in groups:
        lines += ["", _title(needs), *_table(planner.plans(backward._replace(needs=needs)))]
    return "\n".join(lines)


def explain_convolution(
    *,
    batch: int,
    cond: int,
    in_channels: int,
    out_channels: int,
    image: list[int],
    kernel: list[int],
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    dtype: str = "float32",
    device: str = "cpu",
    backend: str | None = None,
) -> str:
    """Return the same for a convolution with generated kernels.

    Args:
        batch: B, images, each with its own kernel.
        cond: R, features of z.
        in_channels: channels of the image.
        out_channels: channels of the output.
        image: pixels of each axis of the image, one to three axes.
        kernel: taps of each axis; one number stands for all axes.
        stride: of all axes.
        padding: of all axes.
        dilation: of all axes.
        groups: groups of channels.
        dtype: as in `explain`.
        device: as in `explain`.
        backend: as in `explain`.

    Raises:
        ValueError: if a size is out of range, or as in `explain`.

    Example:
        >>> print(explain_convolution(batch=64, cond=4, in_channels=256, out_channels=256, image=[14, 14], kernel=[3],
        ...                           padding=1))
        B = 64, R = 4, 256 → 256 channels, 14 × 14 → 14 × 14 pixels, kernel 3 × 3, float32 on cpu, backend ..., ...
        written out, W would take 144.0 MiB
        ...
    """
    dims = len(image)
    kernel = kernel * dims if len(kernel) == 1 else kernel
    numbers = {"batch": [batch], "cond": [cond], "in": [in_channels], "out": [out_channels]}
    positive = {"image": image, "kernel": kernel, "stride": [stride], "dilation": [dilation], "groups": [groups]}
    for name, sizes, least in (*((*n, 0) for n in numbers.items()), *((*n, 1) for n in positive.items())):
        if any(size < least for size in sizes):
            raise ValueError(f"{name} must be at least {least}, got {sizes}")
    if not 1 <= dims <= AXES or len(kernel) != dims:
        raise ValueError(f"image must have one to three axes, and kernel one size or as many, got {image} and {kernel}")
    if in_channels % groups or out_channels % groups or padding < 0:
        raise ValueError(f"groups must divide the channels and padding be at least 0, got {groups} and {padding}")
    _check_dtype(dtype)
    output = [output_size(n, k, stride, padding, dilation) for n, k in zip(image, kernel, strict=True)]
    if min(output) < 1:
        raise ValueError(f"image must have room for the kernel, got {image} and {kernel}")
    every = [1] * dims
    geo = Geometry(every, every, every, groups, image, kernel, output)
    kind, I = _device(device), in_channels // groups
    of_group = groups, I * geo.taps, out_channels // groups, cond
    forward = ConvProblem("apply", batch, *of_group, *geo.pixels, geo.taps, DTYPES[dtype], kind)
    name = _backend(forward, backend or backends.current().backend)
    forward = forward._replace(backend=name)
    by = lambda sizes: " × ".join(map(str, sizes))
    lines = [
        f"B = {batch:,}, R = {cond:,}, {in_channels:,} → {out_channels:,} channels, {by(image)} → {by(output)} pixels, "
        f"kernel {by(kernel)}, {dtype} on {kind}, backend {name}, workspace at most "
        f"{_mib(planner.get_workspace_limit())}",
        f"written out, W would take {_mib(batch * out_channels * I * geo.taps * DTYPES[dtype].itemsize)}",
    ]
    lines += ["", "forward", *_table(planner.plans(forward))]
    lines += ["", _title(forward.needs), *_table(planner.plans(forward._replace(op="grads")))]
    return "\n".join(lines)


def _device(name: str) -> str:
    try:
        return torch.device(name).type
    except RuntimeError as error:
        raise ValueError(f"device must be a device type such as cpu or cuda, got {name!r}") from error


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def _backend(problem: Problem | TermProblem | ConvProblem, name: str) -> str:
    """Return the backend that computes a problem; for `auto` on a device that is absent here, the preferred one."""
    if name == AUTO:
        module = getattr(torch, problem.device, None)
        here = module is None or module.is_available()
        name = backends.automatic(problem.device) if here else backends.preferred(problem.device)
    elif name not in backends.BACKENDS:
        raise ValueError(f"backend must be one of {', '.join([AUTO, *backends.BACKENDS])}, got {name!r}")
    module = backends.BACKENDS[name]
    if isinstance(problem, ConvProblem):
        return name if hasattr(module, "apply_conv") and problem.dtype in module.DTYPES else backends.FALLBACK
    if isinstance(problem, TermProblem):
        return name if hasattr(module, "apply_terms") and problem.dtype in module.DTYPES else backends.FALLBACK
    return name if module.takes(problem) else backends.FALLBACK


def _title(needs: tuple[bool, ...]) -> str:
    if all(needs):
        return "backward, all three gradients"
    return f"backward of {' and '.join(name for name, k in zip(_GRADIENTS, needs, strict=True) if k)}"


def _table(plans: list[Plan]) -> list[str]:
    rows = [f"  {'schedule':<10}{'Gflop':>10}{'MB moved':>11}{'workspace':>13}{'predicted':>13}"]
    for plan in plans:
        rows.append(
            f"  {plan.schedule:<10}{plan.flops / 1e9:>10.3f}{plan.bytes / 1e6:>11.1f}{_mib(plan.workspace):>13}"
            f"{plan.seconds * 1e3:>10.3f} ms"
        )
    first, second = plans[0], plans[1]
    if not first.flops:
        rows.append("  nothing to compute")
        return rows
    rows.append(f"  taken: {first.schedule}, {_ORDERS[first.schedule]}: {_reason(first, second)}")
    return rows


def _reason(first: Plan, second: Plan) -> str:
    """Return the reason for the first plan: the larger of its two savings, or the shapes of its products."""
    flops, moved = _ratio(second.flops, first.flops), _ratio(second.bytes, first.bytes)
    why = {
        f"{second.schedule} does {flops:.2f} times its flops": flops,
        f"{second.schedule} moves {moved:.2f} times its bytes": moved,
    }
    text, ratio = max(why.items(), key=lambda item: item[1])
    if ratio < 1.1:
        text = f"its products have better shapes than those of {second.schedule}"
    return f"predicted {_ratio(second.seconds, first.seconds):.2f} times as fast as {second.schedule}; {text}"


def _ratio(a: float, b: float) -> float:
    return a / b if b else 1.0


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"
