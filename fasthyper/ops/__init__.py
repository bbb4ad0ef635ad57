"""The custom ops, ``torch.ops.fasthyper``, and the functions of the family that call them.

shapes.py     the axes of every tensor: the check, its message, the shapes of results
signature.py  the schema of an op, the check of its arguments, the shapes of its results
register.py   `define` registers an op; torch's private names for it
launches.py   the launches of an op on a GPU, in the graphs of torch.compile; torch's private names for it
rules.py      the table of derivatives and of vmap
sharding.py   DTensors: which parts of its arguments a process passes to an op
family.py     apply, cond_grad, weight_grad, and grads, the gradients of apply
models.py     the family with a leading axis of models, which vmap calls
linear.py     hyper_linear: the family with a generated bias and a base added in place
kept.py       W of hyper_linear, written out once for a graph of derivatives
terms.py      the family over terms that share rows
conv.py       the family of convolutions with a generated kernel
hyper_conv.py hyper_conv, hyper_conv_transpose: with a generated bias and a base added in place
groups.py     apply_groups and weight_grad_groups: rows, each with the matrix of its group
mapped.py     hyper_linear with a function of the generated weights
chunks.py     a differentiable function of instances, some of them at a time
pairs.py      pairs: every member of one set with every member of another
primary.py    primary: two hyper_linear and the activation between them
flops.py      the flops of each op, for torch's counter
decompose.py  each op in ATen operations, for exported programs
checkpoints.py which activation checkpoints run or are recomputed; torch's private names for it
reference.py  the definition of each op, as one einsum
"""

# Some are imported for their ops alone, which must be there when torch's counter and exporter hear of them.
from . import conv, flops, groups, hyper_conv, linear, linear_terms, mapped, models, pairs, primary, register, terms  # noqa: F401
from .decompose import decompositions
from .family import apply, cond_grad, grads, weight_grad

__all__ = ["apply", "cond_grad", "decompositions", "grads", "weight_grad"]

flops.watch()
if not register.MISSING:
    register.add_to_export(decompositions)
