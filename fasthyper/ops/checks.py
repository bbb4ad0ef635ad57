"""What every tensor of a call must agree on: one place for the messages."""

from __future__ import annotations

from torch import Tensor

from .rules import AXES

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
        if not t.is_floating_point():
            raise TypeError(f"{name} must be floating point, got shape {tuple(t.shape)} of {t.dtype}")
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


def check_factors(**factors: Tensor) -> None:
    """Check factors of T(x, z, H, g), named x, z, w, g, against each other.

    Raises:
        TypeError: if the dtypes differ or are not floating point.
        ValueError: names the argument of the wrong rank, or the two whose sizes disagree.
    """
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
