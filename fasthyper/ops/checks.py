"""What every tensor of a call must agree on: one place for the messages."""

from __future__ import annotations

import torch
from torch import Tensor

from .rules import AXES

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_NAMES = {"x": "x", "z": "z", "w": "weight", "g": "g"}


def check_tensors(**tensors: Tensor | None) -> None:
    """Check that all are floating point tensors of one dtype on one device.

    Raises:
        TypeError: names the argument that is no tensor, not floating point, or of another dtype.
        ValueError: names the arguments on different devices.
    """
    first: tuple[str, Tensor] | None = None
    for name, t in tensors.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.dtype not in DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(
                f"{name} must be floating point, got shape {tuple(t.shape)} of {t.dtype}; known are {names}"
            )
        if first is None:
            first = name, t
        elif t.dtype != first[1].dtype:
            raise TypeError(
                f"{name} must have the dtype of {first[0]}: {name} has shape {tuple(t.shape)} of {t.dtype}, "
                f"{first[0]} has shape {tuple(first[1].shape)} of {first[1].dtype}"
            )
        elif t.device != first[1].device:
            raise ValueError(
                f"{name} must be on the device of {first[0]}: {name} with shape {tuple(t.shape)} is on {t.device}, "
                f"{first[0]} with shape {tuple(first[1].shape)} is on {first[1].device}"
            )


def _agree(x: Tensor, z: Tensor | None, w: Tensor | None, g: Tensor | None) -> bool:
    """Whether the factors fit each other: the quick answer, before the long one."""
    dtype, device = x.dtype, x.device
    if x.dim() != 3 or dtype not in DTYPES:
        return False
    B, N, I = x.shape
    O = R = None
    if g is not None:
        if g.dim() != 3 or g.dtype != dtype or g.device != device or g.shape[0] != B or g.shape[1] != N:
            return False
        O = g.shape[2]
    if w is not None:
        if w.dim() != 3 or w.dtype != dtype or w.device != device or w.shape[1] != I:
            return False
        if O is not None and w.shape[0] != O:
            return False
        R = w.shape[2]
    if z is None:
        return True
    return z.dim() == 2 and z.dtype == dtype and z.device == device and z.shape[0] == B and R in (None, z.shape[1])


def check_factors(x: Tensor, z: Tensor | None = None, w: Tensor | None = None, g: Tensor | None = None) -> None:
    """Check factors of T(x, z, H, g) against each other.

    Raises:
        TypeError: if the dtypes differ or are not floating point.
        ValueError: names the argument of the wrong rank, or the two whose sizes disagree.
    """
    if _agree(x, z, w, g):
        return
    factors = {f: t for f, t in (("x", x), ("z", z), ("w", w), ("g", g)) if t is not None}
    check_tensors(**{_NAMES[f]: t for f, t in factors.items()})
    seen: dict[str, str] = {}
    for f, t in factors.items():
        if t.dim() != len(AXES[f]):
            expected = ", ".join(AXES[f].upper())
            raise ValueError(f"{_NAMES[f]} must have shape ({expected}), got {tuple(t.shape)}")
        for axis, size in zip(AXES[f], t.shape, strict=True):
            other = seen.setdefault(axis, f)
            if size != factors[other].shape[AXES[other].index(axis)]:
                raise ValueError(
                    f"{_NAMES[f]} and {_NAMES[other]} must agree on {axis.upper()}: {_NAMES[f]} "
                    f"({', '.join(AXES[f].upper())}) has shape {tuple(t.shape)}, {_NAMES[other]} "
                    f"({', '.join(AXES[other].upper())}) has shape {tuple(factors[other].shape)}"
                )


def check_shapes(x: Tensor, expected: tuple[tuple[str, Tensor | None, tuple[int, ...]], ...], layer: str = "") -> None:
    """Check tensors that may be absent, each with its name and the shape that it must have, beside x.

    Raises:
        TypeError: names the argument, and its layer, that has not the dtype of x.
        ValueError: names the argument of another shape, or on another device than x.
    """
    dtype, device = x.dtype, x.device
    for name, t, shape in expected:
        if t is not None and not (t.shape == shape and t.dtype == dtype and t.device == device):
            check_tensors(x=x, **{name + layer: t})
            raise ValueError(f"{name}{layer} must have shape {shape}, got {tuple(t.shape)}")
