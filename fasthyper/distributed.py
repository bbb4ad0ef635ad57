"""Heads that are divided among processes: `HeadParallel`, a style of `torch.distributed.tensor.parallel`.

This module imports DTensors, which ``import fasthyper`` does not.
"""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from .incidence import Incidence
from .nn.linear import HyperLinear
from .ops import shapes, sharding

sharding.prepare()

_LETTERS = {"out": "O", "in": "I", "cond": "R"}
_AXES = {**shapes.LINEAR, "weight_a": "JIR", "weight_b": "OJR"}  # J is the rank


class HeadParallel(ParallelStyle):
    """Divide the head of a :class:`~fasthyper.nn.HyperLinear` among the processes of a mesh.

    It is a style for :func:`torch.distributed.tensor.parallel.parallelize_module`. Each process holds one part of the
    head, applies it, and holds its gradient; no process ever has the whole head. What the processes exchange has the
    size of x, z or y:

    ==========  ========================  ====================  ================  =====================
    ``by``      divides                   x                     y                 like
    ==========  ========================  ====================  ================  =====================
    ``"out"``   the outputs O             whole                 ``Shard(-1)``     ``ColwiseParallel``
    ``"in"``    the inputs I              ``Shard(-1)``         whole, a sum      ``RowwiseParallel``
    ``"cond"``  the features R of z       whole                 whole, a sum      no other layer
    ==========  ========================  ====================  ================  =====================

    A layer ``"out"``, a function of each element, and a layer ``"in"`` exchange nothing in between.

    Args:
        by: ``"out"``, ``"in"`` or ``"cond"``.
        input_layouts: the placement of x that the layer is called with; None means that of the table.
        cond_layouts: the placement of z that the layer is called with, or that its Hypernetwork provides; None means
            that every process has all of it.
        output_layouts: the placement of y that the layer returns; None means that of the table.
        use_local_output: if True, return the local part of y, else a DTensor.

    Raises:
        TypeError: the module is no :class:`~fasthyper.nn.HyperLinear`.
        ValueError: ``by`` is unknown, it is not ``"out"`` and the layer has a ``weight_map``, or the layer takes its
            parameters from a shared head, as with ``from_head``; in forward, if the Hypernetwork has ``repeat_z=True``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from fasthyper import HyperLinear
        >>> from fasthyper.distributed import HeadParallel
        >>> primary = nn.Sequential(HyperLinear(8, 512, 16), nn.ReLU(), HyperLinear(512, 4, 16))
        >>> plan = {"0": HeadParallel("out"), "2": HeadParallel("in")}
        >>> parallelize_module(primary, mesh, plan)  # doctest: +SKIP
    """

    def __init__(
        self,
        by: str,
        *,
        input_layouts: Placement | None = None,
        cond_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        if by not in _LETTERS:
            raise ValueError(f"by must be one of {', '.join(map(repr, _LETTERS))}, got {by!r}")
        self.by = by
        self.input_layouts = input_layouts or self._last_axis("x")
        self.cond_layouts = cond_layouts or Replicate()
        self.output_layouts = output_layouts or self._last_axis("g")
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, HyperLinear):
            raise TypeError(f"HeadParallel takes a HyperLinear, got a {type(module).__name__}")
        if module.weight_map is not None and self.by != "out":
            raise ValueError(f"by must be 'out' for a layer with a weight_map, got {self.by!r}: it needs whole rows")
        if "places" in vars(module):
            raise ValueError(f"the {type(module).__name__} must have parameters of its own, not those of a shared head")
        for name, parameter in list(module.named_parameters(recurse=False)):
            whole = parameter.detach()
            parts = distribute_tensor(whole, device_mesh, [self._placement(name)], src_data_rank=self.src_data_rank)
            module.register_parameter(name, nn.Parameter(parts, requires_grad=parameter.requires_grad))

        def before(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return (), self._inputs(device_mesh, layer, *args, **kwargs)

        def after(layer: Any, args: Any, y: Any) -> Any:
            y = y.redistribute(placements=[self.output_layouts])
            return y.to_local() if self.use_local_output else y

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)
        return module

    def _inputs(
        self,
        mesh: DeviceMesh,
        layer: HyperLinear,
        x: Tensor,
        z: Any = None,
        incidence: Incidence | None = None,
        reduce: str = "sum",
    ) -> dict[str, Any]:
        """Return the arguments of forward, with x and z as the DTensors that the layer takes."""
        z, incidence, repeat = layer._condition(z, incidence)
        if repeat:
            raise ValueError("repeat_z must be False for the Hypernetwork of a layer with HeadParallel")

        def placed(name: str, t: Any, layout: Placement, needed: Placement, features: int) -> Any:
            if isinstance(t, tuple):
                return tuple(placed(name, each, layout, needed, features) for each in t)
            if not isinstance(t, DTensor):
                t = _from_local(name, t, mesh, layout, features)
            return t.redistribute(placements=[needed])

        x = placed("x", x, self.input_layouts, self._last_axis("x"), layer.in_features)
        z = placed("z", z, self.cond_layouts, self._last_axis("z"), layer.cond_features)
        return {"x": x, "z": z, "incidence": incidence, "reduce": reduce}

    def _last_axis(self, name: str) -> Placement:
        return Shard(-1) if _LETTERS[self.by] in _AXES[name] else Replicate()

    def _placement(self, name: str) -> Placement:
        letter = _LETTERS[self.by]
        return Shard(_AXES[name].index(letter)) if letter in _AXES[name] else Replicate()


