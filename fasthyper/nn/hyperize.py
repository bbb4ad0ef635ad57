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
    rank: int | None = None,
    alpha: float | None = None,
) -> nn.Module:
    """Return a copy of a module in which chosen linear layers are generated, as the primary of a Hypernetwork.

    Each chosen :class:`torch.nn.Linear` becomes a :class:`~fasthyper.nn.HyperLinear`, and its parameters become the
    base: ``fc.weight`` becomes ``fc.base_weight``, and ``fc.bias`` becomes ``fc.base_bias``. Frozen parameters stay
    frozen. With the default ``base`` and ``init`` the head starts at zero, so that for any z the copy starts with the
    outputs of ``module``, pretrained or not.

    Ties are preserved:

    - A layer in two places becomes one HyperLinear. It is chosen if any of its names is chosen.
    - Linears that share a parameter share its base and its head.
    - A Linear that shares its weight with another module, such as an Embedding, shares its base with that module.

    The first dimension of any tensor that reaches a HyperLinear is B, the instances.

    Args:
        module: any module; it is not changed.
        cond_features: the number of features of z, R.
        include: a pattern, or several, of the qualified names of the Linears to choose (:mod:`fnmatch`; ``*`` also
            matches dots). None chooses all. If ``module`` itself is a Linear, its name is ``""``.
        exclude: a pattern, or several, of names not to choose.
        bias: if True, generate the bias of each chosen Linear that has one. If False, it stays an ordinary parameter,
            shared by all instances.
        base: if True, keep the parameters of a chosen Linear as the base. If False, discard those that are generated.
        init: the initialisation of the heads, see :meth:`HyperLinear.reset_parameters
            <fasthyper.nn.HyperLinear.reset_parameters>`. None means ``"bias_hyper"`` with a base, so that every
            instance starts from the base alone, and ``"hyperfan_in"`` without.
        rank: if given, the generated weights have this rank, see :class:`~fasthyper.nn.HyperLinear`.
        alpha: the factor of generated weights of low rank, times the rank; None means the rank.

    Returns:
        The copy. :func:`~fasthyper.nn.ungenerated` lists its ordinary parameters.

    Raises:
        TypeError: ``module`` is not a module, or a pattern is not a string.
        ValueError: a pattern matches no Linear, no Linear is chosen, a size is negative, ``init`` is unknown, or a
            chosen Linear cannot be generated. A Linear cannot be generated if another module reads its weights without
            calling it (the out_proj of :class:`torch.nn.MultiheadAttention`), if it has hooks or a forward of its own,
            if it is parametrized, or if it is lazy and not initialised.

    Warns:
        UserWarning: a chosen Linear is part of a transformer layer with ``batch_first=False``, whose inputs have time
            as their first dimension.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fasthyper.nn import Hypernetwork, hyperize, ungenerated
        >>> mlp = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> primary = hyperize(mlp, cond_features=16, exclude="0")
        >>> ungenerated(primary)
        ['0.weight', '0.bias']
        >>> x, z = torch.randn(5, 2), torch.randn(5, 16)
        >>> torch.allclose(Hypernetwork(nn.Identity(), primary)(x, z), mlp(x), atol=1e-6)
        True
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    chosen = _chosen_names(module, _patterns("include", include), _patterns("exclude", exclude))
    _check_convertible(module, chosen)
    root = copy.deepcopy(module)
    init = init or ("bias_hyper" if base else "hyperfan_in")
    heads: dict[tuple[int, str], nn.Parameter] = {}
    for name in chosen:
        linear = root.get_submodule(name)
        if isinstance(linear, nn.Linear):  # else it is already converted, under another of its names
            _convert(linear, cond_features, bias, base, init, heads, rank, alpha)
    _adapt_transformers(root)
    return root


def ungenerated(module: nn.Module) -> list[str]:
    """Return the names of the parameters that are not part of a HyperLinear, and so do not depend on z.

    Args:
        module: any module, such as a result of :func:`~fasthyper.nn.hyperize`.

    Returns:
        The names, as in ``module.named_parameters()``.

    Example:
        >>> from torch import nn
        >>> from fasthyper.nn import HyperLinear, ungenerated
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


def _chosen_names(module: nn.Module, include: list[str] | None, exclude: list[str] | None) -> list[str]:
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


def _check_convertible(module: nn.Module, chosen: list[str]) -> None:
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
    linear: nn.Linear,
    cond_features: int,
    bias: bool,
    base: bool,
    init: str,
    heads: dict[tuple[int, str], nn.Parameter],
    rank: int | None,
    alpha: float | None,
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
        rank=rank,
        alpha=alpha,
    )
    of = {"weight": weight, "weight_a": weight, "weight_b": weight, "bias": old_bias}
    for name, head in list(layer.named_parameters()):
        if name in of:
            setattr(layer, name, heads.setdefault((id(of[name]), name), head))
    layer.base_weight = weight if base else None
    layer.base_bias = old_bias if base or not bias else None
    layer.train(linear.training)
    # In place: every other reference to the layer (a second name, a plain list) then refers to the new one.
    linear.__class__ = HyperLinear  # type: ignore[assignment]
    vars(linear).update(vars(layer))


def _adapt_transformers(root: nn.Module) -> None:
    """Disable the fast path of transformers for inference: it reads weights of their Linears without calling them."""
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
                    "input is time, but a HyperLinear expects the instances there.",
                    stacklevel=3,
                )
