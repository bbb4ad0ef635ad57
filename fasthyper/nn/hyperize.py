"""`hyperize`: a copy of any module in which chosen linear layers are generated."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from fasthyper.nn.linear import HyperLinear
from fasthyper.nn.plain_linear import NEVER_CALLED, why_not_plain


def hyperize(
    module: nn.Module,
    cond_features: int,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    *,
    bias: bool = True,
    base: bool = True,
    init: str | None = None,
) -> nn.Module:
    """A deep copy of `module` with chosen `nn.Linear`s turned into `HyperLinear`s, for a `Hypernetwork`.

    The parameters of a chosen Linear become the base of its HyperLinear (`fc.weight` is then
    `fc.base_weight`, `fc.bias` is `fc.base_bias`), frozen where they were. With the default init the head is
    zero, so that at the start the copy computes what `module` does, pretrained or not.

    What is tied stays tied: a layer found in two places is one HyperLinear, and chosen if any of its names
    is; Linears that share a Parameter share its base and its head; a Linear that shares its weight with, say,
    an Embedding shares its base with it. Instances are the first dimension of whatever reaches a HyperLinear.

    Args:
        module: any module; it is not changed.
        cond_features: R, the number of features of z.
        include: patterns of the qualified names to choose from all nn.Linears (`fnmatch`: `*` matches dots
            too), or a single one; None chooses all. A module that is itself a Linear has the name "".
        exclude: patterns of those not to choose.
        bias: generate the bias as well, where a Linear has one; if not, it stays a learned, shared one.
        base: keep what is generated as the base as well. If not, nothing of it is kept.
        init: of the heads, see `HyperLinear.reset_parameters`; None is "bias_hyper" with a base, which starts
            every instance from the base alone, and "hyperfan_in" without.

    Returns:
        The copy. `ungenerated` lists what stays an ordinary parameter in it.

    Raises:
        TypeError: `module` is not a module, or a pattern is not a string.
        ValueError: a pattern that matches no Linear; no Linear chosen; a negative size or unknown init; a
            chosen Linear that cannot be generated, by name: one that the layer above reads without calling it
            (the out_proj of MultiheadAttention), with a forward of its own, hooked, parametrized, or lazy and
            not initialised.

    Warns:
        UserWarning: a chosen Linear sits in a transformer layer with batch_first=False, whose first dimension
            is time.

    >>> import torch
    >>> mlp = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> primary = hyperize(mlp, cond_features=16, exclude="0")
    >>> ungenerated(primary)
    ['0.weight', '0.bias']
    >>> x, z = torch.randn(5, 2), torch.randn(5, 16)
    >>> from fasthyper.nn import Hypernetwork
    >>> torch.allclose(Hypernetwork(nn.Identity(), primary)(x, z), mlp(x), atol=1e-6)
    True
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    chosen = _chosen(module, _patterns("include", include), _patterns("exclude", exclude))
    _refuse(module, chosen)
    root = copy.deepcopy(module)
    init = init or ("bias_hyper" if base else "hyperfan_in")
    heads: dict[int, nn.Parameter] = {}
    for name in chosen:
        linear = root.get_submodule(name)
        if isinstance(linear, nn.Linear):  # else the same layer was met before under another name
            _convert(linear, cond_features, bias, base, init, heads)
    _adapt_transformers(root)
    return root


def ungenerated(module: nn.Module) -> list[str]:
    """Names of the parameters that are not part of a `HyperLinear`: learned ones that no z reaches.

    >>> ungenerated(nn.Sequential(HyperLinear(2, 2, cond_features=3), nn.LayerNorm(2)))
    ['1.weight', '1.bias']
    """
    generated = {id(p) for m in module.modules() if isinstance(m, HyperLinear) for p in m.parameters(recurse=False)}
    return [name for name, p in module.named_parameters() if id(p) not in generated]


def _patterns(argument: str, value: str | Iterable[str] | None) -> list[str] | None:
    if value is None:
        return None
    patterns = [value] if isinstance(value, str) else list(value)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} must hold patterns of names (str), got a {type(pattern).__name__}")
    return patterns


def _chosen(module: nn.Module, include: list[str] | None, exclude: list[str] | None) -> list[str]:
    names = [name for name, m in module.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)]
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or []:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"{argument}: {pattern!r} matches none of the nn.Linears, which are {names}")

    def matches(name: str, patterns: list[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    chosen = [n for n in names if (include is None or matches(n, include)) and not matches(n, exclude or [])]
    if not chosen:
        raise ValueError(f"include and exclude leave none of the nn.Linears, which are {names}")
    return chosen


def _refuse(module: nn.Module, chosen: list[str]) -> None:
    refused = []
    for name in chosen:
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        problem = why_not_plain(linear)
        if name and isinstance(module.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            problem = NEVER_CALLED
        if problem:
            refused.append(f"{name!r}: {problem}")
    if refused:
        raise ValueError("cannot generate " + "; ".join(refused) + ". Leave such layers out with exclude.")


def _convert(
    linear: nn.Linear, cond_features: int, bias: bool, base: bool, init: str, heads: dict[int, nn.Parameter]
) -> None:
    weight, old_bias = linear._parameters["weight"], linear._parameters["bias"]
    assert weight is not None
    layer = HyperLinear(
        linear.in_features,
        linear.out_features,
        cond_features,
        bias=bias and old_bias is not None,
        base=base,
        init=init,
        device=weight.device,
        dtype=weight.dtype,
    )
    layer.weight = heads.setdefault(id(weight), layer.weight)
    if layer.bias is not None:
        layer.bias = heads.setdefault(id(old_bias), layer.bias)
    layer.base_weight = weight if base else None
    layer.base_bias = old_bias if base or not bias else None
    layer.train(linear.training)
    # In place, so that whatever else refers to the layer (another name, a plain list) sees the new one.
    linear.__class__ = HyperLinear  # type: ignore[assignment]
    vars(linear).update(vars(layer))


def _adapt_transformers(root: nn.Module) -> None:
    """Turn off their fast path for inference: it reads the weights of their Linears, and calls none."""
    for name, module in root.named_modules():
        if not any(isinstance(child, HyperLinear) for child in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        elif isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0
            if not module.self_attn.batch_first:
                warnings.warn(
                    f"{name or type(module).__name__!r} has batch_first=False: the first dimension of its "
                    "input is time, but a HyperLinear takes the first dimension for the instances.",
                    stacklevel=3,
                )
