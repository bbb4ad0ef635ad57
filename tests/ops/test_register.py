"""torch's private names: torch has all of them; if one is missing, fasthyper warns, and results stay right."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fasthyper
from fasthyper.ops import register

NAMES = (
    "_C._after_autograd_keyset",
    "_C._any_requires_grad",
    "_C._are_functorch_transforms_active",
    "_C._AutoDispatchBelowAutograd",
    "_C._current_autograd_node",
    "_C._will_engine_execute_node",
    "_C._functorch.TransformType",
    "_C._functorch.get_interpreter_stack",
    "_functorch.autograd_function.enable_single_level_autograd_function",
    "autograd.function._SingleLevelFunction",
    "autograd.forward_ad._current_level",
    "autograd.forward_ad._set_fwd_grad_enabled",
)

# The name is missing only while fasthyper is imported: torch itself needs some of them.
WITHOUT = """
import functools, sys, warnings
import torch
owner_path, _, name = sys.argv[1].rpartition(".")
owner = functools.reduce(getattr, owner_path.split("."), torch)
value = getattr(owner, name)
delattr(owner, name)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fasthyper
setattr(owner, name, value)
ours = [w for w in caught if w.category is RuntimeWarning and "fasthyper" in str(w.message)]
assert len(ours) == 1, [str(w.message) for w in caught]
assert name in str(ours[0].message), ours[0].message
assert torch.__version__ in str(ours[0].message)
assert "writes out" in str(ours[0].message)

E = lambda x, z, w, b, w0, b0: (
    torch.einsum("bni,br,oir->bno", x, z, w) + torch.einsum("br,or->bo", z, b)[:, None] + x @ w0.T + b0)
f = lambda x, z, w, b, w0, b0: fasthyper.hyper_linear(x, z, w, b, base_weight=w0, base_bias=b0)
"""
RESULTS = """
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
make = lambda *lead: [torch.randn(*lead, *s, dtype=torch.float64)
                      for s in ((3, 2, 4), (3, 3), (2, 4, 3), (2, 3), (2, 4), (2,))]
close = torch.testing.assert_close
args, wrt = make(), tuple(range(6))
x, z, w, *_ = args
g = torch.randn(3, 2, 2, dtype=torch.float64)
close(f(*args), E(*args))
close(fasthyper.ops.apply(x, z, w), torch.einsum("bni,br,oir->bno", x, z, w))
close(fasthyper.ops.cond_grad(x, g, w), torch.einsum("bni,bno,oir->br", x, g, w))
close(fasthyper.ops.weight_grad(x, z, g), torch.einsum("bni,br,bno->oir", x, z, g))
dx, dz, dh = fasthyper.ops.grads(x, z, w, g, (True, False, True))
close(dx, torch.einsum("bno,br,oir->bni", g, z, w))
assert dz.shape == (0,)
close(dh, torch.einsum("bni,br,bno->oir", x, z, g))
leaves = [t.clone().requires_grad_() for t in args]
assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True)
assert torch.autograd.gradgradcheck(f, leaves, check_fwd_over_rev=True)
over = [lambda f: grad(lambda *a: (f(*a) ** 2).sum(), wrt), lambda f: jacrev(f, wrt), lambda f: jacfwd(f, wrt),
        lambda f: jacfwd(jacfwd(f, wrt), wrt), lambda f: hessian(f, wrt),
        lambda f: lambda *a: jvp(f, a, tuple(t.cos() for t in a))]
for d in over:
    close(d(f)(*args), d(E)(*args))
many = make(5)
close(vmap(f)(*many), vmap(E)(*many))
close(torch.compile(f, backend="aot_eager", fullgraph=True)(*args), E(*args))
two = lambda linear: lambda x, z, *p: linear(torch.tanh(linear(x, z, *p[:4])), z, *p[4:])
layers = (*args, *(torch.randn(s, dtype=torch.float64) for s in ((5, 2, 3), (5, 3), (5, 2), (5,))))
primary = lambda *a: torch.ops.fasthyper.primary(*a, "tanh")[0]
close(primary(*layers), two(E)(*layers))
wrt = (0, 1, 2, 6)
for d in (lambda f: jacrev(f, wrt), lambda f: jacfwd(f, wrt), lambda f: hessian(lambda *a: (f(*a) ** 2).sum(), wrt)):
    close(d(primary)(*layers), d(two(E))(*layers))
