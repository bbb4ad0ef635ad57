"""Check that a call of a module runs only what its class says, so that other code may use its parameters."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter

NEVER_CALLED = "its owner (MultiheadAttention) reads its weights and never calls it"

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def why_not_plain(linear: nn.Linear) -> str | None:
    """Return why this Linear may compute more than `x @ weight.T + bias`, or None if it does not."""
    if isinstance(linear.weight, UninitializedParameter):
        return "it is lazy and not initialised yet: call its network once first"
    if isinstance(linear, NonDynamicallyQuantizableLinear):
        return NEVER_CALLED
    if not isinstance(linear._parameters.get("weight"), nn.Parameter):
        return "its weight is computed by a parametrization, a weight norm or a pruning: remove that first"
    if type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):
        return f"it is a {type(linear).__name__} with a forward of its own"
    if set(linear._parameters) != {"weight", "bias"} or linear._buffers or linear._modules:
        return f"it is a {type(linear).__name__} with parameters, buffers or submodules beyond weight and bias"
    if any(getattr(linear, hooks, None) for hooks in _HOOKS):
        return "it has hooks, which would be lost: remove them first and register them again afterwards"
    return None


def only_calls_forward(module: nn.Module) -> bool:
    """Return whether a call of the module runs the forward of its class and nothing else."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not (hooks or module._compiled_call_impl or "forward" in vars(module))


def split_head(network: Any) -> tuple[list[nn.Module], nn.Linear] | str:
    """Return the modules before the last Linear of a network, and that Linear; or why the network has no plain one."""
    before: list[nn.Module] = []
    while isinstance(network, nn.Sequential):
        if type(network).forward is not nn.Sequential.forward or not only_calls_forward(network):
            return "nn has a Sequential with hooks or a forward of its own"
        if not len(network):
            return "nn has an empty Sequential at its end"
        *first, network = network._modules.values()
        before += first
    if not isinstance(network, nn.Linear):
        return f"nn ends in a {type(network).__name__}, not in an nn.Linear"
    if problem := why_not_plain(network):
        return f"nn ends in a Linear that is not plain: {problem}"
    return before, network
