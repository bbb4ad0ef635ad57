"""A backend in one file, which writes the generated weights out. docs/add-a-backend.md explains it."""

from __future__ import annotations

import torch

from fasthyper.backends import aten
from fasthyper.costs import Costs
from fasthyper.problem import Problem

DTYPES = (torch.float64, torch.float32)
PREFERRED_ON = ("cpu",)
COSTS = Costs()
REMARK = "for a test"


def devices():
    return ("cpu",)


def unavailable():
    return None


def takes(problem):
    return problem.dtype in DTYPES and 0 not in problem.sizes


def apply(x, z, weight, bias=None, base_weight=None, base_bias=None, *, schedule):
    O, _, R = weight.shape
    if not takes(Problem.of("apply", x, R, O)):
        return aten.apply(x, z, weight, bias, base_weight, base_bias, schedule=schedule)
    w = torch.einsum("br,oir->boi", z, weight)
    if base_weight is not None:
        w = w + base_weight
    y = torch.einsum("bni,boi->bno", x, w)
    if bias is not None:
        y = y + (z @ bias.T).unsqueeze(1)
    return (y if base_bias is None else y + base_bias).contiguous()


def grads(x, z, weight, bias, base_weight, g, mask, *, schedule):
    O, R = g.shape[2], (z if weight is None else weight).shape[-1]
    if not takes(Problem.of("grads", x, R, O)):
        return aten.grads(x, z, weight, bias, base_weight, g, mask, schedule=schedule)
    dx, dz, dh, dbias, dw0, db0 = mask
    out = [None] * 6
    if dx:
        w = torch.einsum("br,oir->boi", z, weight)
        out[0] = torch.einsum("bno,boi->bni", g, w if base_weight is None else w + base_weight)
    dw = torch.einsum("bno,bni->boi", g, x)
    if dz:
        out[1] = torch.einsum("boi,oir->br", dw, weight)
        if bias is not None:
            out[1] += g.sum(1) @ bias
    if dh:
        out[2] = torch.einsum("boi,br->oir", dw, z)
    if dbias:
        out[3] = g.sum(1).T @ z
    if dw0:
        out[4] = dw.sum(0)
    if db0:
        out[5] = g.sum((0, 1))
    return tuple(None if t is None else t.contiguous() for t in out)
