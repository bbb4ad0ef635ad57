"""How torch's older tools see the layers: one node for ``torch.fx``, and a refusal for ``torch.jit.script``."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor, nn

from fasthyper.ops import register


def is_proxy(value: Any) -> bool:
    """Return whether a value is recorded by ``torch.fx``: it is no tensor, but stands for one."""
    return not isinstance(value, Tensor) and hasattr(value, "tracer") and hasattr(type(value), "__torch_function__")


def proxy_of(*values: Any) -> Any:
    """Return the first value that ``torch.fx`` records, or None."""
    return next(filter(is_proxy, values), None)


def refuse_script(layer: nn.Module) -> NoReturn:
    """Raise: ``torch.jit.script`` compiles source code, and the layers use what it cannot compile.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        f"torch.jit.script does not support {type(layer).__name__}: use torch.jit.trace(model, inputs), whose result "
        "a scripted module may call, or torch.export.export(model, inputs)"
    )


class OneNode(nn.Module):
    """A layer whose call is one node of ``torch.fx``."""

    __prepare_scriptable__ = refuse_script

    @property
    def _traced_layer(self) -> OneNode:
        """The layer itself, by a name that a node has where fx traces nothing but this layer."""
        return self


def recorded(layer: OneNode, *args: Any) -> Any:
    """Record the call of a layer as one node, as ``torch.fx`` does for the layers of torch.

    The code of a layer reads the sizes of its arguments and parameters, which are unknown while fx records.

    Args:
        layer: the layer whose forward runs.
        *args: its arguments, some of which are proxies.

    Returns:
        The proxy of the result.
    """
    return call_of(layer, proxy_of(*args).tracer, args, {})


def call_of(layer: nn.Module, tracer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Record the call of the forward that the package has for a layer.

    A node that calls the module runs its hooks, too, and the forward of its own that a subclass may have. Of a module
    inside of the traced one, fx records these already: the node must leave them out. Where fx traces the layer itself,
    it records no hooks: the node runs those of the layer. Hooks of all modules run for the graph, which is a module.
    """
    is_root = tracer.root is layer
    path = "_traced_layer" if is_root else tracer.path_of_module(layer)
    leaves_out_forward = getattr(layer.forward, "__code__", None) is not _forward(layer).__code__
    leaves_out_hooks = register.has_global_hooks() or (
        not is_root and (layer._forward_hooks or layer._forward_pre_hooks)
    )
    if not (leaves_out_forward or leaves_out_hooks):
        return tracer.create_proxy("call_module", path, args, kwargs)
    module = tracer.create_proxy("get_attr", path, (), {})
    return tracer.create_proxy("call_function", forward_of, (module, *args), kwargs)


def forward_of(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return what the package's forward of a layer returns, without hooks, and not that of a subclass."""
    return _forward(layer)(layer, *args, **kwargs)


def _forward(layer: nn.Module) -> Any:
    classes = [c for c in type(layer).__mro__ if c.__module__.startswith("fasthyper.")]
    return next(vars(c)["forward"] for c in classes if "forward" in vars(c))
