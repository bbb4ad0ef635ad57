"""Print, as JSON, what torch.compile generates for layers on a pretended GPU. test_launches.py runs it as a process.

It stops before Triton compiles: a driver without a device names the architecture, and generated modules are not run.
"""

from __future__ import annotations

import json
import os
import types

os.environ["FASTHYPER_AUTOTUNE"] = "0"
import pretended_gpu  # noqa: F401  # before torch
import stubbed_triton
import torch
import torch._functorch.config
import torch._inductor.config
import triton
from torch._inductor.graph import GraphLowering
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

import fasthyper


class NotRun(Exception):
    """Generated code would run."""


CODE: list[str] = []


def generate(graph: GraphLowering) -> types.ModuleType:
    """Stand for GraphLowering.compile_to_module: keep the code, and return a module that raises."""
    CODE.append(graph.codegen()[0].value)

    def call(args):
        raise NotRun

    module = types.ModuleType("generated")
    module.__dict__.update(call=call, runner=None, __file__="generated", key="generated")
    return module


def code_of(f, *args, **options) -> list[str]:
    """Return the code for the forward and the backward of a function; empty if it is compiled already."""
    CODE.clear()
    compiled = torch.compile(f, fullgraph=True, **options)
    try:
        compiled(*args)
    except NotRun:
        return [*CODE]
    raise AssertionError("nothing was compiled by Inductor")


def tensors(B, N, R, I):
    x = torch.randn(*((B, I) if N == 1 else (B, N, I))).bfloat16().cuda().requires_grad_()
    return x, torch.randn(B, R).bfloat16().cuda().requires_grad_()


class Network(torch.nn.Module):
    """A layer with operations before and behind, which Inductor fuses with each other."""

    def __init__(self, R, I, O, **options):
        super().__init__()
        self.layer = fasthyper.HyperLinear(I, O, R, **options).bfloat16().cuda()

    def forward(self, x, z):
        return torch.relu(self.layer(torch.tanh(x), z * 2))


def described(value):
    """Return what a kernel gets of an argument; of a tensor, that is its address."""
    if isinstance(value, TensorDescriptor):
        return [[*value.shape], [*value.strides], [*value.block_shape]]
    return "tensor" if isinstance(value, torch.Tensor) else value


def launches_of(f, x, z) -> list:
    """Return the launches of a step, sorted; kernels do not run."""
    found = []

    def run(self, *values, grid, warmup, **named):
        given = dict(zip(self.arg_names, values, strict=False)) | named
        used = {name: described(given.get(name)) for name in (*self.arg_names, "num_warps", "num_stages")}
        found.append([self.__name__, [*grid], used])

    before, JITFunction.run = JITFunction.run, run
    try:
        f(x, z).float().pow(2).sum().backward()
    finally:
        JITFunction.run = before
    return sorted(found, key=lambda launch: launch[0])


def while_captured() -> str:
    """Return the error of a call that would compile a kernel while a graph is captured."""
    torch.cuda.is_current_stream_capturing = lambda: True
    x, z = tensors(64, 1, 64, 16)
    try:
        with torch.no_grad():
            Network(64, 16, 32)(x, z)
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.is_current_stream_capturing = lambda: False
    return "no error"


def captured_after_warming_up() -> str:
    """Return the error of the same call after it was made once outside of the capture; compilation is left out."""

    before, JITFunction._do_compile = JITFunction._do_compile, stubbed_triton.compile_
    try:
        x, z = tensors(64, 1, 64, 16)
        with torch.no_grad():
            Network(64, 16, 32)(x, z)
    finally:
        JITFunction._do_compile = before
    return while_captured()


def main() -> None:
    triton.runtime.driver.set_active(stubbed_triton.Driver())
    torch.cuda.get_rng_state = lambda *device: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.set_rng_state = lambda *state: None
    GraphLowering.compile_to_module = generate
    torch._inductor.config.fx_graph_cache = False
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.shape_padding = False  # it times products of matrices
    torch._functorch.config.enable_autograd_cache = False
    torch._functorch.config.force_non_lazy_backward_lowering = True

    found = {"while captured": while_captured()}
    network = Network(64, 16, 32)
    found["static"] = code_of(network, *tensors(64, 1, 64, 16), dynamic=False)
    affine = Network(25, 20, 20, base=True)
    found["dynamic"] = code_of(affine, *tensors(40, 30, 25, 20), dynamic=True)
    found["other sizes"] = code_of(affine, *tensors(17, 9, 25, 20), dynamic=True)
    torch._dynamo.reset()  # which also empties torch's table of kernels
    for points in (1, 30):  # the second call has other sizes than the traced one
        compiled = torch.compile(network, fullgraph=True, dynamic=True, backend="aot_eager")
        launches_of(compiled, *tensors(40, points, 64, 16))
        args = tensors(41, points, 64, 16)
        found[f"launches of {points} points"] = [launches_of(f, *args) for f in (compiled, network)]
    with fasthyper.use_backend("triton", "generate"):
        found["generate"] = code_of(Network(64, 16, 32), *tensors(40, 1, 64, 16), dynamic=False)
    exported = torch.export.export(Network(64, 16, 32), tensors(64, 1, 64, 16))
    for name, table in {"exported": {}, "decomposed": None}.items():
        found[name] = [str(node.target) for node in exported.run_decompositions(table).graph.nodes]
    found["after warming up"] = captured_after_warming_up()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
