"""`what_is_generated`: which layers of a module are generated, and why the others are not."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fasthyper.nn.conversions import rule_of
from fasthyper.nn.generated import HEADS, GeneratedLayer, generating_parameters
from fasthyper.nn.hyperize import why_not_generated


@dataclass(frozen=True)
class LayerSummary:
    """A layer with parameters of its own.

    Attributes:
        name: its name in ``module.named_modules()``.
        kind: the name of its class.
        generated: the names of its parameters that are generated.
        shared: the names of its parameters that are not: all instances share them.
        why: why it is not generated; empty if it is.
    """

    name: str
    kind: str
    generated: tuple[str, ...]
    shared: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class GenerationSummary:
    """The layers of a module, generated or not; as a string, a table.

    Attributes:
        layers: a :class:`LayerSummary` of each layer with parameters, in the order of ``module.named_modules()``.
    """

    layers: tuple[LayerSummary, ...]

    def __str__(self) -> str:
        rows = [("layer", "class", "generated", "shared", "why it is not generated")]
        rows += [
            (s.name or "(itself)", s.kind, ", ".join(s.generated) or "-", ", ".join(s.shared) or "-", s.why)
            for s in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def what_is_generated(module: nn.Module) -> GenerationSummary:
    """List the layers of a module that are generated, and those that have parameters but are not, and why.

    Args:
        module: any module, such as a result of :func:`~fasthyper.nn.hyperize`, or a module before that.

    Returns:
        The layers; as a string, a table.

    Example:
        >>> from torch import nn
        >>> from fasthyper.nn import hyperize, what_is_generated
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.LayerNorm(8), nn.PReLU(), nn.Linear(8, 1))
        >>> print(what_is_generated(hyperize(net, cond_features=16, exclude="3")))
        layer  class        generated     shared        why it is not generated
        0      HyperLinear  weight, bias  -
        1      LayerNorm    -             weight, bias  needs types="norm", or include or exclude leaves it out
        2      PReLU        -             weight        no rule for PReLU: replace={PReLU: ...} gives one
        3      Linear       -             weight, bias  needs types="linear", or include or exclude leaves it out
    """
    generating = set(map(id, generating_parameters(module)))
    layers = [entry for entry in module.named_modules() if _has_own(entry[1], generating)]
    return GenerationSummary(tuple(_layer(module, *entry) for entry in layers))


def _has_own(module: nn.Module, generating: set[int]) -> bool:
    """Return whether a module is a generated layer, or has parameters that generate none."""
    own = (p for p in module.parameters(recurse=False) if id(p) not in generating)
    return isinstance(module, GeneratedLayer) or any(True for _ in own)


def _layer(root: nn.Module, name: str, module: nn.Module) -> LayerSummary:
    kind = type(module).__name__
    if isinstance(module, GeneratedLayer):
        generated = tuple(key for key in HEADS if getattr(module, key, None) is not None)
        shared = ("base_bias",) if module._own("bias") is None and module._own("base_bias") is not None else ()
        return LayerSummary(name, kind, generated, shared, "")
    own = tuple(key for key, _ in module.named_parameters(recurse=False))
    return LayerSummary(name, kind, (), own, _why(root, name, module))


def _why(root: nn.Module, name: str, module: nn.Module) -> str:
    found = rule_of(type(module))
    if found is None:
        kind = type(module).__name__
        return f"no rule for {kind}: replace={{{kind}: ...}} gives one"
    if problem := why_not_generated(root, name):
        return f"cannot be: {problem}"
    return f'needs types="{found[1].family}", or include or exclude leaves it out'
