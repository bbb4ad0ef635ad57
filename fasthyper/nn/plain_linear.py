"""Check that a call of a module runs only what its class says, so that other code may use its parameters."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
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


def why_not_plain(module: nn.Module, cls: type[nn.Module] = nn.Linear) -> str | None:
    """Return why a module may compute more than the forward of `cls` with its parameters, or None if it does not."""
    name = type(module).__name__
    parameters = module._parameters
    if any(isinstance(p, UninitializedParameter) for p in parameters.values()):
        return "it is lazy and not initialised yet: call its network once first"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return NEVER_CALLED
    if not isinstance(parameters.get("weight"), nn.Parameter):
        return "its weight is computed by a parametrization, a weight norm or a pruning: remove that first"
    if type(module).forward is not cls.forward or "forward" in vars(module):
        return f"it is a {name} with a forward of its own"
    buffers = {"running_mean", "running_var", "num_batches_tracked"} if issubclass(cls, _BatchNorm) else set()
    if not set(parameters) <= {"weight", "bias"} or not set(module._buffers) <= buffers or module._modules:
        return f"it is a {name} with parameters, buffers or submodules beyond weight and bias"
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
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
