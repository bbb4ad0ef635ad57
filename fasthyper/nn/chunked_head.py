"""A head that computes a flat vector in chunks, each with an embedding of its own, and the layers that take from it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthyper.incidence import Incidence
from fasthyper.nn.generated import PARAMETERS, SharedHead
from fasthyper.nn.heads import Place, check_new_head, load_as_chunks, name_of, refuse_deletion
from fasthyper.nn.linear import HyperLinear
from fasthyper.nn.plain_linear import why_not_plain


class ChunkedHead(SharedHead):
    """One head for all chunks of a flat vector.

    With embeddings, chunk c is `weight @ [z, embeddings[c]] + bias`. The part of the embedding does not depend on z: it
    is the base of the chunk, and what z generates is the same in each chunk. With a number of chunks, z has a row for
    each of them, and chunk c is `weight @ z[:, c] + bias`.

    The head becomes a submodule, and so does an `nn.Embedding`: what has them under other names, too, shares them
    through copies, conversions and checkpoints.

    Args:
        head: an `nn.Linear(R + E, K)`.
        chunks: an embedding for each chunk, `(C, E)`, or the number of chunks, C; E is then 0.
    """

    head: nn.Linear
    chunks: Tensor | nn.Embedding | None

    def __init__(self, head: nn.Linear, chunks: Tensor | nn.Embedding | int) -> None:
        super().__init__()
        self.head = head
        if isinstance(chunks, int) and chunks > 0:
            self.chunks = None
            self.in_features, self.out_features = head.in_features, chunks * head.out_features
            return
        _check_options(chunks, "chunks")
        embeddings = chunks.weight if isinstance(chunks, nn.Embedding) else chunks
        if not isinstance(embeddings, Tensor) or embeddings.dim() != 2 or embeddings.shape[1] > head.in_features:
            got = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(chunks).__name__
            raise ValueError(
                "chunks must be a number, an nn.Embedding or a tensor (C, E) with at most the "
                f"{head.in_features} in_features of the head, got {got}"
            )
        _check_kind(embeddings, head.weight, "chunks")
        if isinstance(chunks, (nn.Module, nn.Parameter)):
            self.chunks = chunks
        else:
            self.register_buffer("chunks", embeddings.detach().clone())
        self.in_features = head.in_features - embeddings.shape[1]
        self.out_features = embeddings.shape[0] * head.out_features

    def __setattr__(self, name: str, value: Any) -> None:
        if "out_features" in self.__dict__ and "_is_replica" not in self.__dict__:
            if name == "head":
                check_new_head(self, value, tuple(self.weight.shape), self.weight.dtype)
            if name == "chunks":
                self._check_new_chunks(value)
                if isinstance(value, nn.Module):  # torch puts a parameter in the place of a module, but not the reverse
                    self._parameters.pop("chunks", None)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name == "head":
            refuse_deletion(self)
        super().__delattr__(name)

    def _check_new_chunks(self, chunks: Any) -> None:
        weight, new = self.weight, chunks.weight if isinstance(chunks, nn.Embedding) else chunks
        name, shape = f"chunks of {name_of(self)}", self._shape_of_chunks()
        if shape is None:
            if chunks is not None:
                raise TypeError(f"{name} must be None, got {type(chunks).__name__}")
            return
        if not isinstance(new, Tensor):
            raise TypeError(f"{name} must be an nn.Embedding or a tensor {shape}, got {type(chunks).__name__}")
        _check_options(chunks, name)
        if tuple(new.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(new.shape)}")
        is_trained = "chunks" in self._parameters or "chunks" in self._modules
        if is_trained and not isinstance(chunks, (nn.Module, nn.Parameter)):
            raise TypeError(f"{name} must be an nn.Embedding or an nn.Parameter {shape}, got {type(chunks).__name__}")
        _check_kind(new, weight, name)

    def _shape_of_chunks(self) -> tuple[int, int] | None:
        """Return the shape of the embeddings, also while there are none; None where each chunk has a z of its own."""
        rows, features = self.weight.shape
        if features == self.in_features and getattr(self, "chunks", None) is None:
            return None
        return self.out_features // rows, features - self.in_features

    @property
    def weight(self) -> Tensor:
        """The weight of the head, `(K, R + E)`."""
        return self.head.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the head, `(K,)`, or None."""
        return self.head.bias

    @property
    def embeddings(self) -> Tensor | None:
        """The embeddings of the chunks, `(C, E)`, or None."""
        return self.chunks.weight if isinstance(self.chunks, nn.Embedding) else self.chunks

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        load_as_chunks(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def span(self, place: Place) -> slice:
        """Return the chunks in which a parameter stands."""
        size = self.weight.shape[0]
        return slice(place.start // size, -(-place.stop // size))

    def rows(self, place: Place) -> Tensor:
        """Return the rows of z of a parameter, `(*shape, R)`; for z of its chunks side by side, with these zeros."""
        size = self.weight.shape[0]
        flat = torch.arange(place.start, place.stop, device=self.weight.device)
        rows = self.weight[:, : self.in_features].index_select(0, flat % size)
        if self.embeddings is None:
            span = self.span(place)
            is_chunk = F.one_hot(flat // size - span.start, span.stop - span.start).to(rows.dtype)
            rows = (is_chunk.unsqueeze(2) * rows.unsqueeze(1)).flatten(1)
        return place.view(rows)

    def base(self, place: Place) -> Tensor | None:
        """Return the base of a parameter, `shape`."""
        size, span = self.weight.shape[0], self.span(place)
        if (embeddings := self.embeddings) is None:
            if self.bias is None:
                return None
            base = self.bias.expand(span.stop - span.start, -1)
        else:
            base = F.linear(embeddings[span], self.weight[:, self.in_features :], self.bias)
        return place.view(base.flatten()[place.start - span.start * size :][: place.count])


def _check_options(chunks: Any, name: str) -> None:
    """Check that an nn.Embedding is its weight and no more."""
    if not isinstance(chunks, nn.Embedding):
        return
    for option in ("padding_idx", "max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(chunks, option) is not None and getattr(chunks, option) is not False:
            raise TypeError(f"{name} cannot be converted: its {option} would have no effect")
    if problem := why_not_plain(chunks, nn.Embedding):
        raise TypeError(f"{name} cannot be converted: {problem}")


def _check_kind(embeddings: Tensor, weight: Tensor, name: str) -> None:
    """Check that embeddings have the dtype and the device of the weight of their head."""
    got = f"got {tuple(embeddings.shape)}"
    if embeddings.dtype != weight.dtype:
        raise TypeError(f"{name} must have the dtype of the head, {weight.dtype}, {got} of {embeddings.dtype}")
    if embeddings.device != weight.device:
        raise ValueError(f"{name} must be on the device of the head, {weight.device}, {got} on {embeddings.device}")


class ChunkedLinear(HyperLinear):
    """A HyperLinear whose parameters are computed from a chunked head at each call."""

    head: ChunkedHead

    def _check_new_head(self, head: Any) -> None:
        old = self.head
        if not isinstance(head, ChunkedHead):
            raise TypeError(f"head of {name_of(self)} must be a ChunkedHead, got {type(head).__name__}")
        check_new_head(self, head.head, tuple(old.weight.shape), old.weight.dtype)
        sizes = [(of.in_features, of.out_features) for of in (old, head)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"head of {name_of(self)} must have (in_features, out_features) {sizes[0]}, got {sizes[1]}"
            )

    def _taken(self, name: str) -> Tensor | None:
        place = self.places.get(name.removeprefix("base_"))
        if place is None:
            return None
        return self.head.base(place) if name.startswith("base_") else self.head.rows(place)

    def _all_taken(self) -> list[Tensor | None]:
        return [self._taken(name) for name in PARAMETERS]

    def _z_of(self, z: Any) -> Any:
        """Return z of the chunks in which weight and bias stand, side by side, if each chunk has its own."""
        if self.head.chunks is not None:
            return z
        size = self.head.out_features // self.head.weight.shape[0], self.head.in_features
        if not isinstance(z, Tensor) or z.dim() != 3 or z.shape[1:] != size:
            got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"z must be (B, C, R) with (C, R) = {size}, a row for each chunk, got {got}")
        names = [name for name in ("weight", "bias") if name in self.places]
        parts = [z[:, self.head.span(self.places[name])].flatten(1) for name in names]
        return parts[0] if len(parts) == 1 else tuple(parts)

    def _run(self, x: Tensor, z: Any, incidence: Incidence | None, reduce: str) -> Tensor:
        return super()._run(x, self._z_of(z), incidence, reduce)

    def materialize(self, z: Any) -> tuple[Tensor, Tensor | None]:
        return super().materialize(self._z_of(z))

    def merged(self, z: Any) -> nn.Linear:
        if self.head.chunks is None and isinstance(z, Tensor):
            z = self._z_of(z.unsqueeze(0) if z.dim() == 2 else z)
        return super().merged(z)

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
        layer.places = {}
    if not isinstance(layer, ChunkedLinear):
        raise ValueError(f"chunks generate nn.Linears alone, not {place.name!r} of a {type(layer).__name__}")
    layer.places[attribute] = place
    if attribute == "weight" and head.chunks is None:
        layer.cond_features = head.in_features * (head.span(place).stop - head.span(place).start)
