"""The definition of every op of the family, as one einsum. Tests and benchmarks compare with it, in float64.

T(x, z, H, g) = Σ_{b,n,r,i,o} x[b,n,i] z[b,r] H[o,i,r] g[b,n,o], and each op is T with one factor taken out. The ops
over terms are the same ops on gathered rows, with their results added up by an index. The first three functions also
take factors with a leading axis of models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import Geometry
from ..terms import Terms


def apply(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """Return y[b,n,o] = Σ_{i,r} H[o,i,r] x[b,n,i] z[b,r], by writing out W[b] = H·z[b]."""
    return torch.einsum("...bni,...boi->...bno", x, torch.einsum("...br,...oir->...boi", z, weight))


def cond_grad(x: Tensor, g: Tensor, weight: Tensor) -> Tensor:
    """Return dz[b,r] = Σ_{n,i,o} H[o,i,r] x[b,n,i] g[b,n,o], by writing out dW[b] = g[b]ᵀ x[b]."""
    return torch.einsum("...boi,...oir->...br", torch.einsum("...bno,...bni->...boi", g, x), weight)


def weight_grad(x: Tensor, z: Tensor, g: Tensor) -> Tensor:
    """Return dH[o,i,r] = Σ_{b,n} x[b,n,i] z[b,r] g[b,n,o], by writing out dW[b] = g[b]ᵀ x[b]."""
    return torch.einsum("...boi,...br->...oir", torch.einsum("...bno,...bni->...boi", g, x), z)


def hyper_linear(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    base_weight: Tensor | None = None,
    base_bias: Tensor | None = None,
) -> Tensor:
    """Return y[b,n] = (H·z[b] + W0) x[b,n] + bias·z[b] + b0."""
    w = torch.einsum("br,oir->boi", z, weight)
    if base_weight is not None:
        w = w + base_weight
    y = torch.einsum("bni,boi->bno", x, w)
    if bias is not None:
        y = y + (z @ bias.T).unsqueeze(1)
    return y if base_bias is None else y + base_bias


def _patches(x: Tensor, geo: Geometry) -> Tensor:
    """Return (B, G, I, a, b, c, i, j, k): the image's pixels under each tap at each output pixel, zeros outside."""
    sizes = zip(geo.image, geo.output, geo.kernel, geo.stride, geo.padding, geo.dilation, strict=True)
    sides = [(p, max(0, (m - 1) * s + d * (k - 1) + 1 - n - p)) for n, m, k, s, p, d in sizes]
    x = torch.nn.functional.pad(x, [pad for side in reversed(sides) for pad in side])
    for axis in range(3):
        reach = geo.dilation[axis] * (geo.kernel[axis] - 1) + 1
        x = x.unfold(axis + 2, reach, geo.stride[axis]).narrow(axis + 2, 0, geo.output[axis])
        x = x[..., :: geo.dilation[axis]]
    return x.unflatten(1, (geo.groups, x.shape[1] // geo.groups))


def _kernels(z: Tensor, weight: Tensor, geo: Geometry) -> Tensor:
    """Return (B, G, O/G, I, i, j, k): the kernels of each instance, by group."""
    w = torch.einsum("br,oiuvwr->boiuvw", z, weight)
    return w.unflatten(1, (geo.groups, w.shape[1] // geo.groups))


def conv_apply(x: Tensor, z: Tensor, weight: Tensor, geo: Geometry) -> Tensor:
    """Return the convolution of each x[b] with its kernel H·z[b], by writing out the kernels and the patches of x."""
    y = torch.einsum("bgiklmuvw,bgoiuvw->bgoklm", _patches(x, geo), _kernels(z, weight, geo))
    return y.flatten(1, 2)


def conv_transpose_apply(x: Tensor, z: Tensor, weight: Tensor, geo: Geometry) -> Tensor:
    """Return the transpose of `conv_apply`, applied to x, by writing out the kernels."""
    w = _kernels(z, weight, geo).flatten(0, 2)
    groups = x.shape[0] * geo.groups
    y = torch.nn.functional.conv_transpose3d(
        x.reshape(1, -1, *x.shape[2:]), w, stride=[*geo.stride], groups=groups, dilation=[*geo.dilation]
    )
    for axis, (n, p) in enumerate(zip(geo.image, geo.padding, strict=True), 2):
        y = y.transpose(axis, -1)
        y = torch.nn.functional.pad(y, (0, max(0, p + n - y.shape[-1]))).narrow(-1, p, n).transpose(axis, -1)
    return y.reshape(x.shape[0], -1, *geo.image)


def conv_cond_grad(x: Tensor, g: Tensor, weight: Tensor, geo: Geometry) -> Tensor:
    """Return dz[b,r] = Σ dW[b] H[...,r], by writing out the gradients of the kernels."""
    return torch.einsum("boiuvw,oiuvwr->br", _kernel_grads(x, g, geo), weight)


def conv_weight_grad(x: Tensor, z: Tensor, g: Tensor, geo: Geometry) -> Tensor:
    """Return dH[...,r] = Σ_b dW[b] z[b,r], by writing out the gradients of the kernels."""
    return torch.einsum("boiuvw,br->oiuvwr", _kernel_grads(x, g, geo), z)


def _kernel_grads(x: Tensor, g: Tensor, geo: Geometry) -> Tensor:
    """Return dW (B, O, I, i, j, k)."""
    g = g.unflatten(1, (geo.groups, g.shape[1] // geo.groups))
    return torch.einsum("bgiklmuvw,bgoklm->bgoiuvw", _patches(x, geo), g).flatten(1, 2)


def _gather(rows: Tensor, index: Tensor | None) -> Tensor:
    return rows if index is None else rows.index_select(0, index)


def sum_rows(rows: Tensor, index: Tensor | None, size: int) -> Tensor:
    """Return (size, …), the sums of the rows that have the same value of an index."""
    return rows if index is None else rows.new_zeros(size, *rows.shape[1:]).index_add(0, index, rows)


def apply_terms(x: Tensor, z: Tensor, weight: Tensor, terms: Terms) -> Tensor:
    """Return y[t,n,o] = Σ_{e: t(e)=t} Σ_{i,r} H[o,i,r] x[s(e),n,i] z[c(e),r]."""
    y = apply(_gather(x, terms.source), _gather(z, terms.cond), weight)
    return sum_rows(y, terms.target, terms.targets)


def cond_grad_terms(x: Tensor, g: Tensor, weight: Tensor, terms: Terms) -> Tensor:
    """Return dz[c,r] = Σ_{e: c(e)=c} Σ_{n,i,o} H[o,i,r] x[s(e),n,i] g[t(e),n,o]."""
    dz = cond_grad(_gather(x, terms.source), _gather(g, terms.target), weight)
    return sum_rows(dz, terms.cond, terms.conds)


def weight_grad_terms(x: Tensor, z: Tensor, g: Tensor, terms: Terms) -> Tensor:
    """Return dH[o,i,r] = Σ_e Σ_n x[s(e),n,i] z[c(e),r] g[t(e),n,o]."""
    return weight_grad(_gather(x, terms.source), _gather(z, terms.cond), _gather(g, terms.target))
