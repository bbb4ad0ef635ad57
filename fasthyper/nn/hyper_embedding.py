"""`HyperEmbedding`: a table of embeddings that is generated from z, of which only the rows in use are formed."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthyper import planner
from fasthyper.incidence import Incidence
from fasthyper.nn.generated import GeneratedLayer
from fasthyper.nn.init import INITS
from fasthyper.nn.linear import check_sizes
from fasthyper.nn.merge import with_parameters
from fasthyper.nn.rows import row_numbers
from fasthyper.nn.tracing import is_proxy, recorded
from fasthyper.ops import autocast, shapes
from fasthyper.ops.register import transformed


class HyperEmbedding(GeneratedLayer):
    """An embedding whose table is generated from z for each instance, and never formed as a whole.

    ``y[b, n] = weight[id]·z[b] + base_weight[id]``, where ``id = ids[b, n]``.

    Args:
        num_embeddings: the number of rows of the table, V.
        embedding_dim: the features of a row, D.
        cond_features: the number of features of z, R.
        base: if True, learn a table that all instances share; the generated one is added to it.
        padding_idx: an id whose row is not generated: it stays that of the base, without a gradient.
        init: ``"hyperfan_in"`` or ``"hyperfan_out"``: the generated rows have variance 1 if z has second moment 1, and
            the base is zero. ``"bias_hyper"``: the head is zero, and the base is normal with variance 1.
        device: the device of the parameters.
        dtype: the dtype of the parameters.

    Shape:
        - ids: ``(B, *)``, int64 or int32.
        - z: ``(B, R)``.
        - Output: ``(B, *, D)``.

    Attributes:
        weight: the head, ``(V, D, R)``.
        base_weight: the shared table, ``(V, D)``, or None.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is negative, ``padding_idx`` is out of range, ``init`` is unknown, or it is
            ``"bias_hyper"`` without a base.

    Example:
        >>> import torch
        >>> from fasthyper.nn import HyperEmbedding
        >>> layer = HyperEmbedding(100, 8, cond_features=16)
        >>> layer(torch.randint(100, (4, 10)), torch.randn(4, 16)).shape
        torch.Size([4, 10, 8])
    """

    weight: nn.Parameter
    bias: None
    base_weight: nn.Parameter | None
    base_bias: None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        cond_features: int,
        base: bool = True,
        padding_idx: int | None = None,
        init: str = "hyperfan_in",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(num_embeddings=num_embeddings, embedding_dim=embedding_dim, cond_features=cond_features)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"padding_idx must be an id of {num_embeddings} embeddings, got {padding_idx}")
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.cond_features = cond_features
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.init = init

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight = parameter(num_embeddings, embedding_dim, cond_features)
        self.register_parameter("base_weight", parameter(num_embeddings, embedding_dim) if base else None)
        self.register_parameter("bias", None)
        self.register_parameter("base_bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters again, as ``init`` says."""
        if self.init not in INITS:
            raise ValueError(f"init must be one of {', '.join(map(repr, INITS))}, got {self.init!r}")
        zero = self.init == "bias_hyper"
        if zero and self.base_weight is None:
            raise ValueError("init 'bias_hyper' starts from the base: it needs base=True")
        bound = 0 if zero else math.sqrt(3 / max(1, self.cond_features))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.base_weight is not None:
            nn.init.normal_(self.base_weight, std=float(zero))
            if self.padding_idx is not None:
                with torch.no_grad():
                    self.base_weight[self.padding_idx].zero_()

    def forward(self, ids: Tensor, z: Tensor | None = None, incidence: Incidence | None = None) -> Tensor:
        """Return the rows of each instance's table.

        Args:
            ids: ``(B, *)``, int64 or int32; with an incidence ``(E, *)``.
            z: ``(B, R)``; with an incidence ``(C, R)``. If None, the z of the running Hypernetwork.
            incidence: which row of z each row of ids meets; it has neither sources nor targets.

        Returns:
            ``(B, *, D)``.

        Raises:
            TypeError: ids are not int64 or int32, or the dtypes differ.
            ValueError: the sizes do not fit, or z is None outside of a Hypernetwork.
        """
        z, incidence, repeat = self._condition(z, incidence)
        if is_proxy(ids):
            return recorded(self, ids, *self._to_record(z, incidence, repeat))
        self._check(z)
        shapes.check_dense("ids", ids)
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"ids must be a tensor of int64 or int32, got {ids.dtype}")
        if ids.dim() == 0:
            raise ValueError("ids must have shape (B, *), got ()")
        rows = row_numbers(ids, z.shape[0], incidence, repeat)
        rows = rows.view(-1, *(1,) * (ids.dim() - 1)).expand_as(ids)
        with autocast.off(z):  # as nn.Embedding, which returns the dtype of its table
            head = self._own("weight")
            y = generated_rows(ids.flatten(), rows.flatten(), z.to(head.dtype), head)
        y = y.unflatten(0, ids.shape)
        if self.padding_idx is not None:
            y = y.masked_fill((ids == self.padding_idx).unsqueeze(-1), 0)
        if self.base_weight is not None:
            y = y + F.embedding(ids, self.base_weight, self.padding_idx)
        return y

    def merged(self, z: Tensor) -> nn.Embedding:
        """Return an ordinary embedding with the table of one instance, base included.

        Args:
            z: ``(R,)`` or ``(1, R)``.

        Returns:
            A layer with parameters of its own.

        Raises:
            TypeError: z has another dtype than the parameters.
            ValueError: z is not that of one instance.
        """
        z = self._one(z)
        with torch.no_grad(), autocast.off(z):
            table = F.linear(z, self._own("weight").flatten(0, 1)).view(self.num_embeddings, self.embedding_dim)
            if self.padding_idx is not None:
                table[self.padding_idx] = 0
            table = table if self.base_weight is None else table + self.base_weight
        plain = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        return with_parameters(plain, self.training, weight=table)

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, cond_features={self.cond_features}, "
            f"base={self.base_weight is not None}, padding_idx={self.padding_idx}"
        )