def _from_local(name: str, t: Tensor, mesh: DeviceMesh, layout: Placement, features: int) -> DTensor:
    """Return the DTensor that a process has a part of; the parts of its last axis may have different sizes.

    Raises:
        ValueError: the last axis is divided, and this process has another part of it than torch divides.
    """
    if not (layout.is_shard() and cast(Shard, layout).dim in (-1, t.dim() - 1)):
        return DTensor.from_local(t, mesh, [layout], run_check=False)
    most = -(-features // mesh.size())  # as torch divides
    own = max(0, min(most, features - most * mesh.get_local_rank()))
    if t.shape[-1] != own:
        raise ValueError(
            f"{name} must have the {own} of {features} features that this process has of {mesh.size()}, got a local "
            f"{tuple(t.shape)}; pass input_layouts=Replicate() or cond_layouts=Replicate() where it is whole"
        )
    shape = torch.Size([*t.shape[:-1], features])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(t, mesh, [layout], run_check=False, shape=shape, stride=stride)


def reset_parts(module: nn.Module, seed: int = 0) -> None:
    """Initialise the layers whose heads are divided, each by its ``reset_parameters``.

    Every process draws other numbers for its part of a parameter; a parameter that is not divided is the same in all of
    them. So a head can be initialised that no process could hold: make the layers on the meta device, divide them, and
    call ``module.to_empty(device=…)`` and this function.

    Args:
        module: a model, the same in every process. Its other parameters do not change.
        seed: a number, the same in every process.

    Example:
        >>> from fasthyper.distributed import reset_parts
        >>> reset_parts(primary, seed=1)  # doctest: +SKIP
    """
    layers = [m for m in module.modules() if isinstance(m, HyperLinear) and any(map(_is_divided, m.parameters(False)))]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "DTensor random operators")  # what is wrong with them is put right below
        torch.manual_seed(seed + 1_000_003 * torch.distributed.get_rank())
        for layer in layers:
            layer.reset_parameters()
    for layer in layers:
        for parameter in layer.parameters(False):
            _copy_from_first(parameter)


def _copy_from_first(parameter: Any) -> None:
    """Give all processes that have the same part of a parameter the values that the first of them has."""
    if _is_divided(parameter):
        local, of = parameter.detach().to_local(), {"shape": parameter.shape, "stride": parameter.stride()}
        DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=True, **of)  # the check sends


def _is_divided(parameter: Any) -> bool:
    return isinstance(parameter, DTensor)
