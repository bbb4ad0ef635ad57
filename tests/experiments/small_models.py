"""Small architectures, and what computes the networks of their models layer by layer."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from fasthyper.experiments.methods import METHODS, Architecture

SMALL = Architecture(cond=5, x=3, out=2, context=(7, 6), hidden=(4,), embedding=8)
DEEP = replace(SMALL, hidden=(4, 9), activation="tanh", context_activation="elu")
BIASED = replace(DEEP, generated_bias=True)
B, N = 6, 11


def build(name, architecture):
    return METHODS[name].model(architecture).double()


def inputs(a, *points):
    return torch.randn(B, *points, a.x, dtype=torch.float64), torch.randn(B, a.cond, dtype=torch.float64)


def linears(module):
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


def act(name):
    return {"relu": torch.relu, "elu": F.elu, "tanh": torch.tanh}[name]


def context_of(a, model, cond):
    """Compute f or e without the model: the hidden layers in these modules, each with its activation."""
    for layer in linears(model):
        cond = act(a.context_activation)(F.linear(cond, layer.weight, layer.bias))
    return cond


def through(a, layers, x):
    """Apply layers, with an activation between any two."""
    for number, layer in enumerate(layers):
        x = act(a.activation)(layer(x)) if number + 1 < len(layers) else layer(x)
    return x
