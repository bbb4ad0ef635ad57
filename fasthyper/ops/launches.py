"""Let ``torch.compile`` see the launches of an op on a GPU: `show`. It uses private names of torch.

Where AOTAutograd traces an op, the launches of its kernels are put into the graph in its place, as those of
``torch.library.triton_op`` are. Inductor then allocates their tensors, orders and fuses what is around them, and
launches them from its own code. The op stays in the graph on other devices, in ``torch.export``, and where a backend
does not trace a call. ``torch.library.wrap_triton`` would do, but it refuses tensor descriptors.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import backends, planner
from .._version import __version__
from ..backends.contract import Traced
from . import autocast
from .register import DEFINED, LIBRARY, MISSING, Arguments, Op, choice

_PACKAGE = Path(__file__).parents[1]


class Opaque(Exception):
    """The launches of a call cannot be shown."""


def trace_apply(args: Arguments, x: Tensor, *factors: Tensor | None) -> Tensor:
    """Trace `apply` on the backend of a call; the arguments are those of `family.run_apply`.

    Raises:
        Opaque: if the op must stay in the graph; nothing is in it then.
    """
    module, options = _tracing(args, x)
    with autocast.off(x):
        y = module.trace_apply(x, *factors, *(None,) * (5 - len(factors)), **options)  # type: ignore[arg-type]
    if y is None:
        raise Opaque
    return y


def trace_grads(args: Arguments, x: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    """Trace `grads` on the backend of a call; the arguments are those of `family.run_grads`.

    Raises:
        Opaque: if the op must stay in the graph; nothing is in it then.
    """
    module, options = _tracing(args, x)
    with autocast.off(x):
        found = module.trace_grads(x, *others, **options)
    if found is None:
        raise Opaque
    return found


def _tracing(args: Arguments, x: Tensor) -> tuple[Traced, dict[str, Any]]:
    """Return the backend that traces a call, and the last arguments of its functions."""
    name, schedule = choice(args)
    module = backends.traced(name, x.device, x.dtype)
    if module is None:
        raise Opaque
    return module, {"schedule": schedule, "emit": _emit}


def show(name: str, trace: Op) -> None:
    """Put launches into graphs in the place of an op.

    Args:
        name: name of the op in ``torch.ops.fasthyper``.
        trace: computes the op from its named tuple by `trace_apply` or `trace_grads`.
    """
    if MISSING:
        return
    try:
        from torch._library.triton import triton_ops_to_kernels
        from torch._subclasses.fake_tensor import FakeTensor
        from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
    except ImportError:
        return
    signature = DEFINED[name].signature
    run = signature.with_check(trace)

    def rule(mode: Any, op: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if not all(t is Tensor or t is FunctionalTensor or issubclass(t, FakeTensor) for t in types):
            return NotImplemented
        values = signature.arguments(*args, **(kwargs or {}))
        if not _must_stay(values.x):
            try:
                with mode:
                    return run(*values)
            except Opaque:
                pass
        return mode.__torch_dispatch__(op, types, args, kwargs or {})

    torch.library.register_torch_dispatch(f"fasthyper::{name}", FunctionalTensorMode, rule, lib=LIBRARY)
    triton_ops_to_kernels[f"fasthyper::{name}"] = _Sources()


class _Names(NamedTuple):
    """Private names of torch whose import takes a second, so that the first traced call imports them."""

    is_exporting: Callable[[], bool]
    wrapper: Any  # the module of the op that stands for a launch in a graph


@functools.cache
def _names() -> _Names | None:
    """Return the names, or None if this torch lacks one: all ops then stay in the graph."""
    try:
        from torch._higher_order_ops import triton_kernel_wrap
        from torch.export._trace import custom_triton_ops_decomposition_disabled
    except ImportError:
        return None
    needed = ("triton_kernel_wrapper_mutation", "kernel_side_table", "create_tma_stable_metadata")
    if not all(hasattr(triton_kernel_wrap, name) for name in needed):
        return None
    return _Names(custom_triton_ops_decomposition_disabled, triton_kernel_wrap)


def _must_stay(x: Tensor) -> bool:
    if x.device.type != "cuda":
        return True
    names = _names()
    return names is None or bool(names.is_exporting())


class _Sources(list[Any]):
    """What torch's cache of compiled graphs reads in the place of an op's kernels: one kernel, whose text is the key.

    Besides the kernels, a graph depends on the code that traces it and on the limit of the workspace.
    """

    def __iter__(self) -> Any:
        text = f"# fasthyper {__version__} {_digest()} {planner.get_workspace_limit()}"
        yield SimpleNamespace(__name__="fasthyper", src=text, fn=_no_code)


def _no_code() -> None:
    """Stand for the code of a kernel that calls no others."""


@functools.cache
def _digest() -> str:
    """Return a digest of all code that shown launches depend on."""
    folders = "kernels", "backends", "backends/triton", "ops", "."
    files = sorted(file for folder in folders for file in (_PACKAGE / folder).glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@functools.cache
def _configured(kernel: Any, warps: int, stages: int) -> Any:
    """Return a kernel that is launched with these options."""
    import triton

    config = triton.Config({}, num_warps=warps, num_stages=stages)
    return triton.autotune(configs=[config], key=[])(kernel)


def arguments_of(call: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of a launch by name, with matrices for descriptors, and the boxes of those by name."""
    boxes = {name: value.box for name, value in call.args.items() if hasattr(value, "box")}
    arguments = {name: bool(v) if isinstance(v, torch.SymBool) else v for name, v in call.constants.items()}
    for name, value in call.args.items():
        value = value.matrix if name in boxes else value
        arguments[name] = _first_of_expanded(value) if isinstance(value, Tensor) else value
    return arguments, boxes


def _emit(call: Any) -> None:
    """Put a launch, a `Call` of the Triton backend, into the graph."""
    graphs = cast(_Names, _names()).wrapper
    arguments, boxes = arguments_of(call)
    absent = {name: None for name, value in arguments.items() if value is None}
    graphs.triton_kernel_wrapper_mutation(
        # torch._dynamo.reset() empties torch's table: the number is not kept.
        kernel_idx=graphs.kernel_side_table.add_kernel(_configured(call.kernel, call.warps, call.stages)),
        constant_args_idx=graphs.kernel_side_table.add_constant_args(absent),
        grid=[call.grid],
        tma_descriptor_metadata={name: graphs.create_tma_stable_metadata(box) for name, box in boxes.items()},
        kwargs={name: value for name, value in arguments.items() if name not in absent},
    )


def _first_of_expanded(t: Tensor) -> Tensor:
    """Return a view that begins at the same address, without expanded axes: Inductor would write them out."""
    strides: Any = t.stride()
    for axis in reversed(range(t.dim())):
        if isinstance(strides[axis], int) and strides[axis] == 0:
            t = t.select(axis, 0)
    return t
