"""`hyperize`: a copy of any module in which chosen layers are generated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from fasthyper.nn.conversions import FAMILIES, Options, convert, rule_of, why_not
from fasthyper.nn.generated import GeneratedLayer, generating_parameters
from fasthyper.nn.low_rank import check_rank
from fasthyper.nn.plain_linear import NEVER_CALLED
from fasthyper.nn.readers import mark_readers

Types = type[nn.Module] | str | Iterable[type[nn.Module] | str]
Replace = Mapping[type[nn.Module], Callable[[Any, int], nn.Module | None]]


def hyperize(
    module: nn.Module,
    cond_features: int,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    *,
    types: Types | None = None,
    replace: Replace | None = None,
    bias: bool = True,
    base: bool = True,
    init: str | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    bias_cond_features: int | None = None,
    allow_time_first: bool = False,
) -> nn.Module:
    """Return a copy of a module in which chosen layers are generated, as the primary of a Hypernetwork.

    By default each :class:`torch.nn.Linear` is chosen and becomes a :class:`~fasthyper.nn.HyperLinear`, whose base are
    its parameters: ``fc.weight`` becomes ``fc.base_weight``, and ``fc.bias`` becomes ``fc.base_bias``. Frozen
    parameters stay frozen. With the default ``base`` and ``init`` the head starts at zero, so that for any z the copy
    starts with the outputs of ``module``, pretrained or not.

    ``types`` chooses other layers: classes, or the names of families of classes.

    ===============  ==================================================================  ==================
    Family           Classes                                                             Become
    ===============  ==================================================================  ==================
    ``"linear"``     ``nn.Linear``, ``Linear`` of PyTorch Geometric, ``Conv1D`` of       ``HyperLinear``
                     transformers (its weight is (I, O); the base is its transpose)
    ``"norm"``       ``LayerNorm``, ``RMSNorm``, ``GroupNorm``, ``BatchNorm1d|2d|3d``    ``HyperAffine``
    ``"embedding"``  ``Embedding``                                                       ``HyperEmbedding``
    ``"conv"``       ``Conv1d|2d|3d``, ``ConvTranspose1d|2d|3d``                         ``HyperConv…``
    ===============  ==================================================================  ==================

    A norm without scale is never chosen. :func:`~fasthyper.nn.what_is_generated` lists what was chosen and what was
    not.

    Ties are preserved:

    - A layer in two places becomes one generated layer. It is chosen if any of its names is chosen.
    - Layers that share a parameter share its base and its head. With a rank, layers share both heads of low
      rank, but share the base alone with a layer whose head is full.
    - A layer that shares its weight with another module, such as an Embedding, shares its base with that module.

    The first dimension of any tensor that reaches a generated layer is B, the instances.

    The weight of a generated layer is the head, (O, I, R). Code of the module that reads it in the place of the
    ordinary weight, such as ``F.linear(x, self.fc.weight)`` or a norm of it, raises a RuntimeError that names the
    layer: in the forward or another method, in a property, in a function inside of these or put on the class or the
    module, in what these call, and in the methods of other objects that the module holds, also in containers. So does
    code that sets an attribute of the weight. Its shape, dtype and device are those of the ordinary weight. What such
    code runs in another thread gets the head, as a script does, and so does compiled code while no z is delivered.

    Args:
        module: any module; it is not changed.
        cond_features: the number of features of z, R.
        include: a pattern, or several, of the qualified names of the layers to choose (:mod:`fnmatch`; ``*`` also
            matches dots). None chooses all. If ``module`` itself is a layer, its name is ``""``.
        exclude: a pattern, or several, of names not to choose.
        types: a class, the name of a family, or several, of which layers are chosen. None means ``torch.nn.Linear``.
        replace: how further classes are generated: for each class a function that takes a layer of the copy and
            ``cond_features`` and returns a module in its place, or None to leave it as it is. It comes before the
            rule for a class that hyperize has. Its layers are chosen as those of ``types`` are.
        bias: if True, generate the bias of each chosen layer that has one. If False, it stays an ordinary parameter,
            shared by all instances.
        base: if True, keep the parameters of a chosen layer as the base. If False, discard those that are generated.
        init: the initialisation of the heads, see :meth:`HyperLinear.reset_parameters
            <fasthyper.nn.HyperLinear.reset_parameters>`. None means ``"bias_hyper"`` with a base, so that every
            instance starts from the base alone, and ``"hyperfan_in"`` without.
        rank: if given, the generated weights of HyperLinears and convolutions have this rank, see
            :class:`~fasthyper.nn.HyperLinear`. Transposed convolutions, norms and embeddings have full heads.
        alpha: the factor of generated weights of low rank, times the rank; None means the rank.
        bias_cond_features: the number of features of the z of the biases of HyperLinears, if they have one of their
            own.
        allow_time_first: if True, accept a module with ``batch_first=False``; see below.

    Returns:
        The copy. :func:`~fasthyper.nn.ungenerated` lists its ordinary parameters.

    Raises:
        TypeError: ``module`` is not a module, a pattern is not a string, or ``types`` has neither classes nor names.
        ValueError: a pattern matches no layer of the types, no layer is chosen, there is no rule for a type, a size is
            negative, ``init`` is unknown, or a chosen layer cannot be generated. A layer cannot be generated if
            another module reads its weights without calling it (the out_proj of
            :class:`torch.nn.MultiheadAttention`), if it has hooks or a forward of its own, if it is parametrized, or
            if it is lazy and not initialised.
        ValueError: the module has a recurrent layer, an attention or a transformer layer with ``batch_first=False``.
            The first dimension of their inputs and outputs is time, which a generated layer would take for the
            instances; where there are as many steps as instances, the result would be wrong without an error. Set
            ``batch_first=True``, or pass ``allow_time_first=True`` if instances come first at each generated layer,
            for example because it sees only the last step.

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
    check_rank(rank, alpha)
    replace = _checked_replace(replace)
    is_candidate = _candidates(types, replace)
    chosen = _chosen_names(module, is_candidate, _patterns("include", include), _patterns("exclude", exclude))
    _check_convertible(module, chosen, replace)
    if not allow_time_first:
        _refuse_time_first(module)
    root = copy.deepcopy(module)
    init = init or ("bias_hyper" if base else "hyperfan_in")
    layers: dict[int, tuple[str, nn.Module]] = {}  # once, also under several names
    for name in chosen:
        layer = root.get_submodule(name)
        layers.setdefault(id(layer), (name, layer))
    readers = mark_readers(module for module in root.modules() if id(module) not in layers)
    options = Options(cond_features, bias, base, init, bias_cond_features, rank, alpha, readers)
    for name, layer in layers.values():
        if (make := _made_by(layer, replace)) is None:
            convert(layer, name, options)
        else:
            root = _replace(root, layer, make(layer, cond_features))
    _adapt_transformers(root)
    return root


