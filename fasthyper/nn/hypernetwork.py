"""`Hypernetwork`: a trunk that computes z, and a primary network with weights generated from z."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fasthyper.fused import hyper_primary, may_fuse
from fasthyper.incidence import Incidence
from fasthyper.nn.current_z import check_delivery, deliver, tied
from fasthyper.nn.flat_head import Order, flat_head_of, load_rows, primary_of_flat_head
from fasthyper.nn.forward_arguments import ShowsArguments
from fasthyper.nn.fusable import fusable_layers
from fasthyper.nn.generated import GeneratedLayer, SharedHead
from fasthyper.nn.heads import Place
from fasthyper.nn.hyperize import ungenerated
from fasthyper.nn.linear import HyperLinear
from fasthyper.nn.merge import merged_copy
from fasthyper.nn.recorded_network import record_network
from fasthyper.nn.rows import in_instances
from fasthyper.nn.tracing import proxy_of, refuse_script
from fasthyper.nn.wrappers import is_inside

_MAX_LISTED = 8


class Hypernetwork(ShowsArguments):
    """Run a primary network with the weights of its generated layers computed by a trunk.

    It computes ``z = trunk(cond)`` and returns ``primary(x)``, in which every :class:`~fasthyper.nn.HyperLinear` that
    is called without a z takes this one. The primary may therefore be any module, see :func:`~fasthyper.nn.hyperize`.
    For ``primary = torch.nn.Sequential(a, torch.nn.ReLU(), b)`` with two generated layers a and b it equals::

        z = trunk(cond)
        y = b(torch.relu(a(x, z)), z)

    A primary may contain other Hypernetworks. The layers of an inner primary take the inner z; the layers of an inner
    trunk take the outer z. So it is with an incidence.

    Args:
        trunk: maps cond to z, ``(B, R)``, or to a dict with one z for each generated layer of the primary. The keys
            are the names in ``primary.named_modules()``, with or without the parts that wrappers add, such as
            ``_checkpoint_wrapped_module``; a layer with several names has one z, under any of its names.
            For a HyperLinear there may be a z for each parameter: ``"fc.weight"`` and ``"fc.bias"``, or ``"fc"`` for
            both, and ``"fc.bias"`` for the bias alone.
        primary: the network, with at least one generated layer, such as a HyperLinear. Its other parameters are
            ordinary parameters, shared by all instances; the repr of the Hypernetwork lists them.
        repeat_z: if True, a layer may have k·B rows for B rows of z: k consecutive rows of an instance meet its z. So
            it is in networks that fold windows, heads or beams into the batch; k may differ between layers.

    Shape:
        - x: the input of the primary. Where it reaches a generated layer, its first dimension is B, with ``repeat_z``
          a multiple of B.
        - cond: the input of the trunk.
        - Output: the output of the primary.

    With an incidence, rows of x meet rows of z as it says. For ragged points, the nodes of many graphs in one list,
    that is ``Incidence.from_batch(ids)``: x and the results of all layers are ``(E, *)``, z is ``(C, R)``. An incidence
    with sources or targets holds for every layer, too: the result of a layer has a row for each target, and the next
    layer takes these rows as its sources.

    Raises:
        TypeError: the trunk or the primary is not a module.
        ValueError: the primary has no generated layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fasthyper.nn import Hypernetwork, hyperize
        >>> primary = hyperize(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), cond_features=16)
        >>> model = Hypernetwork(nn.Linear(5, 16), primary)
        >>> model(torch.randn(32, 100, 2), torch.randn(32, 5)).shape
        torch.Size([32, 100, 1])
    """

    repeat_z: bool = False
    __prepare_scriptable__ = refuse_script
    _places: list[Place] | None = None

    def __init__(self, trunk: nn.Module, primary: nn.Module, *, repeat_z: bool = False) -> None:
        super().__init__()
        for name, module in (("trunk", trunk), ("primary", primary)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} must be an nn.Module, got a {type(module).__name__}")
        self.trunk = trunk
        self.primary = primary
        self.repeat_z = repeat_z
        if next(_generated_layers(primary), None) is None:
            raise ValueError(
                f"primary must have a HyperLinear that z reaches, got a {type(primary).__name__} with none: "
                "z would have no effect. hyperize converts nn.Linears to HyperLinears; those in the primary of an "
                "inner Hypernetwork take its z."
            )
        self._show_arguments()

    def forward(
        self, x: Any = ..., cond: Any = ..., *args: Any, incidence: Incidence | None = None, **kwargs: Any
    ) -> Any:
        """Compute ``z = trunk(cond)`` and return ``primary(x, *args, **kwargs)`` with the weights that z generates.

        Args:
            x: the input of the primary. Where it reaches a HyperLinear, its first dimension is B. It may be passed by
                its name in the primary instead, such as ``input_ids``.
            cond: the input of the trunk.
            *args: passed to the primary after x.
            incidence: which rows of x, z and the result belong to each term of a sum, for every HyperLinear of the
                primary that takes its z from here.
            **kwargs: passed to the primary. The signature of an instance shows their names.

        Returns:
            The output of the primary.

        Raises:
            TypeError: there is no cond, the trunk returns neither a tensor nor a dict of tensors, or the incidence is
                of another type.
            ValueError: the trunk returns a dict whose keys are not the names of the primary's HyperLinears, or the
                incidence does not fit the sizes of a layer.
        """
        if cond is ...:
            raise TypeError("forward() misses cond, the input of the trunk")
        if proxy_of(x, cond) is not None:
            return record_network(self, x, cond, args, incidence, kwargs)
        check_delivery(incidence, self.repeat_z)
        z = self._z(cond)
        if x is ...:
            with deliver(z, incidence, self.repeat_z):
                return tied(self.primary(**kwargs))
        if (
            isinstance(z, Tensor)
            and not (args or kwargs or self.repeat_z)
            and incidence is None
            and may_fuse(x)
            and (layers := fusable_layers(self.primary))
        ):
            return in_instances(lambda x, z: hyper_primary(x, z, *layers), x, z, repeat=False)
        with deliver(z, incidence, self.repeat_z):
            return tied(self.primary(x, *args, **kwargs))

    @contextmanager
    def deliver(self, cond: Any, *, incidence: Incidence | None = None) -> Iterator[nn.Module]:
        """Run the trunk once, and deliver z to the layers of the primary inside the ``with`` block.

        For methods of the primary other than forward, and for many calls with one z. See :func:`fasthyper.deliver`.

        Args:
            cond: the input of the trunk.
            incidence: as for :meth:`forward`.

        Yields:
            The primary.

        Raises:
            TypeError: as for :meth:`forward`.
            ValueError: as for :meth:`forward`.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from fasthyper.nn import Hypernetwork, hyperize
            >>> primary = hyperize(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), cond_features=16)
            >>> model, cond = Hypernetwork(nn.Linear(5, 16), primary), torch.randn(32, 5)
            >>> with model.deliver(cond) as primary:
            ...     steps = [primary(torch.randn(32, 2)) for _ in range(10)]
            >>> steps[0].shape
            torch.Size([32, 1])
        """
        check_delivery(incidence, self.repeat_z)
        with deliver(self._z(cond), incidence, self.repeat_z):
            yield self.primary

    def merged(self, cond: Any) -> nn.Module:
        """Return an ordinary network: a copy of the primary with the weights that one instance's cond generates.

        Every generated layer that takes its z from here is an ordinary one there, such as an
        :class:`torch.nn.Linear`, so that the copy is called without a cond and has the state dict of a network that
        was never generated. Layers that share their weights and their z still share them. The trunk runs once, without
        gradients, in the mode that it is in: call ``eval()`` before where it has dropout.

        The layers of the primary of an inner Hypernetwork stay as they are, because their z depends on the input. A
        layer that the primary calls with a z of its own has no weights without it: the copy raises when it runs.

        Args:
            cond: the input of the trunk for one instance, which makes a z of ``(R,)`` or ``(1, R)``.

        Returns:
            The copy, with parameters of its own.

        Raises:
            TypeError: the trunk returns neither a tensor nor a dict of tensors, or a z of another dtype.
            ValueError: z is not that of one instance, or a generated layer has hooks, a forward of its own, or no
                ordinary counterpart.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from fasthyper.nn import Hypernetwork, hyperize
            >>> primary = hyperize(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), cond_features=16, rank=2)
            >>> model, x, cond = Hypernetwork(nn.Linear(5, 16), primary), torch.randn(1, 100, 2), torch.randn(1, 5)
            >>> network = model.merged(cond)
            >>> list(network.state_dict())
            ['0.weight', '0.bias', '2.weight', '2.bias']
            >>> torch.allclose(network(x), model(x, cond), atol=1e-5)
            True
        """
        with torch.no_grad():
            z = self._z(cond)
        z_of = z.__getitem__ if isinstance(z, dict) else lambda _: z
        return merged_copy(self.primary, _generated_layers(self.primary), z_of)

    def _z(self, cond: Any) -> Any:
        """Return the z of all layers, or a dict with the z of each layer."""
        z = self.trunk(cond)
        if isinstance(z, dict):
            return self._z_by_layer(z)
        if not isinstance(z, Tensor):
            raise TypeError(f"trunk must return a tensor or a dict of tensors, got a {type(z).__name__}")
        return z

    def _z_by_layer(self, z: dict[str, Tensor]) -> dict[nn.Module, Any]:
        # Not cached, because the modules may be replicas, or may have been replaced since the last call.
        layers = dict(_generated_layers(self.primary))
        by_name = {**dict(_generated_layers(self.primary, with_wrappers=True)), **layers}
        known: dict[tuple[nn.Module, str], Tensor] = {}  # by layer, and parameter or "" for all
        for name, value in z.items():
            owner, _, parameter = name.rpartition(".")
            if not isinstance(value, Tensor):
                raise TypeError(f"trunk must return tensors, got a {type(value).__name__} for {name!r}")
            if name in by_name:
                key = by_name[name], ""
            elif parameter in ("weight", "bias") and isinstance(by_name.get(owner), HyperLinear):
                key = by_name[owner], parameter
            else:
                raise ValueError(f"trunk returned a z for {name!r}; the primary's HyperLinears are {list(layers)}")
            if key in known:
                raise ValueError(f"trunk returned a second z for {name!r}, a layer that has several names")
            known[key] = value
        by_layer: dict[nn.Module, Any] = {layer: _z_of_layer(layer, known) for layer in layers.values()}
        missing = [name for name, layer in layers.items() if by_layer[layer] is None]
        if missing:
            raise ValueError(f"trunk returned no z for {missing}, only for {list(z)}")
        return by_layer

    @classmethod
    def from_flat_head(
        cls,
        head: nn.Linear,
        primary: nn.Module,
        order: Order = "layers",
        *,
        layout: str | None = None,
        chunks: Tensor | nn.Embedding | int | None = None,
        trunk: nn.Module | None = None,
        repeat_z: bool = False,
    ) -> Hypernetwork:
        """Create a Hypernetwork from a head that computes all parameters of a network as one flat vector.

        Args:
            head: a ``torch.nn.Linear(R, P)``, where P is the number of the primary's parameters. Its bias becomes the
                bases.
            primary: the network, whose parameters the vector has; it is not changed, and their values do not matter.
                All its parameters must be those of layers that :func:`~fasthyper.nn.hyperize` can generate.
            order: which part of the vector each parameter is: ``"layers"`` as in ``primary.named_parameters()``, so
                that the bias of a layer follows its weight; ``"weights_first"``, all weights and then all biases; or a
                list of all names, or of pairs (name, layout).
            layout: how weights are viewed: ``"oi"`` as ``(O, I)``, or ``"io"`` as ``(I, O)``; for those to which
                ``order`` gives no layout of their own. It must be given where both would fit.
            chunks: for a head that computes one chunk of the vector at a time, the embeddings of the chunks,
                ``(C, E)``: a ``torch.nn.Embedding(C, E)``, a parameter or a tensor. The head is then a
                ``torch.nn.Linear(R + E, K)``, whose input is z and the embedding, side by side. The C chunks are one
                after the other, and what exceeds P is cut off. If the trunk has seen the embeddings, pass the number of
                chunks, C: the trunk then returns ``(B, C, R)``, and the head is a ``torch.nn.Linear(R, K)``. All layers
                of the primary are Linears.
            trunk: maps cond to the input of the head, z. None means that cond is z.
            repeat_z: as in the constructor.

        Returns:
            A Hypernetwork. The parameters of its generated layers are copies of the head's rows, frozen where these
            are: the head itself does not change with them. With ``chunks``, the head becomes a submodule, from which a
            call computes the head of each layer, (O, I, R), and so does an Embedding: a module that has them, too,
            shares them through copies, conversions and checkpoints. Embeddings that are a parameter are shared as
            parameters are: a move from the meta device makes two of them. Those that are a tensor are copied, into a
            buffer.

        Raises:
            TypeError: ``head`` is not a plain :class:`torch.nn.Linear`, see :meth:`HyperLinear.from_head
                <fasthyper.nn.HyperLinear.from_head>`, or ``chunks`` not a plain :class:`torch.nn.Embedding`,
                without options such as ``padding_idx``, or they have another dtype than the head.
            ValueError: the head does not compute P numbers, ``order`` does not name each parameter once, ``layout`` is
                unknown, or missing where both would fit, a parameter of the primary cannot be generated, or the chunks
                are on another device than the head.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from fasthyper.nn import Hypernetwork
            >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
            >>> head = nn.Linear(16, 33)
            >>> model = Hypernetwork.from_flat_head(head, net, layout="oi")
            >>> x, z = torch.randn(5, 100, 2), torch.randn(5, 16)
            >>> W1, b1, W2, b2 = head(z).split([16, 8, 8, 1], 1)  # the code before
            >>> hidden = torch.relu(x @ W1.view(5, 8, 2).mT + b1[:, None])
            >>> torch.allclose(model(x, z), hidden @ W2.view(5, 1, 8).mT + b2[:, None], atol=1e-5)
            True
        """
        generated, places = primary_of_flat_head(head, primary, order, layout, chunks)
        model = cls(nn.Identity() if trunk is None else trunk, generated, repeat_z=repeat_z)
        model._places = places
        return model

    def to_flat_head(self) -> nn.Linear:
        """Return the flat head of a Hypernetwork that :meth:`from_flat_head` made, as a copy.

        Returns:
            A ``torch.nn.Linear(R, P)`` with the rows in the order of the import; its state dict is the checkpoint that
            the code before can load. A chunked head becomes one without chunks.

        Raises:
            ValueError: the Hypernetwork does not come from :meth:`from_flat_head`, or each chunk has a z of its own.
        """
        return flat_head_of(self.primary, self._flat_places())

    def load_flat_head(self, state: Mapping[str, Tensor]) -> None:
        """Load a checkpoint of the flat head into a Hypernetwork that :meth:`from_flat_head` made.

        Args:
            state: the state dict of the ``torch.nn.Linear(R, P)``: ``weight``, and ``bias`` if it has one.

        Raises:
            ValueError: the Hypernetwork does not come from :meth:`from_flat_head` or has a chunked head, whose
                parameters are its own, or an entry is missing or has another shape.
        """
        places = self._flat_places()
        if any(isinstance(module, SharedHead) for module in self.primary.modules()):
            raise ValueError("the parameters of a chunked head are its own: load the checkpoint into the head")
        load_rows(self.primary, places, state)

    def _flat_places(self) -> list[Place]:
        if self._places is None:
            raise ValueError("this Hypernetwork has no flat head: Hypernetwork.from_flat_head did not make it")
        return self._places

    def extra_repr(self) -> str:
        names = ungenerated(self.primary)
        more = f", … ({len(names)} in all)" if len(names) > _MAX_LISTED else ""
        return f"ungenerated: {', '.join(names[:_MAX_LISTED]) or 'none'}{more}"


def _z_of_layer(layer: Any, known: dict[tuple[nn.Module, str], Tensor]) -> Any:
    """Return one z, a pair for the weight and the bias, or None if one is missing."""
    whole, weight, bias = (known.get((layer, parameter)) for parameter in ("", "weight", "bias"))
    if weight is None and bias is None:
        return whole
    if bias is None and layer._own("bias") is None:
        return weight
    weight, bias = whole if weight is None else weight, whole if bias is None else bias
    return None if weight is None or bias is None else (weight, bias)


def _generated_layers(
    module: nn.Module, prefix: str = "", with_wrappers: bool = False
) -> Iterator[tuple[str, GeneratedLayer]]:
    """Yield the layers that take z, by each of their names: not those in an inner Hypernetwork's primary.

    The names are those without wrappers such as torch.compile's, or with them as in ``named_modules()``.
    """
    if isinstance(module, GeneratedLayer):
        yield prefix, module
    for name, child in module._modules.items():
        if child is None or (isinstance(module, Hypernetwork) and name == "primary"):
            continue
        if not with_wrappers and is_inside(module, name):
            yield from _generated_layers(child, prefix)
        else:
            yield from _generated_layers(child, f"{prefix}.{name}" if prefix else name, with_wrappers)
