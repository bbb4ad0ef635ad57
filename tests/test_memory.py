"""The workspace rule: temporary memory of forward + backward stays under a limit and does not grow with the batch.

Two measurements: the profiler's memory events, and peak resident memory in a separate process, since the profiler does
not see what C++ allocates without torch's allocator.
"""

from __future__ import annotations

import functools
import os
import pathlib
import subprocess
import sys

import pytest
import torch

import fasthyper
from fasthyper.measure import peak_temporary_bytes
from fasthyper.nn import HyperLinear, PairwiseBilinear
from fasthyper.problem import SCHEDULES

MIB = 1 << 20
LIMIT = 40 * MIB
ISSUE = {
    "per sample": (20000, 1, 128, 64, 64, torch.float32),
    "many points": (64, 256, 64, 512, 512, torch.float32),
    "large head": (8, 58, 2048, 512, 512, torch.bfloat16),
}


def temporary(B, N, R, I, O, dtype, head=None, x_layout=None) -> int:
    """Return the peak temporary bytes of a HyperLinear's forward + backward with all gradients."""
    layer = HyperLinear(I, O, R, dtype=dtype)
    if head is not None:
        with torch.no_grad():
            layer.weight.data = head(layer.weight.data)
    x = torch.randn(*([B, I] if N == 1 else [B, N, I]), dtype=torch.float32).to(dtype)
    x = (x if x_layout is None else x_layout(x)).requires_grad_()
    z = torch.randn(B, R).to(dtype).requires_grad_()
    g = torch.randn(*x.shape[:-1], O).to(dtype)
    wanted = [x, z, *layer.parameters()]

    def step():
        y = layer(x, z)
        return y, torch.autograd.grad(y, wanted, g)

    return peak_temporary_bytes(step)


def doubled(B, *rest):
    return (2 * B, *rest)


def test_the_measure_sees_W(factors):
    """Writing out W exceeds the limit, so the measurement works."""
    with fasthyper.use_backend("materialised"):
        assert temporary(*ISSUE["per sample"]) > 312 * MIB


HEAVY = pytest.param("large head", marks=pytest.mark.slow)  # a head of 1 GiB, and its gradient


@pytest.mark.parametrize("case", ["per sample", "many points", HEAVY])
def test_sizes_of_the_rule_by_the_profiler(case):
    once, twice = temporary(*ISSUE[case]), temporary(*doubled(*ISSUE[case]))
    assert once < LIMIT
    assert twice < LIMIT
    assert twice - once < MIB


# Smaller sizes, still larger than one tile: below that, temporaries may grow with the batch.
SMALLER = [
    (10000, 1, 64, 32, 32, torch.float32),
    (320, 64, 32, 128, 128, torch.float32),
    (10000, 1, 64, 32, 32, torch.bfloat16),
]
# Skewed sizes, where other temporaries could be larger than the tile.
SKEWED = [
    (10000, 1, 16, 256, 10, torch.float32),
    (10000, 3, 8, 16, 64, torch.float16),
    (100000, 1, 2, 2, 64, torch.float32),
    (50000, 1, 64, 2, 2, torch.float32),
    (50000, 1, 2, 64, 2, torch.float32),
    (50, 1000, 2, 64, 2, torch.float32),
    (50, 1000, 2, 2, 64, torch.float32),
    (20, 1000, 64, 2, 2, torch.bfloat16),
]


@pytest.mark.parametrize("schedule", [None, *SCHEDULES])
@pytest.mark.parametrize("sizes", SMALLER)
def test_every_schedule(sizes, schedule):
    with fasthyper.use_backend("aten", schedule):
        once, twice = temporary(*sizes), temporary(*doubled(*sizes))
    assert once < LIMIT
    assert twice < LIMIT
    assert twice - once < MIB


# Skewed sizes at which the compiled kernels once exceeded the limit: because of z next to a slice of dH, of padding one
# instance to a whole register, or of z for the depth of one product.
VERY_SKEWED = [
    (32 * MIB, (130, 5, 16384, 32, 32), torch.float16),
    (32 * MIB, (20, 100, 2, 262144, 1), torch.float32),
    (32 * MIB, (100, 1, 65536, 2, 2), torch.float32),
    (MIB, (40, 3, 1024, 64, 64), torch.bfloat16),
    (MIB, (20, 100, 8, 16384, 4), torch.float32),
]


@pytest.mark.parametrize(("limit", "sizes", "dtype"), VERY_SKEWED, ids=str)
def test_very_skewed_sizes(limit, sizes, dtype):
    fasthyper.set_workspace_limit(limit)
    assert temporary(*sizes, dtype) < limit + MIB // 4


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_do_not_grow_with_the_batch(dtype, schedule, native, native_low_precision):
    """Outputs are few, because a processor without 16-bit products is slow."""
    sizes = (40000, 1, 64, 4, 4, dtype)  # several tiles of every operand
    with native_low_precision(native), fasthyper.use_backend("aten", schedule):
        once, twice = temporary(*sizes), temporary(*doubled(*sizes))
    assert twice < LIMIT
    assert twice - once < MIB


