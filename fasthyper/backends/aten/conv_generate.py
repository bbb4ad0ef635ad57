"""Generated convolutions, `generate`: the kernels of some instances at a time, W[b] = Σ_r H[...,r] z[b,r] + W0.

    y[b]  = conv(x[b], W[b]) + bias·z[b] + b0
    dW[b] = the gradient of W[b]      dz[b] = Σ dW[b] H      dH = Σ_b dW[b] ⊗ z[b]      dW0 = Σ_b dW[b]

The kernels of a chunk, (instances, outputs), stay in cache between the product that makes them and the one that reads
them. A backend with its own products of an instance's kernel passes them in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from ...geometry import Geometry
from . import conv_products
from .tiling import Head, Sum, Tiling, accumulate, blocks, put

_FEW_FEATURES = 16


class Products(Protocol):
    """The functions of `conv_products`."""

    def convolve(self, x: Tensor, w: Tensor, shift: Tensor | None, y: Tensor, geo: Geometry) -> None: ...

    def spread(self, g: Tensor, w: Tensor, shift: Tensor | None, x: Tensor, geo: Geometry) -> None: ...

    def kernels(self, x: Tensor, g: Tensor, w: Tensor, geo: Geometry) -> None: ...


class Piece(NamedTuple):
    """Some outputs of a convolution, and the channels of the image that they read: whole groups, or a part of one."""

    outputs: slice
    channels: slice
    geometry: Geometry
    first: bool  # of the pieces that share these channels


def _is_matrix(weight: Tensor) -> bool:
    """Return whether H is a view of a matrix (O·I·taps, R)."""
    try:
        weight.view(math.prod(weight.shape[:-1]), weight.shape[-1])
    except RuntimeError:
        return False
    return True


def _has_few_features(shape: Sequence[int], dtype: torch.dtype, tiling: Tiling) -> bool:
    """Return whether a copy of a head with R first pays, and fits beside one of its gradient and a tile.

    A product whose rows or columns are a few features is several times faster if they are not the fastest axis.
    """
    return dtype == tiling.dtype and 1 < shape[-1] <= _FEW_FEATURES and 2 * math.prod(shape) <= 3 * tiling.elements


def _features_first(weight: Tensor) -> Tensor:
    """Return H with R as the slowest axis in memory."""
    return weight.movedim(-1, 0).contiguous().movedim(0, -1)


class Sizes(NamedTuple):
    """How a call is cut: instances at a time, and outputs at a time."""

    instances: int
    outputs: int

    @classmethod
    def of(cls, B: int, O: int, K: int, R: int, weight: Tensor | None, geo: Geometry, tiling: Tiling) -> Sizes:
        """Return the cut that reads H and the images least often; each chunk of instances reads all of H."""
        image, output = geo.pixels
        per_instance = max(1, geo.groups * K // max(1, geo.taps) * image, O * output)
        most = max(1, min(B, tiling.elements // per_instance))
        room = tiling.elements // max(1, K * (1 if weight is None or _is_matrix(weight) else R))
        best: tuple[float, Sizes] | None = None
        instances = most
        while True:
            outputs = max(1, min(O, tiling.elements // max(1, K * instances), room))
            reads = -(-B // instances) * O * K * R + -(-O // outputs) * B * K * output
            if best is None or reads < best[0]:
                best = reads, cls(instances, outputs)
            if instances == 1:
                return best[1]
            instances = -(-instances // 2)

    def of_sums(self, O: int, each: int, tiling: Tiling) -> Sizes:
        """Return a cut with the same instances, in which a part of a head, `each` for an output, is at most a tile."""
        most = max(1, min(self.outputs, tiling.elements // max(1, each)))
        return self._replace(outputs=-(-O // -(-O // most)))

    def pieces(self, O: int, I: int, geo: Geometry) -> Iterator[Piece]:
        """Cut the outputs into whole groups, or each group into parts."""
        G, each = geo.groups, O // geo.groups
        if each <= self.outputs:
            for group in blocks(G, self.outputs // max(1, each)):
                g0, g1 = group.start, group.stop
                part = geo._replace(groups=g1 - g0)
                yield Piece(slice(g0 * each, g1 * each), slice(g0 * I, g1 * I), part, True)
            return
        for g in range(G):
            for o in blocks(each, self.outputs):
                outputs = slice(g * each + o.start, g * each + o.stop)
                yield Piece(outputs, slice(g * I, (g + 1) * I), geo._replace(groups=1), o.start == 0)


def apply(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base_weight: Tensor | None,
    base_bias: Tensor | None,
    y: Tensor,
    geo: Geometry,
    transposed: bool,
    tiling: Tiling,
    products: Products = conv_products,
) -> None:
    """Write y."""
    O, I, R = weight.shape[0], weight.shape[1], weight.shape[-1]
    weight = _features_first(weight) if _has_few_features(weight.shape, weight.dtype, tiling) else weight
    cut = Sizes.of(x.shape[0], O, I * geo.taps, R, weight, geo, tiling)
    for b in blocks(x.shape[0], cut.instances):
        shift = shift_of(z[b], bias, base_bias, tiling)
        of = z[b], weight, base_weight, shift, y[b], geo, cut, tiling, products
        (_spread if transposed else _convolve)(x[b], *of)


def _convolve(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    base_weight: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    geo: Geometry,
    cut: Sizes,
    tiling: Tiling,
    products: Products,
) -> None:
    """Write the convolution of some instances."""
    for piece in cut.pieces(weight.shape[0], weight.shape[1], geo):
        w = _generate(z, weight, base_weight, piece.outputs, tiling)
        part = _target(out[:, piece.outputs], tiling)
        of = None if shift is None else shift[:, piece.outputs]
        products.convolve(tiling.work(x[:, piece.channels]), w, of, part, piece.geometry)
        put(out[:, piece.outputs], part)
        del w, part  # before the next are allocated


def _spread(
    g: Tensor,
    z: Tensor,
    weight: Tensor,
    base_weight: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    geo: Geometry,
    cut: Sizes,
    tiling: Tiling,
    products: Products,
) -> None:
    """Write the transposed convolution of some instances; parts of a group are added up."""
    total = out
    for piece in cut.pieces(weight.shape[0], weight.shape[1], geo):
        w = _generate(z, weight, base_weight, piece.outputs, tiling)
        source = tiling.work(g[:, piece.outputs])
        if piece.first:
            of = None if shift is None else shift[:, piece.channels]
            total = _target(out[:, piece.channels], tiling)
            products.spread(source, w, of, total, piece.geometry)
        else:
            more = torch.empty_like(total)
            products.spread(source, w, None, more, piece.geometry)
            total += more
        put(out[:, piece.channels], total)
        del w


def grads(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    base_weight: Tensor | None,
    g: Tensor,
    dx: Tensor | None,
    dh: Tensor | None,
    mask: tuple[bool, ...],
    geo: Geometry,
    transposed: bool,
    tiling: Tiling,
    products: Products = conv_products,
) -> tuple[Tensor | None, ...]:
    """Write dx and dh if given; return dz, dbias, dW0 and db0 where the mask is set."""
    given, few = dh, dh is not None and _has_few_features(dh.shape, dh.dtype, tiling)
    if weight is not None and _has_few_features(weight.shape, weight.dtype, tiling):
        weight = _features_first(weight)
    if dh is not None and few:
        dh = dh.new_empty(dh.shape[-1], *dh.shape[:-1]).movedim(0, -1)
    call = _Gradients(x, z, weight, base_weight, g, mask, geo, transposed, tiling, products)
    sums = BiasSums(g, z, bias, call.R, mask, tiling)
    dw0 = x.new_empty(call.O, call.I, *geo.kernel, 1) if mask[4] else None
    heads = [(out, of) for out, of in ((dh, z), (dw0, None)) if out is not None]
    # in fewer bits, the sums of a whole head would be a copy of it in float32
    together = [pair for pair in heads if pair[0].dtype == tiling.sum_dtype or pair[0].numel() <= tiling.elements]
    totals = [([call.sum_of(h, piece) for piece in call.pieces(call.cut)], of) for h, of in together]
    apart = [pair for pair in heads if not any(pair is other for other in together)]
    # if all of dz fits a tile, it is summed with the first of the other heads, from the same dW
    later = bool(apart) and x.shape[0] * call.R <= tiling.elements
    starts: list[Tensor | None] = []
    for b in blocks(x.shape[0], call.cut.instances):
        dz = sums.add(b)
        if dx is not None:
            call.spread_back(b, dx)
        if totals or (mask[1] and not later):
            for k, piece in enumerate(call.pieces(call.cut)):
                call.add_kernels(b, piece, None if later else dz, [(each[k], of) for each, of in totals])
        if later:
            starts.append(dz)
        else:
            sums.put(b, dz)
    for total in (total for each, _ in totals for total in each):
        total.store()
    for nth, (head, of) in enumerate(apart):
        cut = call.cut.of_sums(head.shape[0], head[0].numel(), tiling)
        for piece in call.pieces(cut):
            total = call.sum_of(head, piece)
            for k, b in enumerate(blocks(x.shape[0], cut.instances)):
                call.add_kernels(b, piece, starts[k] if later and nth == 0 else None, [(total, of)])
            total.store()
    for b, dz in zip(blocks(x.shape[0], call.cut.instances), starts, strict=False):
        sums.put(b, dz)
    if given is not None and dh is not None and few:
        given.copy_(dh)
    dbias, db0 = sums.of_bias()
    return sums.dz, dbias, None if dw0 is None else dw0.squeeze(-1), db0


class _Gradients:
    """The steps of a backward for some instances."""

    def __init__(
        self,
        x: Tensor,
        z: Tensor | None,
        weight: Tensor | None,
        base_weight: Tensor | None,
        g: Tensor,
        mask: tuple[bool, ...],
        geo: Geometry,
        transposed: bool,
        tiling: Tiling,
        products: Products,
    ) -> None:
        self.z, self.weight, self.base_weight, self.mask = cast(Tensor, z), cast(Tensor, weight), base_weight, mask
        self.g, self.geo, self.transposed, self.tiling, self.products = g, geo, transposed, tiling, products
        self.image, self.output = (g, x) if transposed else (x, g)
        self.O, self.I = self.output.shape[1], self.image.shape[1] // geo.groups
        self.R = cast(Tensor, weight if z is None else z).shape[-1]
        self.cut = Sizes.of(x.shape[0], self.O, self.I * geo.taps, self.R, weight, geo, tiling)

    def pieces(self, cut: Sizes) -> Iterator[Piece]:
        return cut.pieces(self.O, self.I, self.geo)

    def sum_of(self, head: Tensor, piece: Piece) -> Sum:
        return Sum(head[piece.outputs].flatten(1, -2), self.tiling, one=self.cut.instances >= self.g.shape[0])

    def spread_back(self, b: slice, dx: Tensor) -> None:
        """Write dx of some instances."""
        of = self.z[b], self.weight, self.base_weight, None, dx[b], self.geo, self.cut, self.tiling, self.products
        (_convolve if self.transposed else _spread)(self.g[b], *of)

    def kernels(self, b: slice, piece: Piece) -> Tensor:
        """Return dW (b, o, I, *taps) of some instances and outputs."""
        shape = b.stop - b.start, piece.outputs.stop - piece.outputs.start, self.I, *self.geo.kernel
        dw = torch.empty(shape, dtype=self.tiling.dtype, device=self.g.device)
        x, g = self.tiling.work(self.image[b, piece.channels]), self.tiling.work(self.output[b, piece.outputs])
        self.products.kernels(x, g, dw, piece.geometry)
        return dw

    def add_kernels(self, b: slice, piece: Piece, dz: Tensor | None, totals: list[tuple[Sum, Tensor | None]]) -> None:
        """Add what dW of some instances and outputs gives to dz, and to sums of dW ⊗ z, or of dW."""
        rows = self.kernels(b, piece).flatten(2)
        if dz is not None:
            Head(self.weight[piece.outputs].flatten(1, -2), self.tiling).contract(dz, rows)
        for total, z in totals:
            if z is None:
                total.add_rows(rows.flatten(1))
            else:
                total.add(rows.flatten(1).T, self.tiling.work(z[b]))


class BiasSums:
    """dz, and the gradients of the biases: the sums of g over the pixels, times z and the head of the bias."""

    def __init__(
        self, g: Tensor, z: Tensor | None, bias: Tensor | None, R: int, mask: tuple[bool, ...], tiling: Tiling
    ) -> None:
        self._g, self._z, self._tiling = g, z, tiling
        self._bias = bias if mask[1] else None
        B, O = g.shape[:2]
        self.dz = g.new_empty(B, R) if mask[1] else None
        self._of_z = g.new_zeros(O, R, dtype=tiling.sum_dtype) if mask[3] else None
        self._of_one = g.new_zeros(O, dtype=tiling.sum_dtype) if mask[5] else None

    def add(self, b: slice) -> Tensor | None:
        """Add some instances; return the start of their dz."""
        if self._bias is not None or self._of_z is not None or self._of_one is not None:
            sums = self._g[b].sum((2, 3, 4), dtype=self._tiling.sum_dtype)
            if self._of_z is not None:
                accumulate(self._of_z, sums.T, cast(Tensor, self._z)[b].to(sums.dtype))
            if self._of_one is not None:
                self._of_one += sums.sum(0)
        if self.dz is None:
            return None
        start = torch.zeros(b.stop - b.start, self.dz.shape[1], dtype=self._tiling.sum_dtype, device=self.dz.device)
        if self._bias is not None:
            accumulate(start, sums, self._bias.to(sums.dtype))
        return start

    def put(self, b: slice, dz: Tensor | None) -> None:
        """Store dz of some instances."""
        if self.dz is not None:
            self.dz[b] = cast(Tensor, dz)

    def of_bias(self) -> tuple[Tensor | None, Tensor | None]:
        """Return dbias and db0."""
        dtype = self._g.dtype
        return (
            None if self._of_z is None else self._of_z.to(dtype),
            None if self._of_one is None else self._of_one.to(dtype),
        )


def _generate(z: Tensor, weight: Tensor, base_weight: Tensor | None, o: slice, tiling: Tiling) -> Tensor:
    """Return W (b, o, I, *taps) of some instances and outputs."""
    w = Head(weight[o].flatten(1, -2), tiling).weights(tiling.work(z)).contiguous()
    if base_weight is not None:
        w += tiling.work(base_weight[o]).flatten(1)
    return w.view(*w.shape[:2], *weight.shape[1:-1])


def shift_of(z: Tensor, bias: Tensor | None, base_bias: Tensor | None, tiling: Tiling) -> Tensor | None:
    """Return bias·z[b] + b0 (b, channels) of some instances."""
    if bias is None:
        return None if base_bias is None else tiling.work(base_bias).expand(z.shape[0], -1)
    shift = tiling.work(z) @ tiling.work(bias).T
    return shift if base_bias is None else shift + tiling.work(base_bias)


def _target(out: Tensor, tiling: Tiling) -> Tensor:
    """Return where to compute a tile of an output: the output itself, or a buffer in the work dtype."""
    return out if out.dtype == tiling.dtype else torch.empty_like(out, dtype=tiling.dtype)
