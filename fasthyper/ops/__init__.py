"""What torch sees: ``torch.ops.fasthyper``, and the functions that call it.

`apply`, `cond_grad` and `weight_grad` are the closed family (`fasthyper.ops.rules` has its table), `grads` is
what backward calls. `hyper_linear` adds a base and a bias in place, `primary` is two of those and the activation
between. `reference` holds the definition.
"""

from .family import apply, cond_grad, grads, weight_grad

__all__ = ["apply", "cond_grad", "grads", "weight_grad"]