@pytest.mark.parametrize("schedule", [None, *SCHEDULES])
@pytest.mark.parametrize("sizes", SKEWED)
def test_skewed_sizes(sizes, schedule):
    with fasthyper.use_backend("aten", schedule):
        assert temporary(*sizes) < LIMIT


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_16_bits(schedule, native, native_low_precision):
    """Few instances, and a head of 32 MiB, which would be 64 MiB in float32."""
    sizes = (1, 4, 256, 256, 256, torch.bfloat16)
    with native_low_precision(native), fasthyper.use_backend("aten", schedule):
        assert temporary(*sizes) < LIMIT


@pytest.mark.parametrize("sizes", [(1, 300, 1, 700, 700), (2, 50, 2, 1500, 600)], ids=str)
def test_16_bits_of_several_blocks_of_outputs(sizes, native_low_precision):
    """dz is a sum over the blocks, and dW of a block may be an operand in float32."""
    fasthyper.set_workspace_limit(MIB)
    with native_low_precision(True), fasthyper.use_backend("aten", "generate"):
        assert temporary(*sizes, torch.bfloat16) < MIB + MIB // 16


HEADS = {
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "features first": lambda w: w.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "sliced": lambda w: torch.cat([w, w], 2)[:, :, ::2],
}


@pytest.mark.parametrize("schedule", [None, *SCHEDULES])
@pytest.mark.parametrize("head", HEADS)
def test_heads_of_other_strides(head, schedule):
    """No schedule may copy a head of 64 MiB as a whole."""
    with fasthyper.use_backend("aten", schedule):
        assert temporary(8, 8, 256, 256, 256, torch.float32, HEADS[head]) < LIMIT


@pytest.mark.parametrize("schedule", [None, *SCHEDULES])
def test_inputs_of_other_strides(schedule):
    """No schedule may copy x of 16 or 32 MiB, transposed or expanded, as a whole."""
    for layout in (lambda x: x.mT.contiguous().mT, lambda x: x[:1].expand_as(x)):
        with fasthyper.use_backend("aten", schedule):
            once, twice = (temporary(b, 1024, 4, 128, 8, torch.float32, x_layout=layout) for b in (32, 64))
        assert twice < LIMIT
        assert twice - once < MIB


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_lower_limit_is_kept(schedule):
    sizes = (4000, 1, 32, 32, 32, torch.float32)
    with fasthyper.use_backend("aten", schedule):
        usual = temporary(*sizes)
        fasthyper.set_workspace_limit(1 * MIB)
        little = temporary(*sizes)
    assert little < usual
    assert little < 2 * MIB


@pytest.mark.parametrize("op", ["apply", "cond_grad", "weight_grad"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_members_alone(op, schedule, factors, oracle):
    ts = factors((4000, 1, 64, 64, 64), torch.float32)
    args = [ts[i] for i in oracle.INPUTS[op]]
    with fasthyper.use_backend("aten", schedule):
        assert peak_temporary_bytes(lambda: getattr(fasthyper.ops, op)(*args)) < LIMIT


def test_between_forward_and_backward_nothing_is_kept(factors):
    """Forward allocates and keeps only its output."""
    x, z, weight, _ = factors((4000, 1, 64, 64, 64), torch.float32, requires_grad=True)
    kept = []

    def forward_then_drop():
        y = fasthyper.hyper_linear(x, z, weight)
        kept.append(y)
        return y

    before = peak_temporary_bytes(forward_then_drop)
    assert before < LIMIT
    assert sum(t.untyped_storage().nbytes() for t in kept) == 4000 * 64 * 4


def temporary_of_pairs(B, M, N, I, R, O, dtype=torch.float32) -> int:
    """Return the peak temporary bytes of a PairwiseBilinear's forward + backward with all gradients."""
    layer = PairwiseBilinear(I, R, O, bias_x=True, bias_y=True, dtype=dtype)
    x, z = (torch.randn(B, *size).to(dtype).requires_grad_() for size in ((M, I), (N, R)))
    g = torch.randn(B, M, N, O).to(dtype)

    def step():
        y = layer(x, z)
        return y, torch.autograd.grad(y, [x, z, *layer.parameters()], g)

    return peak_temporary_bytes(step)


PARSER = (32, 64, 64, 400, 400, 50)


def test_pairs_at_the_sizes_of_a_parser():
    """The two-step product keeps B·M·O·R numbers, 157 MiB, from forward to backward."""
    with fasthyper.use_backend("materialised"):
        assert temporary_of_pairs(*PARSER) > 157 * MIB
    assert temporary_of_pairs(*PARSER) < 32 * MIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pairs_do_not_grow_with_the_batch(dtype):
    fasthyper.set_workspace_limit(MIB)
    sizes = (50, 20, 20, 64, 64, 10)
    once, twice = temporary_of_pairs(*sizes, dtype), temporary_of_pairs(*doubled(*sizes), dtype)
    assert twice - once < MIB // 64


@pytest.mark.parametrize("schedule", ["generate", "project"])
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((24, 32, 32, 96, 96, 10), torch.float64),
        ((24, 32, 32, 96, 96, 10), torch.bfloat16),
        ((24, 32, 32, 96, 96, 10), torch.float16),
        ((3, 500, 700, 8, 8, 3), torch.float32),  # many members
        ((2, 900, 300, 8, 8, 2), torch.bfloat16),
        ((100, 1, 40, 40, 200, 4), torch.float32),  # one member
        ((2, 3, 5, 700, 900, 2), torch.bfloat16),  # H[o] of several tiles
        ((2, 3, 4, 20000, 5, 2), torch.float32),
        ((3, 20, 20, 8, 8, 300), torch.float32),  # many outputs
    ],
    ids=str,
)
def test_pairs_keep_a_lower_limit(sizes, dtype, schedule):
    fasthyper.set_workspace_limit(MIB)
    with fasthyper.use_backend("auto", schedule):
        assert temporary_of_pairs(*sizes, dtype) < MIB + MIB // 8


