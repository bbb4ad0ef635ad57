"""The axes of every tensor of every op: one table, for the check, its message and the shapes of results.

| letter | size                             | letter | size                               |
|--------|----------------------------------|--------|------------------------------------|
| B      | instances, each with its own z   | O      | out features of the layer          |
| N      | points that share an instance    | I      | in features of the layer           |
| R      | features of z                    | J      | features between two layers        |
| S      | sources, rows of x               | C      | conditions, rows of z              |
| T      | targets, rows of y               | E      | terms, each with s, c and t        |
| M      | members of a first set; models   | P, Q   | I and R, with an appended one      |
| X      | channels of an image             | dhw    | its pixels                         |
| ijk    | taps of a kernel                 | abc    | pixels of a convolution's output   |

csrc/eager.cpp uses the same table, which `ops/linear.py` passes to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.masked import MaskedTensor
from torch.overrides import handle_torch_function

from ..problem import DTYPES
from ..terms import NAMES

Axes = Mapping[str, str]
"""Letters by argument. The first argument with a letter fixes its size; errors name a later argument that differs."""

LINEAR: Axes = {
    "weight": "OIR",
    "x": "BNI",
    "z": "BR",
    "bias": "OR",
    "base_weight": "OI",
    "base_bias": "O",
    "g": "BNO",
}
MODELS: Axes = {name: f"M{LINEAR[name]}" for name in ("weight", "x", "z", "g")}
"""M layers of the same sizes, each with its own factors."""
PAIRS: Axes = {
    "weight": "OPQ",
    "x": "BMI",
    "z": "BNR",
    "bias": "O",
    "g": "BMNO",
}
"""In `pairs` N are the members of the second set. P is I or I + 1, and Q is R or R + 1: `ops/pairs.py` checks it."""
PRIMARY: Axes = {
    "x": "BNI",
    "z": "BR",
    "weight1": "JIR",
    "weight2": "OJR",
    "bias1": "JR",
    "base_weight1": "JI",
    "base_bias1": "J",
    "bias2": "OR",
    "base_weight2": "OJ",
    "base_bias2": "O",
    "a": "BNJ",
    "g": "BNO",
}

CONV: Axes = {
    "weight": "OIijkR",
    "x": "BXdhw",
    "z": "BR",
    "bias": "OR",
    "base_weight": "OIijk",
    "base_bias": "O",
    "g": "BOabc",
}
"""x is the image of a convolution, and g has its output. X is I times the number of groups."""
CONV_TRANSPOSE: Axes = {**CONV, "x": "BOabc", "bias": "XR", "base_bias": "X", "g": "BXdhw"}

TERMS: Axes = {**LINEAR, "x": "SNI", "z": "CR", "g": "TNO"}
GROUPS: Axes = {"x": "EI", "weight": "CIO", "g": "EO"}
"""Rows, each with the matrix of its group: E rows, C groups."""
INDICES = NAMES
"""The arguments that are indices, of axis E: int64, or None for the identity."""
COUNTS = {"sources": "S", "conds": "C", "targets": "T"}
"""The letters of the arguments that are sizes."""


def agree(axes: Axes, tensors: Mapping[str, Any], optional: Sequence[str] = ()) -> bool:
    """Return whether all tensors have one known dtype, one device, and sizes that agree; raise nothing."""
    x = tensors["x"]
    if x is None:
        return False
    dtype, device = x.dtype, x.device
    if dtype not in DTYPES:
        return False
    sizes: dict[str, int] = {}
    for name, letters in axes.items():
        t = tensors.get(name)
        if t is None:
            if name in tensors and name not in optional:
                return False
            continue
        shape = t.shape
        if len(shape) != len(letters) or t.dtype != dtype or t.device != device:
            return False
        for letter, size in zip(letters, shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                return False
    return True


def sizes_of(axes: Axes, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the size of every letter, from shapes that agree."""
    return {letter: size for name, shape in shapes.items() for letter, size in zip(axes[name], shape, strict=True)}


