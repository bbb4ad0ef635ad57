"""How torch's older tools see the layers: one node for ``torch.fx``, and a refusal for ``torch.jit.script``."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor, nn


def is_proxy(value: Any) -> bool:
    """Return whether a value is recorded by ``torch.fx``: it is no tensor, but stands for one."""
    return not isinstance(value, Tensor) and hasattr(value, "tracer") and hasattr(type(value), "__torch_function__")


def proxy_of(*values: Any) -> Any:
    """Return the first value that ``torch.fx`` records, or None."""
    return next(filter(is_proxy, values), None)


def recorded(layer: nn.Module, *args: Any) -> Any:
    """Record the call of a layer as one node, as ``torch.fx`` does for the layers of torch.

    The code of a layer reads the sizes of its arguments and parameters, which are unknown while fx records.

    Args:
        layer: the layer whose forward runs.
        *args: its arguments, some of which are proxies.

    Returns:
        The proxy of the result; None if the layer itself is what fx traces, so that there is no module to call.
    """
    tracer = proxy_of(*args).tracer
    if tracer.root is layer:
        return None
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), args, {})


def refuse_script(layer: nn.Module) -> NoReturn:
    """Raise: ``torch.jit.script`` compiles source code, and the layers use what it cannot compile.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        f"torch.jit.script does not support {type(layer).__name__}: use torch.jit.trace(model, inputs), whose result "
        "a scripted module may call, or torch.export.export(model, inputs)"
    )