def generated_rows(ids: Tensor, rows: Tensor, z: Tensor, head: Tensor) -> Tensor:
    """Return `head[ids[m]]·z[rows[m]]` for every m, `(M, D)`.

    Args:
        ids: rows of the head, `(M,)`.
        rows: rows of z, `(M,)`.
        z: `(B, R)`.
        head: `(V, D, R)`.
    """
    # A compiler fuses the product with the gather. Under a transform the rule of the chunks would be missing.
    if torch.compiler.is_compiling() or transformed():
        return _all_at_once(ids, rows, z, head)
    return _InChunks.apply(ids, rows, z, head)


def _all_at_once(ids: Tensor, rows: Tensor, z: Tensor, head: Tensor) -> Tensor:
    return (head[ids] * z[rows].unsqueeze(1)).sum(-1)


class _InChunks(torch.autograd.Function):
    """`_all_at_once` with the gathered rows of the head, (M, D, R), formed in chunks, in both directions."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, rows: Tensor, z: Tensor, head: Tensor) -> Tensor:
        ctx.save_for_backward(ids, rows, z, head)
        y = head.new_empty(ids.shape[0], head.shape[1])
        for m in _chunks(ids, head):
            y[m] = torch.bmm(head[ids[m]], z[rows[m]].unsqueeze(2)).squeeze(2)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        ids, rows, z, head = ctx.saved_tensors
        need_z, need_head = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # a second derivative will be taken: the gradients must be differentiable
            dz = torch.zeros_like(z).index_add(0, rows, (head[ids] * g.unsqueeze(2)).sum(1)) if need_z else None
            outer = g.unsqueeze(2) * z[rows].unsqueeze(1) if need_head else None
            return None, None, dz, None if outer is None else torch.zeros_like(head).index_add(0, ids, outer)
        dz = torch.zeros_like(z) if need_z else None
        dhead = torch.zeros_like(head, memory_format=torch.contiguous_format) if need_head else None
        for m in _chunks(ids, head):
            if dz is not None:
                dz.index_add_(0, rows[m], torch.bmm(g[m].unsqueeze(1), head[ids[m]]).squeeze(1))
            if dhead is not None:
                dhead.index_add_(0, ids[m], g[m].unsqueeze(2) * z[rows[m]].unsqueeze(1))
        return None, None, dz, dhead


def _chunks(ids: Tensor, head: Tensor) -> list[slice]:
    """Return slices of the M terms whose rows of the head take at most a quarter of the workspace."""
    row = max(1, head.shape[1] * head.shape[2] * head.element_size())
    size = max(1, planner.get_workspace_limit() // 4 // row)
    return [slice(m, m + size) for m in range(0, ids.shape[0], size)]
