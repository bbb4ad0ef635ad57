"""Arguments of every op of `torch.ops.fasthyper`: small, in float64, with odd sizes."""

from __future__ import annotations

import torch

B, N, R, I, O, J, M = 4, 2, 5, 3, 6, 7, 3
S, C, T, E = 5, 4, 3, 11
AUTO = ("auto", "auto")


def some(*shape):
    return torch.randn(shape, dtype=torch.float64)


def index(size, terms=E):
    return torch.arange(terms) * 7 % size


def geometry(groups=2, stride=(1, 2, 1), padding=(0, 1, 1), dilation=(1, 1, 2)):
    """Return the geometry of a convolution whose output does not reach the last pixels of one axis."""
    image, kernel = [3, 6, 7], [1, 3, 2]
    sizes = zip(image, kernel, stride, padding, dilation, strict=True)
    output = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    return [*stride], [*padding], [*dilation], groups, image, kernel, output


def _conv(geo, *names):
    _, _, _, groups, image, kernel, output = geo
    shapes = {
        "image": (B, groups * I, *image),
        "output": (B, O, *output),
        "z": (B, R),
        "weight": (O, I, *kernel, R),
        "bias": (O, R),
        "image_bias": (groups * I, R),
        "base_weight": (O, I, *kernel),
        "base_bias": (O,),
        "image_base_bias": (groups * I,),
    }
    return tuple(some(*shapes[name]) for name in names)


def _examples():
    for n in (1, N):
        x, z, h, g = some(B, n, I), some(B, R), some(O, I, R), some(B, n, O)
        bias, w0, b0 = some(O, R), some(O, I), some(O)
        yield "apply", (x, z, h)
        yield "cond_grad", (x, g, h)
        yield "weight_grad", (x, z, g)
        yield "grads", (x, z, h, g, [True, False, True])
        yield "grads", (x, z, h, g, [False, True, False])
        several = some(M, B, n, I), some(M, B, R), some(M, O, I, R), some(M, B, n, O)
        yield "apply_models", several[:3]
        yield "cond_grad_models", (several[0], several[3], several[2])
        yield "weight_grad_models", (*several[:2], several[3])
        yield "grads_models", (*several, [True, False, True])
        yield "grads_models", (*several, [False, True, False])
        yield "hyper_linear", (x, z, h, bias, w0, b0)
        yield "hyper_linear", (x, z, h, None, None, None)
        yield "mapped_linear", (x, z, h, bias, w0, b0, "softplus")
        for mask in ([True] * 6, [False, True, False, True, False, True], [False] * 4 + [True, False]):
            yield "hyper_linear_grads", (x, z, h, bias, w0, g, mask)
            yield "mapped_linear_grads", (x, z, h, bias, w0, g, "normalize", mask)
        yield "hyper_linear_grads", (x, z, h, None, None, g, [True, True, False, False, False, False])
        layers = some(J, I, R), some(J, R), some(J, I), some(J), some(O, J, R), some(O, R), some(O, J), some(O)
        yield "primary", (x, z, *layers, "tanh")
        without = (*layers[:3], *layers[4:7])
        for mask in ([True] * 10, [False, True] + [False] * 4 + [True] + [False] * 3, [False] * 6 + [True] * 4):
            yield "primary_grads", (x, z, *without, some(B, n, J), g, mask, "tanh")
    for i, r, o in ((7, 5, 2), (3, 8, 4), (8, 3, 4)):  # each order of contraction is the smallest once
        yield "apply", (some(B, 1, i), some(B, r), some(o, i, r))

    for source, cond, target in ((index(S), index(C), index(T)), (None, index(C), None), (index(S), None, index(T))):
        s, c, t = (size if of is not None else E for of, size in ((source, S), (cond, C), (target, T)))
        x, z, h, g = some(s, N, I), some(c, R), some(O, I, R), some(t, N, O)
        bias, w0, b0, at = some(O, R), some(O, I), some(O), (source, cond, target)
        yield "apply_terms", (x, z, h, *at, t)
        yield "cond_grad_terms", (x, g, h, *at, c)
        yield "weight_grad_terms", (x, z, g, *at)
        yield "grads_terms", (x, z, h, g, *at, [True, True, True])
        yield "hyper_linear_terms", (x, z, h, bias, w0, b0, *at, t)
        yield "hyper_linear_terms_grads", (x, z, h, bias, w0, g, *at, [True] * 6)
    yield "apply_groups", (some(E, I), some(C, I, O), index(C))
    yield "weight_grad_groups", (some(E, I), some(E, O), index(C), C)

    for geo in (geometry(), geometry(1, (1, 1, 3), (0, 3, 0), (1, 2, 1))):
        yield "conv_apply", (*_conv(geo, "image", "z", "weight"), *geo)
        yield "conv_transpose_apply", (*_conv(geo, "output", "z", "weight"), *geo)
        yield "conv_cond_grad", (*_conv(geo, "image", "output", "weight"), *geo)
        yield "conv_weight_grad", (*_conv(geo, "image", "z", "output"), *geo)
        yield "hyper_conv", (*_conv(geo, "image", "z", "weight", "bias", "base_weight", "base_bias"), *geo)
        given = _conv(geo, "output", "z", "weight", "image_bias", "base_weight", "image_base_bias")
        yield "hyper_conv_transpose", (*given, *geo)
        mask = [True, True, True, False, True, True]
        yield "hyper_conv_grads", (*_conv(geo, "image", "z", "weight", "bias", "base_weight", "output"), *geo, mask)
        given = _conv(geo, "output", "z", "weight", "image_bias", "base_weight", "image")
        yield "hyper_conv_transpose_grads", (*given, *geo, mask)

    for ones_x, ones_z in ((True, True), (False, True)):
        x, z, h = some(B, M, I), some(B, N, R), some(O, I + ones_x, R + ones_z)
        yield "pairs", (x, z, h, some(O), ones_x, ones_z)
        for mask in ([True] * 4, [False, True, False, False]):
            yield "pairs_grads", (x, z, h, some(B, M, N, O), ones_x, ones_z, mask)


torch.manual_seed(0)
EXAMPLES = [(name, (*args, *AUTO)) for name, args in _examples()]
IDS = [f"{name}-{k}" for k, (name, _) in enumerate(EXAMPLES)]
