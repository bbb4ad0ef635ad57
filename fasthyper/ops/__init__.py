"""The custom ops, ``torch.ops.fasthyper``, and the functions of the family that call them.

shapes.py     the axes of every tensor: the check, its message, the shapes of results
register.py   `define` registers an op; torch's private names
rules.py      the table of derivatives and of vmap
family.py     apply, cond_grad, weight_grad, and grads, the gradients of apply
models.py     the family with a leading axis of models, which vmap calls
linear.py     hyper_linear: the family with a generated bias and a base added in place
terms.py      the family over terms that share rows
conv.py       the family of convolutions with a generated kernel
hyper_conv.py hyper_conv, hyper_conv_transpose: with a generated bias and a base added in place
groups.py     apply_groups and weight_grad_groups: rows, each with the matrix of its group
mapped.py     hyper_linear with a function of the generated weights
chunks.py     a differentiable function of instances, some of them at a time
pairs.py      pairs: every member of one set with every member of another
primary.py    primary: two hyper_linear and the activation between them
reference.py  the definition of each op, as one einsum
"""

from . import models as models
from .family import apply, cond_grad, grads, weight_grad

__all__ = ["apply", "cond_grad", "grads", "weight_grad"]
