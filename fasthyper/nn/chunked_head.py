"""A head that computes a flat vector in chunks, each with an embedding of its own, and the layers that take from it."""

from __future__ import annotations

from torch import Tensor, nn

from fasthyper.nn.generated import SharedHead
from fasthyper.nn.heads import Place
from fasthyper.nn.linear import HyperLinear


class ChunkedHead(SharedHead):
    """One head for all chunks of a flat vector. Chunk c is `weight @ [z, chunks[c]] + bias`.

    The part of the embedding does not depend on z: it is the base of the chunk, and what z generates is the same in
    each chunk.

    Args:
        head: an `nn.Linear(R + E, K)`, whose parameters become those of this module.
        chunks: an embedding for each chunk, `(C, E)`.
    """

    weight: Tensor
    bias: Tensor | None
    chunks: Tensor

    def __init__(self, head: nn.Linear, chunks: Tensor) -> None:
        super().__init__()
        if not isinstance(chunks, Tensor) or chunks.dim() != 2 or chunks.shape[1] > head.in_features:
            got = tuple(chunks.shape) if isinstance(chunks, Tensor) else type(chunks).__name__
            raise ValueError(
                f"chunks must be a tensor (C, E) with at most the {head.in_features} in_features of the head, got {got}"
            )
        self.weight = head.weight
        self.register_parameter("bias", head.bias)
        if isinstance(chunks, nn.Parameter):
            self.register_parameter("chunks", chunks)
        else:
            self.register_buffer("chunks", chunks)
        self.in_features = head.in_features - chunks.shape[1]
        self.out_features = chunks.shape[0] * head.out_features

    def rows(self, place: Place) -> Tensor:
        """Return the rows of z of a parameter, `(*shape, R)`."""
        size = self.weight.shape[0]
        repeated = self.weight[:, : self.in_features].repeat(-(-(place.start % size + place.count) // size), 1)
        return place.view(repeated[place.start % size :][: place.count])

    def base(self, place: Place) -> Tensor:
        """Return the base of a parameter, `shape`."""
        size = self.weight.shape[0]
        first, last = place.start // size, -(-place.stop // size)
        base = self.chunks[first:last] @ self.weight[:, self.in_features :].T
        if self.bias is not None:
            base = base + self.bias
        return place.view(base.flatten()[place.start - first * size :][: place.count])


class ChunkedLinear(HyperLinear):
    """A HyperLinear whose parameters are computed from a chunked head at each call."""

    head: ChunkedHead
    places: dict[str, Place]

    def _of(self, name: str) -> Tensor | None:
        place = self.places.get(name.removeprefix("base_"))
        if place is None:
            return None
        return self.head.base(place) if name.startswith("base_") else self.head.rows(place)

    weight = property(lambda self: self._of("weight"))
    bias = property(lambda self: self._of("bias"))
    base_weight = property(lambda self: self._of("base_weight"))
    base_bias = property(lambda self: self._of("base_bias"))

    def reset_parameters(self, *args: object, **kwargs: object) -> None:
        raise TypeError("a layer of a chunked head has no parameters of its own: initialise the head")


def take_from(head: ChunkedHead, root: nn.Module, place: Place) -> None:
    """Make a generated parameter and its base those that a chunked head computes."""
    owner, _, attribute = place.name.rpartition(".")
    layer = root.get_submodule(owner)
    if type(layer) is HyperLinear:
        layer._parameters.clear()
        layer.__class__ = ChunkedLinear
        layer.head = head
        layer.places = {}  # type: ignore[assignment]
    if not isinstance(layer, ChunkedLinear):
        raise ValueError(f"chunks generate nn.Linears alone, not {place.name!r} of a {type(layer).__name__}")
    layer.places[attribute] = place