def shape_of(letters: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape that letters stand for."""
    return tuple(sizes[letter] for letter in letters)


def check(axes: Axes, tensors: Mapping[str, Any], optional: Iterable[str] = ()) -> None:
    """Check the tensors of a call: type, dtype, device, then rank and sizes.

    Args:
        axes: the letters of each argument. A ``*`` stands for any number of axes.
        tensors: the arguments by name, in the order of the call; x is the first.
        optional: the names of those that may be None.

    Raises:
        TypeError: an argument is not a floating point tensor, or has another dtype than x.
        ValueError: an argument is on another device than x, or its shape is wrong.
    """
    for name, t in tensors.items():
        if t is not None or name not in optional:
            _check_tensor(name, t, tensors["x"])
    fixed: dict[str, tuple[int, str]] = {}  # the size of each letter, and the argument that fixed it
    for name, letters in axes.items():
        t = tensors.get(name)
        if t is None:
            continue
        pairs = _pair_letters(letters, t.shape)
        if pairs is None:
            raise ValueError(_wrong_shape(name, letters, t, fixed) + _shared_z(name, tensors))
        for letter, size in pairs:
            expected, other = fixed.setdefault(letter, (size, name))
            if size != expected:
                raise ValueError(
                    f"{_wrong_shape(name, letters, t, fixed)}; {name} must have {letter} = {expected}: {other} "
                    f"{_format_axes(axes[other])} has shape {tuple(tensors[other].shape)}{_shared_z(name, tensors)}"
                )


def _check_tensor(name: str, t: Any, x: Tensor) -> None:
    check_input(name, t)
    if t.dtype != x.dtype:
        raise TypeError(
            f"{name} must have the dtype of x: {name} has shape {tuple(t.shape)} of {t.dtype}, "
            f"x has shape {tuple(x.shape)} of {x.dtype}"
        )
    if t.device != x.device:
        raise ValueError(
            f"{name} must be on the device of x: {name} with shape {tuple(t.shape)} is on {t.device}, "
            f"x with shape {tuple(x.shape)} is on {x.device}"
        )


def check_dense(name: str, t: Any) -> None:
    """Check that an argument is a tensor whose elements are all in one block of memory, with strides.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(t, Tensor):
        got = "None" if t is None else type(t).__name__
        hint = ": torch.from_numpy makes one of it" if got == "ndarray" else ""
        raise TypeError(f"{name} must be a tensor, got {got}{hint}")
    if t.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested one: pad it, or put the rows of all instances one after the "
            "other and pass an incidence, Incidence.from_batch"
        )
    if t.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor (torch.strided), got one of {t.layout}: pass {name}.to_dense()")
    if isinstance(t, MaskedTensor):
        raise TypeError(f"{name} must be an ordinary tensor, got a {type(t).__name__}: pass {name}.get_data()")


def check_input(name: str, t: Any) -> None:
    """Check that an argument is a dense tensor of floating point numbers.

    Raises:
        TypeError: it is not.
    """
    check_dense(name, t)
    if t.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name} must be floating point, got shape {tuple(t.shape)} of {t.dtype}; known are {known}")


def explain(wrong: Exception, tensors: Mapping[str, Any]) -> None:
    """Raise a TypeError in the place of that of a subclass of Tensor which knows no op of this package.

    torch's own message names none of the arguments.
    """
    if not isinstance(wrong, TypeError) or not any(s in str(wrong) for s in ("NotImplemented", "no implementation")):
        return
    for name, t in tensors.items():
        if isinstance(t, Tensor) and type(t) not in (Tensor, torch.nn.Parameter):
            raise TypeError(
                f"{name} must be an ordinary tensor, got a {type(t).__name__}, which has no rule for the op"
            )


def overridden(function: Any, tensors: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Call a public function as a subclass of Tensor overrides it, by ``__torch_function__``.

    Raises:
        TypeError: none of the subclasses does; the message names an argument.
    """
    try:
        return handle_torch_function(function, tuple(tensors.values()), *args, **kwargs)
    except TypeError as raised:
        explain(raised, tensors)
        raise


def _pair_letters(letters: str, shape: Sequence[int]) -> list[tuple[str, int]] | None:
    """Pair letters with sizes; None if the rank is wrong."""
    first, star, last = letters.partition("*")
    rank = len(first) + len(last)
    if len(shape) < rank or (len(shape) > rank and not star):
        return None
    return [*zip(first, shape, strict=False), *zip(last, shape[len(shape) - len(last) :], strict=True)]


def _format_axes(axes: Sequence[str]) -> str:
    """Return axes in the notation of a shape: (B, R), or (O,), or (B, I) or (B, *, I)."""
    if "*" in axes:
        return f"{_format_axes([axis for axis in axes if axis != '*'])} or ({', '.join(axes)})"
    return f"({', '.join(axes)})" if len(axes) > 1 else f"({axes[0]},)"


def _wrong_shape(name: str, letters: str, t: Tensor, fixed: Mapping[str, tuple[int, str]]) -> str:
    expected = [str(fixed[letter][0]) if letter in fixed else letter for letter in letters]
    return (
        f"{name} must have shape {_format_axes(expected)}, got {tuple(t.shape)}: its axes are {_format_axes(letters)}"
    )


def _shared_z(name: str, tensors: Mapping[str, Tensor]) -> str:
    """Return a hint if z looks like one for the whole batch, or like one for each point."""
    z, x = tensors.get("z"), tensors["x"]
    if name == "z" and z is not None and z.dim() > 2:
        last = z.dim() - 2
        return (
            "; points share the z of their instance: for a z of its own for each step or token, make each an instance, "
            f"x.flatten(0, {last}) and z.flatten(0, {last})"
        )
    if name != "z" or z is None or not (z.dim() == 1 or (z.dim() == 2 and z.shape[0] == 1)):
        return ""
    one = "z[None]" if z.dim() == 1 else "z"
    return (
        f"; for one z that the whole batch of x {tuple(x.shape)} shares, "
        f"pass x[None] and {one}: the batch becomes points"
    )


def flatten_points(x: Tensor) -> Tensor:
    """View x (B, I) or (B, *, I) as (B, N, I).

    Raises:
        ValueError: x has fewer than two axes.
    """
    if x.dim() == 3:
        return x
    if x.dim() < 2:
        raise ValueError(f"x must have shape (B, I) or (B, *, I), got {tuple(x.shape)}")
    return x.unsqueeze(1) if x.dim() == 2 else x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def restore_points(y: Tensor, x: Tensor) -> Tensor:
    """View y (B, N, O) with the points of x."""
    if x.dim() == 3:
        return y
    return y.squeeze(1) if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])
