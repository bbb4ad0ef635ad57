"""The decompositions to ATen operations: each equals its op, and leaves no op of ours."""

from __future__ import annotations

import pytest
import torch
from op_examples import EXAMPLES, IDS
from torch.fx.experimental.proxy_tensor import make_fx

from fasthyper.ops import decompositions

FIRST = dict(reversed(EXAMPLES))
"""One example of each op."""


def op_of(name):
    return getattr(torch.ops.fasthyper, name).default


def ours(graph):
    return [node.target for node in graph.nodes if "fasthyper" in str(node.target)]


def test_every_op_has_a_decomposition_and_an_example():
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "fasthyper::" in name}
    assert {op.name().split("::")[1] for op in decompositions()} == registered
    assert {name for name, _ in EXAMPLES} == registered


@pytest.mark.parametrize(("name", "args"), EXAMPLES, ids=IDS)
def test_a_decomposition_equals_its_op(name, args):
    check(name, args, "real")


@pytest.mark.parametrize(("name", "args"), FIRST.items(), ids=FIRST)
def test_with_symbolic_sizes(name, args):
    check(name, args, "symbolic")


def check(name, args, tracing):
    tensors = [k for k, t in enumerate(args) if isinstance(t, torch.Tensor)]

    def run(*given):
        values = list(args)
        for k, t in zip(tensors, given, strict=True):
            values[k] = t
        return op_of(name)(*values)

    given = [args[k] for k in tensors]
    graph = make_fx(run, decompositions(), tracing_mode=tracing)(*given)
    assert ours(graph.graph) == []
    assert not any(node.target is torch.ops.aten.copy_.default for node in graph.graph.nodes)
    expected, got = run(*given), graph(*given)
    torch.testing.assert_close(got, expected)
    for a, b in zip(*(([out] if isinstance(out, torch.Tensor) else out) for out in (got, expected)), strict=True):
        assert a.stride() == b.stride() or a.is_contiguous() == b.is_contiguous()