def ungenerated(module: nn.Module) -> list[str]:
    """Return the names of the parameters that are not part of a generated layer, and so do not depend on z.

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
    generated = set(map(id, generating_parameters(module)))
    return [name for name, p in module.named_parameters() if id(p) not in generated]


def _patterns(argument: str, value: str | Iterable[str] | None) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, Iterable):
        raise TypeError(f"{argument} must hold patterns of names (str), got a {type(value).__name__}")
    patterns = [value] if isinstance(value, str) else list(value)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} must hold patterns of names (str), got a {type(pattern).__name__}")
    return patterns


def _checked_replace(replace: Replace | None) -> dict[type[nn.Module], Callable[[Any, int], nn.Module | None]]:
    if replace is not None and not isinstance(replace, Mapping):
        raise TypeError(f"replace must be a dict of classes and functions, got a {type(replace).__name__}")
    for cls, make in (replace or {}).items():
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise TypeError(f"replace must have classes of modules as its keys, got {cls!r}")
        if not callable(make):
            raise TypeError(f"replace must have functions as its values, got {make!r} for {cls.__name__}")
    return dict(replace or {})


def _candidates(types: Types | None, replace: Replace) -> Callable[[nn.Module], bool]:
    """Return whether a module is of the types that may be chosen."""
    if types is not None and not isinstance(types, (str, type, Iterable)):
        raise TypeError(f"types must hold classes of modules and names of families, got {types!r}")
    given = [nn.Linear] if types is None else [types] if isinstance(types, (str, type)) else list(types)
    families, classes = [], [*replace]
    for t in given:
        if isinstance(t, str):
            if t not in FAMILIES:
                raise ValueError(f"types: there is no family {t!r}; families are {', '.join(map(repr, FAMILIES))}")
            families.append(t)
        elif isinstance(t, type) and issubclass(t, nn.Module):
            if rule_of(t) is None and not issubclass(t, tuple(replace)):
                raise ValueError(f"types: there is no rule for {t.__name__}; pass one with replace={{{t.__name__}: …}}")
            classes.append(t)
        else:
            raise TypeError(f"types must hold classes of modules and names of families, got {t!r}")

    def is_candidate(module: nn.Module) -> bool:
        if isinstance(module, tuple(classes)) and rule_of(type(module)) is None:
            return True
        if module._parameters.get("weight", module) is None:  # a norm without a scale, which has nothing to generate
            return False
        return isinstance(module, tuple(classes)) or any(is_of_family(module, family) for family in families)

    return is_candidate


def is_of_family(module: nn.Module, family: str) -> bool:
    """Return whether `hyperize` has a rule of a family for a module."""
    found = rule_of(type(module))
    return found is not None and found[1].family == family


def _chosen_names(
    module: nn.Module,
    is_candidate: Callable[[nn.Module], bool],
    include: list[str] | None,
    exclude: list[str] | None,
) -> list[str]:
    every = dict(module.named_modules(remove_duplicate=False))
    shared = [m.head for m in every.values() if isinstance(m, GeneratedLayer) and "places" in vars(m)]
    heads = {id(part) for head in shared for part in head.modules()}
    names = [name for name, m in every.items() if is_candidate(m) and id(m) not in heads]
    kinds = "nn.Linears" if all(isinstance(every[name], nn.Linear) for name in names) else "layers of the types"
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or []:
            if not any(fnmatchcase(name, pattern) for name in names):
                others = [n for n, m in every.items() if fnmatchcase(n, pattern) and rule_of(type(m)) is not None]
                hint = f". types=… chooses others, such as {others[0]!r}, {_class(every[others[0]])}" if others else ""
                raise ValueError(f"{argument}: {pattern!r} matches none of the {kinds}, which are {names}{hint}")

    def matches(name: str, patterns: list[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    chosen = [n for n in names if (include is None or matches(n, include)) and not matches(n, exclude or [])]
    if not names:
        others = [n for n, m in every.items() if n and rule_of(type(m)) is not None]
        hint = f"; types=… chooses others, such as {others[0]!r}, {_class(every[others[0]])}" if others else ""
        raise ValueError(f"module must have layers that can be generated: it has none of the {kinds}{hint}")
    if not chosen:
        raise ValueError(f"include and exclude leave none of the {kinds}, which are {names}")
    return chosen


def _class(module: nn.Module) -> str:
    return f"a {type(module).__name__}"


def why_not_generated(root: nn.Module, name: str) -> str | None:
    """Return why a submodule for which there is a rule cannot be generated, or None if it can."""
    layer = root.get_submodule(name)
    if name and isinstance(root.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        return NEVER_CALLED
    return why_not(layer)


def _check_convertible(module: nn.Module, chosen: list[str], replace: Replace) -> None:
    refused = []
    for name in chosen:
        by_user = _made_by(module.get_submodule(name), replace) is not None
        if not by_user and (problem := why_not_generated(module, name)):
            refused.append(f"{name!r}: {problem}")
    if refused:
        raise ValueError("cannot generate " + "; ".join(refused) + ". Leave such layers out with exclude.")


def _made_by(layer: nn.Module, replace: Replace) -> Callable[[Any, int], nn.Module | None] | None:
    """Return the caller's function for the class of a layer, or for the nearest of its base classes."""
    return next((replace[cls] for cls in type(layer).__mro__ if cls in replace), None)


def _replace(root: nn.Module, layer: nn.Module, made: nn.Module | None) -> nn.Module:
    """Put a module in the place of a layer, under all its names; return the root, which may be the new module."""
    if made is None or made is layer:
        return root
    if not isinstance(made, nn.Module):
        raise TypeError(f"replace must return a module or None for {_class(layer)}, got {type(made).__name__}")
    if root is layer:
        return made
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is layer and parent is not made:
                parent._modules[name] = made
    return root


def _refuse_time_first(root: nn.Module) -> None:
    found = [
        f"{name!r} ({type(module).__name__})"
        for name, module in root.named_modules()
        if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and not module.batch_first
    ]
    if found:
        raise ValueError(
            f"{', '.join(found)}: batch_first=False, so that time is the first dimension, where a generated layer "
            "expects the instances. Build the module with batch_first=True. If instances come first at each generated "
            "layer nevertheless, pass allow_time_first=True"
        )


def _adapt_transformers(root: nn.Module) -> None:
    """Disable the fast path of transformers for inference: it reads weights of their Linears without calling them."""
    for module in root.modules():
        if not any(isinstance(child, GeneratedLayer) for child in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        elif isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