@pytest.mark.parametrize("schedule", ["generate", "project"])
def test_pairs_of_other_strides(schedule):
    """Inputs of 2.5 MiB, expanded or transposed, are not copied as a whole."""
    fasthyper.set_workspace_limit(MIB)
    pairs, grads = torch.ops.fasthyper.pairs, torch.ops.fasthyper.pairs_grads
    weight, g = torch.randn(2, 128, 128), torch.randn(80, 16, 16, 2)
    for layout in (lambda t: t[:1].expand_as(t), lambda t: t.mT.contiguous().mT):
        x, z = (layout(torch.randn(80, 64, 128))[:, ::4] for _ in range(2))
        args, choice = (x, z, weight), (False, False, "auto", schedule)
        forward = functools.partial(pairs, *args, None, *choice)
        backward = functools.partial(grads, *args, layout(g), *choice[:2], [True] * 4, *choice[2:])
        assert peak_temporary_bytes(forward) < MIB
        assert peak_temporary_bytes(backward) < MIB


RESIDENT = """
import sys, torch, fasthyper

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

B, N, R, I, O = map(int, sys.argv[1:6])
dtype = getattr(torch, sys.argv[6])
if len(sys.argv) > 7:
    fasthyper.set_backend(sys.argv[7])

def layer_and_inputs(B, N, R, I, O):
    layer = fasthyper.nn.HyperLinear(I, O, R, dtype=dtype)
    x = torch.randn(B, N, I, dtype=dtype, requires_grad=True)
    z = torch.randn(B, R, dtype=dtype, requires_grad=True)
    return layer, x, z, torch.randn(B, N, O, dtype=dtype)

def step(layer, x, z, g):
    y = layer(x, z)
    return y, torch.autograd.grad(y, [x, z, *layer.parameters()], g)

step(*layer_and_inputs(64, min(N, 8), min(R, 64), 64, 64))  # sets up libraries and thread pools
args = layer_and_inputs(B, N, R, I, O)
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")  # resets VmHWM, the peak
before = status("VmRSS")
y, grads = step(*args)
results = sum(t.untyped_storage().nbytes() for t in (y, *grads))
print(status("VmHWM") - before - results)
"""


def resident(B, N, R, I, O, dtype, *backend) -> int:
    """Return the peak resident bytes of the same step in a separate process, without outputs and gradients."""
    sizes = [str(n) for n in (B, N, R, I, O)]
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, *sizes, str(dtype).split(".")[1], *backend],
        capture_output=True,
        text=True,
        check=False,
        # malloc returns freed blocks at once: otherwise they would hide later allocations
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


linux = pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs /proc")


@linux
@pytest.mark.parametrize("case", ["per sample", "many points", HEAVY])
def test_sizes_of_the_rule_by_resident_memory(case):
    once, twice = resident(*ISSUE[case]), resident(*doubled(*ISSUE[case]))
    assert once < LIMIT
    assert twice < LIMIT


@linux
def test_resident_memory_sees_W():
    """Writing out W exceeds the limit, so the measurement works."""
    assert resident(*ISSUE["per sample"], "materialised") > 312 * MIB
