"""Import a hypernetwork whose head computes all parameters of a network as one flat vector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasthyper.nn.chunked_head import ChunkedHead, take_from
from fasthyper.nn.conversions import FAMILIES
from fasthyper.nn.heads import Place, check_head, checked_layout
from fasthyper.nn.hyperize import hyperize, ungenerated

Order = str | Iterable[str | tuple[str, str | None]]


def primary_of_flat_head(
    head: nn.Linear, primary: nn.Module, order: Order, layout: str | None, chunks: Tensor | nn.Embedding | int | None
) -> tuple[nn.Module, list[Place]]:
    """Return a copy of the primary whose parameters are the rows of a head, and where each of them stands.

    The arguments are those of `Hypernetwork.from_flat_head`.
    """
    check_head(head)
    flat = head if chunks is None else ChunkedHead(head, chunks)
    named = dict(primary.named_parameters())
    wanted = _in_order(named, order, layout)
    base = flat.bias is not None
    copy = hyperize(primary, flat.in_features, types=FAMILIES, base=base, allow_time_first=True)
    if left := ungenerated(copy):
        raise ValueError(f"primary has parameters that cannot be generated: {left}")
    places, start = [], 0
    for name, chosen in wanted:
        shape = _generated(copy, name).shape[:-1]
        places.append(Place(name, start, tuple(shape), checked_layout(chosen, shape, f"the rows of {name!r}")))
        start = places[-1].stop
    low, high = (start, start) if chunks is None else (start, start + head.out_features - 1)
    if not low <= flat.out_features <= high:
        chunked = "" if chunks is None else f" ({flat.out_features // head.out_features} chunks of {head.out_features})"
        raise ValueError(
            f"head must compute the {start} parameters of the primary, got {flat.out_features} outputs{chunked}"
        )
    for place in places:
        _put_rows(copy, place, flat) if isinstance(flat, nn.Linear) else take_from(flat, copy, place)
    return copy, places


def _in_order(named: Mapping[str, Tensor], order: Order, layout: str | None) -> list[tuple[str, str | None]]:
    """Return the names of all parameters in the order of the flat vector, each with its layout."""
    if order == "layers":
        return [(name, layout) for name in named]
    if order == "weights_first":
        return [(name, layout) for name in sorted(named, key=lambda name: not name.endswith("weight"))]
    if isinstance(order, str):
        raise ValueError(f"order must be 'layers', 'weights_first' or a list of names, got {order!r}")
    pairs = [(entry, layout) if isinstance(entry, str) else (entry[0], entry[1]) for entry in order]
    names = [name for name, _ in pairs]
    if sorted(names) != sorted(named):
        missing, unknown = [n for n in named if n not in names], [n for n in names if n not in named]
        twice = sorted({n for n in names if names.count(n) > 1})
        raise ValueError(
            f"order must name each parameter of the primary once: missing {missing}, unknown {unknown}, twice {twice}"
        )
    return pairs


def _layer_and_attribute(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, attribute = name.rpartition(".")
    return root.get_submodule(owner), attribute


def _generated(root: nn.Module, name: str, prefix: str = "") -> Any:
    layer, attribute = _layer_and_attribute(root, name)
    return getattr(layer, prefix + attribute)


def _put_rows(root: nn.Module, place: Place, head: nn.Linear) -> None:
    """Put copies of a head's rows in the place of a generated parameter and its base, wherever these are used."""
    for prefix, rows in (("", head.weight), ("base_", head.bias)):
        old = _generated(root, place.name, prefix)
        if rows is None or old is None:
            continue
        new = place.parameter(rows)
        for module in root.modules():
            for key, parameter in module._parameters.items():
                if parameter is old:
                    module._parameters[key] = new


def flat_head_of(root: nn.Module, places: list[Place]) -> nn.Linear:
    """Return a head that computes the parameters of the primary as one flat vector, a copy."""
    if any(isinstance(module, ChunkedHead) and module.chunks is None for module in root.modules()):
        raise ValueError("there is no flat head of one z where each chunk has a z of its own: use the chunked head")
    weights = [place.rows(_generated(root, place.name).detach()) for place in places]
    bases = [_generated(root, place.name, "base_") for place in places]
    has_base = bases[0] is not None
    weight = torch.cat(weights)
    head = nn.Linear(weight.shape[1], weight.shape[0], has_base, device="meta", dtype=weight.dtype)
    head.weight = nn.Parameter(weight)
    if has_base:
        head.bias = nn.Parameter(torch.cat([p.rows(b.detach()) for p, b in zip(places, bases, strict=True)]))
    return head


@torch.no_grad()
def load_rows(root: nn.Module, places: list[Place], state: Mapping[str, Tensor]) -> None:
    """Copy the weight and bias of a flat head into the generated parameters of the primary."""
    has_base = _generated(root, places[0].name, "base_") is not None
    expected = {"weight", "bias"} if has_base else {"weight"}
    if set(state) != expected:
        raise ValueError(f"state must have the entries {sorted(expected)}, got {sorted(state)}")
    features = _generated(root, places[0].name).shape[-1]
    shapes = {"weight": (places[-1].stop, features), "bias": (places[-1].stop,)}
    for key, rows in state.items():
        if tuple(rows.shape) != shapes[key]:
            raise ValueError(f"{key} of the state must have shape {shapes[key]}, got {tuple(rows.shape)}")
    for place in places:
        for key, rows in state.items():
            prefix = "" if key == "weight" else "base_"
            _generated(root, place.name, prefix).copy_(place.view(rows[place.start : place.stop]))
