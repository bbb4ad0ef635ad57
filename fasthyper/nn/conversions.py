"""What `hyperize` can generate: for each type of layer, its family and how its generated counterpart is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from fasthyper.nn import conv
from fasthyper.nn.affine import NORMS, HyperAffine
from fasthyper.nn.generated import HEADS, GeneratedLayer
from fasthyper.nn.hyper_convolution import HyperConvolution
from fasthyper.nn.hyper_embedding import HyperEmbedding
from fasthyper.nn.linear import HyperLinear
from fasthyper.nn.plain_linear import why_not_plain
from fasthyper.nn.readers import Readers
from fasthyper.nn.reads import Replaced


@dataclass(frozen=True)
class Options:
    """What the caller of `hyperize` asked for, and the ties of parameters that were met so far."""

    cond_features: int
    bias: bool
    base: bool
    init: str
    bias_cond_features: int | None = None
    rank: int | None = None
    alpha: float | None = None
    readers: Readers = field(default_factory=Readers)
    # The heads of each parameter, by its id and their names: a weight of low rank has two.
    heads: dict[tuple[int, str], nn.Parameter] = field(default_factory=dict)
    # A parameter and its transpose, by the id of the first, which stays alive: no other gets its id.
    transposed: dict[int, tuple[nn.Parameter, nn.Parameter]] = field(default_factory=dict)


class Rule(NamedTuple):
    """How layers of a class are generated.

    `make(layer, options)` returns a layer with the parameters `weight`, `bias`, `base_weight` and `base_bias`, whose
    base has the shapes of the parameters of the old layer: `convert` puts these in its place.
    """

    family: str
    make: Callable[[Any, Options], GeneratedLayer]
    why_not: Callable[[Any], str | None] = lambda layer: None


def _place(layer: nn.Module) -> dict[str, Any]:
    weight = layer._parameters["weight"]
    assert weight is not None
    return {"device": weight.device, "dtype": weight.dtype}


def _generates_bias(layer: nn.Module, options: Options) -> bool:
    return options.bias and layer._parameters.get("bias") is not None


def _hyper_linear(layer: nn.Module, in_features: int, out_features: int, options: Options) -> HyperLinear:
    return HyperLinear(
        in_features,
        out_features,
        options.cond_features,
        bias=_generates_bias(layer, options),
        base=options.base,
        init=options.init,
        bias_cond_features=options.bias_cond_features,
        rank=options.rank,
        alpha=options.alpha,
        **_place(layer),
    )


def _linear(layer: nn.Linear, options: Options) -> HyperLinear:
    return _hyper_linear(layer, layer.in_features, layer.out_features, options)


def _pyg_linear(layer: Any, options: Options) -> HyperLinear:
    return _hyper_linear(layer, layer.in_channels, layer.out_channels, options)


def _conv1d_of_transformers(layer: Any, options: Options) -> HyperLinear:
    """Its weight is (I, O): the base is a copy of its transpose, since safetensors refuses to save a view."""
    weight = layer._parameters["weight"]
    base = nn.Parameter(weight.detach().T.contiguous(), requires_grad=weight.requires_grad)
    _, layer._parameters["weight"] = options.transposed.setdefault(id(weight), (weight, base))
    return _hyper_linear(layer, weight.shape[0], weight.shape[1], options)


def _norm(layer: nn.Module, options: Options) -> HyperAffine:
    made = HyperAffine(layer, options.cond_features, _generates_bias(layer, options), options.base, options.init)
    made.norm.train(layer.training)
    return made


def _embedding(layer: nn.Embedding, options: Options) -> HyperEmbedding:
    return HyperEmbedding(
        layer.num_embeddings,
        layer.embedding_dim,
        options.cond_features,
        options.base,
        layer.padding_idx,
        options.init,
        **_place(layer),
    )


def _why_no_embedding(layer: nn.Embedding) -> str | None:
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(layer, option):
            return f"its {option} has no generated counterpart"
    return None


def _convolution(made: type[HyperConvolution]) -> Callable[[Any, Options], Any]:
    def make(layer: Any, options: Options) -> Any:
        if made.transposed:
            more = {"output_padding": layer.output_padding}
        else:
            if options.rank is not None and options.rank % layer.groups:
                raise ValueError(
                    f"rank must be a multiple of the groups of each convolution that is generated, got {options.rank} "
                    f"and {layer}: leave it out with exclude, or give it a rule with replace"
                )
            more = {"padding_mode": layer.padding_mode, "rank": options.rank, "alpha": options.alpha}
        return made(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            options.cond_features,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            bias=_generates_bias(layer, options),
            base=options.base,
            init=options.init,
            **more,
            **_place(layer),
        )

    return make


_CONVOLUTIONS: dict[type[nn.Module], type[HyperConvolution]] = {
    nn.Conv1d: conv.HyperConv1d,
    nn.Conv2d: conv.HyperConv2d,
    nn.Conv3d: conv.HyperConv3d,
    nn.ConvTranspose1d: conv.HyperConvTranspose1d,
    nn.ConvTranspose2d: conv.HyperConvTranspose2d,
    nn.ConvTranspose3d: conv.HyperConvTranspose3d,
}

RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: Rule("linear", _linear),
    nn.Embedding: Rule("embedding", _embedding, _why_no_embedding),
    **dict.fromkeys(NORMS, Rule("norm", _norm)),
    **{cls: Rule("conv", _convolution(made)) for cls, made in _CONVOLUTIONS.items()},
}
"""The rules, by class."""

_OF_OTHER_LIBRARIES = {
    ("torch_geometric.nn.dense.linear", "Linear"): Rule("linear", _pyg_linear),
    ("transformers.pytorch_utils", "Conv1D"): Rule("linear", _conv1d_of_transformers),
}
"""Rules for classes that are known by their module and name: importing fasthyper does not import their libraries."""

FAMILIES = tuple(dict.fromkeys(rule.family for rule in RULES.values()))


def rule_of(cls: type[nn.Module]) -> tuple[type[nn.Module], Rule] | None:
    """Return the rule for a class or its nearest base class that has one, and that class."""
    for base in cls.__mro__:
        rule = RULES.get(base) or _OF_OTHER_LIBRARIES.get((base.__module__, base.__name__))
        if rule is not None:
            return base, rule
    return None


def why_not(layer: nn.Module) -> str | None:
    """Return why a layer for which there is a rule cannot be generated, or None if it can."""
    found = rule_of(type(layer))
    assert found is not None
    cls, rule = found
    return why_not_plain(layer, cls) or rule.why_not(layer)


def convert(layer: nn.Module, name_of_layer: str, options: Options) -> None:
    """Turn a layer into its generated counterpart, in place; its parameters become the base."""
    found = rule_of(type(layer))
    assert found is not None
    shapes = {name: tuple(p.shape) for name, p in layer._parameters.items() if p is not None}
    made = found[1].make(layer, options)
    generated = set()
    for name, of in HEADS.items():
        head = made._parameters.get(name)
        if head is not None:
            made._parameters[name] = options.heads.setdefault((id(layer._parameters.get(of)), name), head)
            generated.add(of)
    for name in ("weight", "bias"):
        keep = options.base or name not in generated
        made._parameters[f"base_{name}"] = layer._parameters.get(name) if keep else None
    made.train(layer.training)
    of_generated = {name: shapes[name] for name in shapes if name in generated}
    made._replaced = Replaced(name_of_layer, of_generated, options.readers)
    # In place: every other reference to the layer (a second name, a plain list) then refers to the new one.
    layer.__class__ = type(made)
    vars(layer).update(vars(made))