close(fasthyper.fused.hyper_primary(x, z, layers[2:6], layers[6:], "tanh"), two(E)(*layers))
assert not fasthyper.fused.may_fuse(x)
print("right")
"""
ERRORS = """
x, z, w, g = torch.randn(4, 2, 3), torch.randn(4, 5), torch.randn(6, 3, 5), torch.randn(4, 2, 6)
cases = {
    "apply": (lambda: fasthyper.ops.apply(x, z[:1], w), lambda: fasthyper.ops.apply(x[:1], z, w),
              lambda: fasthyper.ops.apply(x, z, w[:, :1])),
    "cond_grad": (lambda: fasthyper.ops.cond_grad(x, g[:1], w), lambda: fasthyper.ops.cond_grad(x[:, :1], g, w)),
    "weight_grad": (lambda: fasthyper.ops.weight_grad(x, z[:1], g), lambda: fasthyper.ops.weight_grad(x, z, g[:, :1])),
    "grads": (lambda: fasthyper.ops.grads(x, z, w, g[:1]), lambda: fasthyper.ops.grads(x, z[:1], w, g)),
    "primary": (lambda: torch.ops.fasthyper.primary(x, z, w, *[None] * 3, w[:, :, :1], *[None] * 3, "relu"),),
    "hyper_linear": (lambda: fasthyper.hyper_linear(x, z[:1], w),
                     lambda: torch.ops.fasthyper.hyper_linear(x, z, w, None, None, torch.randn(1)),
                     lambda: torch.ops.fasthyper.hyper_linear(x, z, w, None, torch.randn(6, 1), None)),
}
for op, wrong in cases.items():
    for k, call in enumerate(wrong):
        try:
            y = call()
        except ValueError as error:
            assert "shape" in str(error), (op, k, error)
        else:
            raise AssertionError(f"{op} {k} did not raise")
print("right")
"""


def run(code: str, name: str) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT + code, name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "right"


def test_no_name_is_missing():
    assert register.MISSING is None


@pytest.mark.parametrize("name", NAMES)
def test_torch_has_the_name(name):
    owner = torch
    for attribute in name.split("."):
        owner = getattr(owner, attribute)
    assert owner is not None


def test_without_a_name_the_results_are_right():
    run(RESULTS, NAMES[1])


@pytest.mark.parametrize("name", NAMES)
def test_the_warning_names_what_is_missing(name):
    run('print("right")', name)


def test_without_a_name_wrong_sizes_raise():
    run(ERRORS, NAMES[1])


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("how", ["leaves", "results", "backward", "backward to leaves"])
def test_a_backward_computes_what_the_pass_asks_for(how, compiled, monkeypatch):
    """Leaves and results of ops, by `grad` and by `backward`, with the compiled function that tells, and without."""
    if not compiled:
        monkeypatch.setattr(register, "_asked", None)
    elif register._asked is None:
        pytest.skip("eager is not compiled")
    masks = []
    real = torch.ops.fasthyper.mapped_linear_grads
    monkeypatch.setattr(fasthyper.ops.mapped.ops, "mapped_linear_grads", lambda *a: masks.append(a[7]) or real(*a))
    torch.manual_seed(0)
    leaves = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 1, 3), (4, 2), (5, 3, 2))]
    fixed_bias = torch.randn(5, 2, dtype=torch.float64)
    x, z, weight = leaves if "leaves" in how or how == "backward" else [2 * t for t in leaves]
    y = fasthyper.hyper_linear(x, z, weight, fixed_bias, weight_map="abs")
    if how == "backward":
        y.sum().backward()
        expected = [True, True, True]
    elif how == "backward to leaves":
        y.sum().backward(inputs=[weight])
        expected = [False, False, True]
    else:
        torch.autograd.grad(y.sum(), [x, weight])
        expected = [True, False, True]
    assert masks == [[*expected, False, False, False]]
