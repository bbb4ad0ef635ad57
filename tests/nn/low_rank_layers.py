"""Layers of low rank for tests, and what they compute by einsum."""

import torch

from fasthyper.nn import HyperLinear

I, O, R, r, B = 6, 7, 5, 3, 4


def filled(*args, dtype=torch.float64, **kwargs):
    """Return a low-rank layer with all parameters, base included, nonzero."""
    layer = HyperLinear(*(args or (I, O, R)), dtype=dtype, **{"rank": r, "alpha": 4.0, **kwargs})
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    return layer


def written_out(layer, z, dtype=torch.float64):
    """Return W and the bias of each instance by einsum, from the parameters."""
    a, b, bias, base, base_bias = (
        None if p is None else p.to(dtype)
        for p in (layer.weight_a, layer.weight_b, layer.bias, layer.base_weight, layer.base_bias)
    )
    z = z.to(dtype)
    A, Bs = torch.einsum("kir,br->bki", a, z), torch.einsum("okr,br->bok", b, z)
    W = layer.alpha / layer.rank * torch.einsum("bok,bki->boi", Bs, A)
    W = W if base is None else W + base
    by = z.new_zeros(len(z), layer.out_features) if bias is None else z @ bias.T
    return W, by if base_bias is None else by + base_bias


def oracle(layer, x, z, dtype=torch.float64):
    W, by = written_out(layer, z, dtype)
    y = torch.einsum("boi,b...i->b...o", W, x.to(dtype))
    return y + by.reshape(len(x), *[1] * (x.dim() - 2), by.shape[1])


def inputs(*points, dtype=torch.float64):
    return torch.randn(B, *points, I, dtype=dtype), torch.randn(B, R, dtype=dtype)
