"""DTensors: which parts of its arguments each process passes to an op, and what its results are parts of.

An op runs on the local parts of DTensors if, along a dimension of the mesh, one letter of the table of axes is divided:

- an argument that has the letter is sharded there, and every other argument is replicated;
- a result that has the letter is sharded there;
- any other result is the sum over the letter: the process has a partial sum. If nothing that it is computed from has
  the letter, every process has all of it.

A sum of the second kind may have terms without the letter, such as the bias where I is divided. Only the first process
adds them: the others pass None. Each dimension of a mesh has its own letter, or none: then all arguments are
replicated. The letter is the one for which the fewest elements have to be sent to other processes.

``import fasthyper`` does not import DTensors, which takes longer than all the rest. `prepare` registers the rules in a
process that has imported them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import shapes
from .register import DEFINED, LIBRARY, MISSING
from .signature import Signature

LETTERS = {
    "apply": "BNOIR",
    "cond_grad": "BNOIR",
    "weight_grad": "BNOIR",
    "grads": "BNOIR",
    "hyper_linear": "BNOIR",
    "hyper_linear_grads": "BNOIR",
    "apply_models": "MBNOIR",
    "cond_grad_models": "MBNOIR",
    "weight_grad_models": "MBNOIR",
    "grads_models": "MBNOIR",
    "mapped_linear": "BNO",
    "mapped_linear_grads": "BNO",
    "primary": "BN",
    "primary_grads": "BN",
    "pairs": "BMNO",
    "pairs_grads": "BMNO",
    "apply_terms": "NOIR",
    "cond_grad_terms": "NOIR",
    "weight_grad_terms": "NOIR",
    "grads_terms": "NOIR",
    "hyper_linear_terms": "NOIR",
    "hyper_linear_terms_grads": "NOIR",
    "conv_apply": "BR",
    "conv_cond_grad": "BR",
    "conv_weight_grad": "BR",
    "conv_transpose_apply": "BR",
    "hyper_conv": "BR",
    "hyper_conv_grads": "BR",
    "hyper_conv_transpose": "BR",
    "hyper_conv_transpose_grads": "BR",
    "apply_groups": "",
    "weight_grad_groups": "",
}
"""The letters that may be divided, by op. The gradient g, or the output, has all of them but I and R."""

SUM = ({"x", "z", "weight", "g"}, {"x", "base_weight", "g"}, {"z", "bias", "g"}, {"base_bias", "g"})
"""The factors of each term of Σ y·g. An op computes the derivative in one of them, from the others."""

_DTENSOR = "torch.distributed.tensor"
_ready = bool(MISSING)  # ops that run in torch's own operations have torch's rules


def prepare() -> None:
    """Register the rules for DTensors, if this process has imported them; call it before an op that may meet one."""
    if not _ready and _DTENSOR in sys.modules and not torch.compiler.is_compiling():
        _register()


def _register() -> None:
    global _ready
    _ready = True
    from torch.distributed.tensor import DTensor

    for name, op in DEFINED.items():
        torch.library.register_torch_dispatch(f"fasthyper::{name}", DTensor, _rule(op.signature), lib=LIBRARY)


def _rule(signature: Signature) -> Any:
    def rule(cls: type, op: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        with torch.no_grad():  # autograd has recorded the op itself
            return _run(signature, op, signature.arguments(*args, **(kwargs or {})))

    return rule


def _run(signature: Signature, op: Any, args: Any) -> Any:
    """Run an op on the local parts of DTensors, and return DTensors."""
    from torch.distributed.tensor import DTensor

    given: dict[str, Any] = {name: t for name, t in signature.given(args).items() if t is not None}
    mesh = _mesh(given)
    signature.check(args)
    sizes = shapes.sizes_of(signature.axes, {name: t.shape for name, t in given.items()})
    splits = [
        split(signature, args, choose(signature, given, {name: t.placements[dim] for name, t in given.items()}))
        for dim in range(mesh.ndim)
    ]
    local = {}
    for name, t in given.items():
        elsewhere = any(name in of.once and mesh.get_local_rank(dim) for dim, of in enumerate(splits))
        placements = [of.arguments[name] for of in splits]
        local[name] = None if elsewhere else t.redistribute(mesh, placements).to_local()

    def whole(result: str, axes: str, t: Tensor) -> Any:
        if result not in splits[0].results:  # it is not requested
            axes, placements = "?", splits[0].nowhere * mesh.ndim
        else:
            placements = [of.results[result] for of in splits]
        shape = torch.Size(sizes.get(letter, size) for letter, size in zip(axes, t.shape, strict=True))
        return DTensor.from_local(t, mesh, placements, run_check=False, shape=shape, stride=_strides(t, shape))

    indices = {name: _everywhere(getattr(args, name)) for name in signature.types if name in shapes.INDICES}
    out = op(*args._replace(**local, **indices))
    if isinstance(out, Tensor):
        return whole(*next(iter(signature.results.items())), out)
    return tuple(whole(*result, t) for result, t in zip(signature.results.items(), out, strict=True))


def _everywhere(index: Any) -> Any:
    """Return an index, all of which every process needs, as an ordinary tensor."""
    return index.full_tensor() if hasattr(index, "full_tensor") else index


def _mesh(given: Mapping[str, Any]) -> Any:
    """Return the mesh of the arguments of a call.

    Raises:
        TypeError: an argument is an ordinary tensor.
        ValueError: the meshes differ.
    """
    from torch.distributed.tensor import DTensor

    known = [name for name, t in given.items() if isinstance(t, DTensor)]
    for name, t in given.items():
        if name not in known:
            raise TypeError(
                f"{name} must be a DTensor, since {' and '.join(known)} are, got a {type(t).__name__} of shape "
                f"{tuple(t.shape)}; distribute_tensor or DTensor.from_local makes one"
            )
        if t.device_mesh != given[known[0]].device_mesh:
            raise ValueError(
                f"{name} must be on the mesh of {known[0]}, {given[known[0]].device_mesh}, got {t.device_mesh}"
            )
    return given[known[0]].device_mesh


class Split(NamedTuple):
    """How an op runs along one dimension of a mesh."""

    arguments: dict[str, Any]
    """The placement of each tensor."""
    results: dict[str, Any]
    """The placement of each result that is requested."""
    once: set[str]
    """The arguments that only the first process passes."""
    nowhere: list[Any]
    """The placement of what is not requested."""


def split(signature: Signature, args: Any, letter: str) -> Split:
    """Return how an op runs if a letter is divided; with an empty letter, every process does all of it."""
    from torch.distributed.tensor import Partial, Replicate

    axes, given = signature.axes, {name for name, t in signature.given(args).items() if t is not None}
    wanted = args.mask if signature.masked else [True] * len(signature.results)
    results: dict[str, Any] = {}
    once: set[str] = set()
    for (result, letters), requested in zip(signature.results.items(), wanted, strict=True):
        if not requested:
            continue
        results[result] = _placement(letters, letter)
        if not letter or letter in letters:
            continue
        if letter in axes["g"]:  # all results are linear in g
            results[result] = Partial()
            continue
        factor = _factor(signature, result)
        terms = [term - {factor} for term in SUM if factor in term and term - {factor} <= given]
        divided = [any(letter in axes[name] for name in term) for term in terms]
        if any(divided):
            results[result] = Partial()
            for term, is_divided in zip(terms, divided, strict=True):
                once |= set() if is_divided else term & {*signature.optional}
    return Split({name: _placement(axes[name], letter) for name in given}, results, once, [Replicate()])


def _factor(signature: Signature, result: str) -> str:
    """Return the factor of Σ y·g in which a result is the derivative."""
    if "g" not in signature.tensors:
        return "g"
    return {"dh": "weight"}.get(result, result.removeprefix("d"))


def choose(signature: Signature, given: Mapping[str, Tensor], placements: Mapping[str, Any]) -> str:
    """Return the letter to divide along a dimension of the mesh, or "" for none: the one with the least traffic.

    Every process must choose the same one, so that it depends on the sizes of whole tensors alone.
    """

    def traffic(letter: str) -> tuple[int, int]:
        moves = [(name, placements[name], _placement(signature.axes[name], letter)) for name in given]
        sent = sum(given[name].numel() * _copies(old, new) for name, old, new in moves)
        return sent, sum(old != new for _, old, new in moves)

    present = {letter for name in given for letter in signature.axes[name]}
    return min(["", *(letter for letter in LETTERS[signature.name] if letter in present)], key=traffic)


def _copies(old: Any, new: Any) -> int:
    """Return how many times the elements of a tensor are sent when its placement changes."""
    if old == new or old.is_replicate():
        return 0
    return 2 if old.is_partial() and new.is_replicate() else 1


def _placement(axes: str, letter: str) -> Any:
    from torch.distributed.tensor import Replicate, Shard

    return Shard(axes.index(letter)) if letter and letter in axes else Replicate()


def _strides(t: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a dense tensor of a shape, whose axes have the order of those of t."""
    order = [*range(t.dim())] if t.is_contiguous() else sorted(range(t.dim()), key=t.stride, reverse=True)
    strides, step = [0] * t.dim(), 1
    for axis in reversed(order):
        strides[axis], step = step, step * max(1, shape[axis])
    return tuple(strides)
