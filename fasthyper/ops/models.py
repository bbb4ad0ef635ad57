"""The family with a leading axis of models: M layers of the same sizes, each with its own factors, in one call.

    apply_models        y[m,b,n,o]  = Σ_{i,r}   H[m,o,i,r] x[m,b,n,i] z[m,b,r]
    cond_grad_models    dz[m,b,r]   = Σ_{n,i,o} H[m,o,i,r] x[m,b,n,i] g[m,b,n,o]
    weight_grad_models  dH[m,o,i,r] = Σ_{b,n}   x[m,b,n,i] z[m,b,r] g[m,b,n,o]
    grads_models        the requested gradients of `apply_models`: dx, dz, dH

They are what `vmap` makes of the family where no other axis can take its dimension: ensembles, per-sample gradients,
tasks with weights of their own. The table of rules is the same. Any factor may be a view that all models share.
"""

from __future__ import annotations

from torch import Tensor

from .. import backends
from ..backends.contract import OfModels, Wanted
from . import autocast, rules
from .family import Apply, CondGrad, Grads, WeightGrad, define_grads, define_op
from .register import Arguments, choice
from .shapes import MODELS


def _module(args: Arguments, x: Tensor) -> tuple[OfModels, str]:
    """Return the backend of a call, and its schedule."""
    name, schedule = choice(args)
    return backends.of_models(name, x.device, x.dtype), schedule


def _apply(args: Apply) -> Tensor:
    with autocast.off(args.x):
        module, schedule = _module(args, args.x)
        return module.apply_models(args.x, args.z, args.weight, schedule=schedule)


def _run_grads(
    args: Arguments, x: Tensor, z: Tensor | None, weight: Tensor | None, g: Tensor, wanted: Wanted
) -> tuple[Tensor | None, ...]:
    with autocast.off(x):
        module, schedule = _module(args, x)
        return module.grads_models(x, z, weight, g, wanted[:3], schedule=schedule)


def _cond_grad(args: CondGrad) -> Tensor | None:
    return _run_grads(args, args.x, None, args.weight, args.g, Wanted(z=True))[1]


def _weight_grad(args: WeightGrad) -> Tensor | None:
    return _run_grads(args, args.x, args.z, None, args.g, Wanted(weight=True))[2]


def _grads(args: Grads) -> tuple[Tensor | None, ...]:
    return _run_grads(args, args.x, args.z, args.weight, args.g, Wanted(*args.mask))


define_op("apply", Apply, _apply, MODELS, rules.vmap_models, "_models")
define_op("cond_grad", CondGrad, _cond_grad, MODELS, rules.vmap_models, "_models")
define_op("weight_grad", WeightGrad, _weight_grad, MODELS, rules.vmap_models, "_models")
define_grads(Grads, _grads, MODELS, "_models")
