"""Modules that wrap another one and pass its calls on: names and signatures look through them."""

from __future__ import annotations

from torch import nn

_NAMES = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""What torch.compile, torch's checkpoint_wrapper and FullyShardedDataParallel call the module inside."""


def is_inside(wrapper: nn.Module, name: str) -> bool:
    """Return whether a submodule is what its owner wraps."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    return name in _NAMES or (name == "module" and isinstance(wrapper, parallel))


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside of all wrappers."""
    for name, child in module._modules.items():
        if child is not None and is_inside(module, name):
            return unwrapped(child)
    return module
