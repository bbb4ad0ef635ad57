"""Rows of an existing head as the parameters of generated layers, in the layouts that other code uses."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fasthyper.nn.plain_linear import why_not_plain

LAYOUTS = ("oi", "io")


@dataclass(frozen=True)
class Place:
    """Where a parameter of the primary stands in a flat vector."""

    name: str
    start: int
    shape: tuple[int, ...]
    layout: str

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        return self.start + self.count

    def view(self, rows: Tensor) -> Tensor:
        """View rows of a head `(count, R)`, or of its bias `(count,)`, in the shape of the parameter."""
        if self.layout == "oi":
            return rows.view(*self.shape, *rows.shape[1:])
        first, second, *rest = self.shape
        return rows.view(second, first, *rest, *rows.shape[1:]).transpose(0, 1)

    def rows(self, parameter: Tensor) -> Tensor:
        """Return the rows of a parameter in the order of the flat vector: the inverse of `view`."""
        last = len(self.shape) - 1
        return (parameter if self.layout == "oi" else parameter.transpose(0, 1)).flatten(0, last)

    def of(self, head: Any, name: str) -> Tensor | None:
        """Return the view of the rows of a head that are the parameter `name`, or `base_…`, the base of it."""
        rows = head.bias if name.startswith("base_") else head.weight
        return None if rows is None else self.view(rows[self.start : self.stop])

    def parameter(self, rows: Tensor) -> nn.Parameter:
        """Return a copy of a parameter, from all rows of a head or of its bias; frozen if these are."""
        mine = self.view(rows.detach()[self.start : self.stop])
        return nn.Parameter(mine.clone(memory_format=torch.contiguous_format), requires_grad=rows.requires_grad)


def check_head(head: object) -> None:
    """Check that a head is an nn.Linear that computes `z @ weight.T + bias` and no more."""
    if not isinstance(head, nn.Linear):
        raise TypeError(f"head must be an nn.Linear, got {type(head).__name__}")
    if problem := why_not_plain(head):
        raise TypeError(f"head cannot be converted: {problem}")


def check_new_head(owner: Any, new: object, expected: tuple[int, ...], dtype: torch.dtype) -> None:
    """Check what takes the place of the head of a layer: an nn.Linear with a weight of this shape and dtype.

    Raises:
        TypeError: it is no plain nn.Linear, or has another dtype.
        ValueError: its weight or its bias has another shape.
    """
    if not isinstance(new, nn.Linear):
        got = f" {tuple(new.shape)}" if isinstance(new, Tensor) else ""
        raise TypeError(
            f"head of {name_of(owner)} must be an nn.Linear with a weight {expected}, got {type(new).__name__}{got}"
        )
    if problem := why_not_plain(new):
        raise TypeError(f"head of {name_of(owner)} cannot be replaced: {problem}")
    check_shapes(owner, new, expected)
    if new.weight.dtype != dtype:
        raise TypeError(
            f"head of {name_of(owner)} must have a weight {expected} of {dtype}, got {new.weight.dtype}: "
            "convert the new head, or before that the layer"
        )


def refuse_deletion(owner: Any) -> NoReturn:
    """Raise: without its head, an owner does not know which head may take its place.

    Raises:
        AttributeError: always.
    """
    raise AttributeError(f"head of {name_of(owner)} cannot be deleted: assign another head instead")


def check_shapes(owner: Any, head: Any, expected: tuple[int, ...]) -> None:
    """Check the shapes of the weight and the bias of a head.

    Raises:
        ValueError: they are others.
    """
    for name, shape in (("weight", expected), ("bias", expected[:1])):
        t = getattr(head, name)
        if t is not None and tuple(t.shape) != shape:
            raise ValueError(f"head of {name_of(owner)} must have a {name} {shape}, got {tuple(t.shape)}")


def name_of(owner: Any) -> str:
    """Return the class and the sizes of a layer, for messages; its repr may need its head."""
    return f"the {type(owner).__name__} with in_features={owner.in_features} and out_features={owner.out_features}"


def checked_layout(layout: str | None, shape: Sequence[int], of: str) -> str:
    """Return the layout of a weight `(O, I, …)`; None is enough where both layouts are the same."""
    if layout is None:
        if len(shape) > 1 and shape[0] != 1 and shape[1] != 1:
            raise ValueError(
                f"layout is needed: {of} may hold the weight of {shape[1]} inputs and {shape[0]} outputs either way. "
                f"Pass layout='oi' if it is viewed as (O, I) = ({shape[0]}, {shape[1]}), row o*I + i, or "
                f"layout='io' if it is viewed as (I, O) = ({shape[1]}, {shape[0]}), row i*O + o"
            )
        return "oi"
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be 'oi', 'io' or None, got {layout!r}")
    return layout if len(shape) > 1 else "oi"


def places_in_head(head: nn.Linear, in_features: int, out_features: int, layout: str | None) -> dict[str, Place]:
    """Return where the weight and the bias of a HyperLinear stand in a head; see `HyperLinear.from_head`."""
    check_head(head)
    weights = out_features * in_features
    if head.out_features not in (weights, weights + out_features):
        raise ValueError(
            f"head must be an nn.Linear(R, O*I) or nn.Linear(R, O*I + O), that is with {weights} or "
            f"{weights + out_features} out_features for in_features={in_features} and "
            f"out_features={out_features}, got {tuple(head.weight.shape)} (out_features, in_features)"
        )
    layout = checked_layout(layout, (out_features, in_features), "head")
    places = [Place("weight", 0, (out_features, in_features), layout)]
    if head.out_features != weights:
        places.append(Place("bias", weights, (out_features,), "oi"))
    return {place.name: place for place in places}


def tensors_of(weight: Tensor, bias: Tensor | None, places: Mapping[str, Place]) -> list[Tensor | None]:
    """Return weight, bias, base_weight and base_bias as views of the rows of a head, all of which have a place."""
    sizes = [place.count for place in places.values()]

    def of(rows: Tensor | None) -> dict[str, Tensor]:
        if rows is None:
            return {}
        # One split, whose backward joins the gradients once. A slice for each would fill the whole head with zeros.
        parts = rows.split_with_sizes(sizes) if len(sizes) > 1 else [rows]
        return {name: place.view(part) for (name, place), part in zip(places.items(), parts, strict=True)}

    heads, bases = of(weight), of(bias)
    return [heads["weight"], heads.get("bias"), bases.get("weight"), bases.get("bias")]


def load_as_head(head: nn.Linear, places: Mapping[str, Place], state: Any, prefix: str) -> None:
    """Change a state dict, in place, so that the head of a layer loads from it.

    It may hold the head as the entries `head.…`, or as entries of the layer itself: those of the head alone, or those
    of a HyperLinear. Where it holds nothing for the layer, the head loads from the entries of another module.
    """
    mine = {key.removeprefix(prefix): key for key in state if key.startswith(prefix)}
    own = [key for key in mine if not key.startswith("head.")]
    of_head = {name: p for name, p in (("weight", head.weight), ("bias", head.bias)) if p is not None}
    if own and all(name in mine and state[mine[name]].shape == p.shape for name, p in of_head.items()):
        for name in of_head:
            state[f"{prefix}head.{name}"] = state.pop(prefix + name)
    elif own:
        for name, base in (("weight", ""), ("bias", "base_")):
            keys = {base + key: place for key, place in places.items()}
            fit = {key: _fits(state[mine[key]], place, not base) for key, place in keys.items() if key in mine}
            if name in of_head and len(fit) == len(keys) and all(fit.values()):
                rows = [place.rows(state.pop(prefix + key)) for key, place in keys.items()]
                state[f"{prefix}head.{name}"] = torch.cat(rows)
    elif not mine:
        for name, value in _loaded_elsewhere(head).items():
            state[f"{prefix}head.{name}"] = value


def load_as_chunks(module: Any, state: Any, prefix: str) -> None:
    """Change a state dict, in place, so that a chunked head loads from it.

    It may hold the head as the entries `head.…`, or as those of the head alone, and the embeddings as those of a tensor
    or of an nn.Embedding. Where it holds nothing for the head or for the embeddings, these load from the entries of
    another module that has them, too.
    """
    names = [f"{prefix}chunks", f"{prefix}chunks.weight"]
    mine, other = reversed(names) if isinstance(module.chunks, nn.Module) else names
    if module.chunks is not None and other in state and mine not in state:
        state[mine] = state.pop(other)
    for name in ("weight", "bias"):
        if prefix + name in state:
            state[f"{prefix}head.{name}"] = state.pop(prefix + name)
    for name in ("head", "chunks"):
        owned = getattr(module, name)
        if owned is not None and not any(key.startswith(prefix + name) for key in state):
            for key, value in _loaded_elsewhere(owned).items():
                state[f"{prefix}{name}{key and '.'}{key}"] = value


def _fits(t: Any, place: Place, has_features: bool) -> bool:
    return isinstance(t, Tensor) and tuple(t.shape[: t.dim() - has_features]) == place.shape


def _loaded_elsewhere(owned: nn.Module | Tensor) -> dict[str, Tensor]:
    """Return the entries that the running `load_state_dict` has for a head, or for a tensor, under other names.

    torch passes a module the entries of its own name alone. Without those of the others, a missing head could not be
    told from one that another module loads. The entry of a tensor has the name "". Embeddings may be a tensor in the
    checkpoint and a module here, or the reverse.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not nn.Module.load_state_dict.__code__:
        frame = frame.f_back
    if frame is None or not frame.f_locals["strict"]:  # who does not want an error is told what is missing
        return {}
    root, state = frame.f_locals["self"], frame.f_locals["state_dict"]
    if isinstance(owned, Tensor):
        tensors = [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
        keys = (key for name, t in tensors if t is owned for key in (name, f"{name}.weight"))
        return next(({"": state[key]} for key in keys if key in state), {})
    for name, module in root.named_modules(remove_duplicate=False):
        if module is owned:
            found = {key: state[f"{name}.{key}"] for key in owned._parameters if f"{name}.{key}" in state}
            if isinstance(owned, nn.Embedding) and name in state:
                found["weight"] = state[name]
            if found:
                return found
    return {}
