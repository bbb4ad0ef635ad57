"""What the stages of `make gpu` share: their problems, a float64 result, and the lines that the summary reads."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fasthyper.backends import BACKENDS

SMALL = os.environ.get("FASTHYPER_GPU_SMALL") == "1"
"""Whether all problems are small, for the dry run, where an emulator runs the kernels."""

BENCHED = "qm9 mpnn,modelnet mpnn,diffdock,qmix mixer 27m,hyper policy,rotation cifar,biaffine labels,tiny batch,square"
BENCHED += ",operator learning,qm9 graph,modelnet graph,sampled graph"
"""The workloads of the stage `bench`, as `--only` takes them."""

TIMED = {  # B, N, R, I, O
    "qm9": (39_168, 1, 128, 64, 64),
    "square": (16_384, 1, 128, 128, 128),
    "modelnet": (8_192, 1, 25, 64, 128),
    "diffdock": (50_000, 1, 144, 48, 48),
    "policy": (256, 1, 256, 17, 256),
    "qmix": (5_760, 1, 64, 27, 32),
}
"""The problems of the stages `kernels` and `ncu`."""

LAUNCH_BOUND = {
    "qmix": (5_760, 1, 64, 27, 32),
    "rotation": (64, 1, 50, 784, 10),
    "policy": (256, 1, 256, 17, 256),
    "tiny": (32, 1, 64, 10, 32),
}
"""The problems of the stage `eager`."""

NAMES = ("x", "z", "weight", "bias", "base_weight", "base_bias")


def sized(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sizes of a problem, with few instances and features in a dry run."""
    return tuple(min(n, most) for n, most in zip(sizes, (12, 2, 16, 4, 16), strict=True)) if SMALL else sizes


def made(sizes: tuple[int, ...], dtype: torch.dtype, device: str = "cuda", affine: bool = True) -> list[Tensor]:
    """Return x, z, H, bias, W0, b0 and g, random, with the last but g only if `affine`."""
    B, N, R, I, O = sizes
    generator = torch.Generator("cpu").manual_seed(sum(sizes))
    shapes = ((B, N, I), (B, R), (O, I, R), *(((O, R), (O, I), (O,)) if affine else ()), (B, N, O))
    return [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes]


def exact(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return y and the gradients of all factors in float64, on the CPU, without the package."""
    *factors, g = (t.cpu().double() for t in tensors)
    factors = [t.requires_grad_() for t in factors]
    x, z, weight, *rest = factors
    y = torch.bmm(x, (z @ weight.flatten(0, 1).T).unflatten(1, weight.shape[:2]).mT)
    if rest:
        bias, base_weight, base_bias = rest
        y = y + x @ base_weight.T + (z @ bias.T)[:, None] + base_bias
    return [y.detach(), *torch.autograd.grad(y, factors, g)]


def error(result: Tensor, expected: Tensor) -> float:
    """Return the relative error by norms; infinite where a number is not finite."""
    if not bool(result.isfinite().all()):
        return float("inf")
    return float((result.cpu().double() - expected).norm() / expected.norm())


def say(text: str) -> None:
    """Print a line that the summary of `make gpu` repeats, if it has room."""
    print(f"SAID {text}", file=sys.stderr, flush=True)


def report(**result: Any) -> None:
    """Print numbers and words for the summary of `make gpu`; the last report of a stage counts."""
    print("RESULT " + json.dumps(result), file=sys.stderr, flush=True)


@functools.cache
def available(name: str) -> bool:
    """Return whether a backend can run here; print why not."""
    if (why := BACKENDS[name].unavailable()) is not None:
        say(f"{name} is left out: {why}")
    return why is None


def described(failure: BaseException) -> str:
    """Return one line about an exception."""
    return f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0][:140]}"


def attempt(run: Callable[[], Any]) -> tuple[Any, str]:
    """Return what a call returns, or None and why it failed."""
    try:
        return run(), ""
    except Exception as failure:
        return None, described(failure)
