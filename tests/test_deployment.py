"""Models in other people's tools: decomposed exports, ONNX, AOTInductor, torch.fx, torch.jit and the profiler."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from shutil import which

import pytest
import torch
from torch import nn

import fasthyper
from fasthyper import Bilinear, HyperLinear, Hypernetwork, PairwiseBilinear, hyper_linear, hyperize
from fasthyper.nn import CondConv2d, HyperConv2d, HyperConvTranspose2d, NNConv, QMixer, RGCNConv

R = 5
some = torch.randn


class Graph(nn.Module):
    """A layer over the edges of a graph, with an incidence that is made inside."""

    def __init__(self):
        super().__init__()
        self.layer = HyperLinear(4, 6, R)

    def forward(self, x, z, source, target):
        numbers = {"num_sources": x.shape[0], "num_targets": x.shape[0]}
        return self.layer(x, z, fasthyper.Incidence(source=source, target=target, **numbers))


def sequence():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def points(b):
    return some(b, 7, 4), some(b, R)


def one_point(b):
    return some(b, 4), some(b, R)


def images(b):
    return some(b, 4, 8, 7), some(b, R)


def edges(e):
    return some(3 * e, 4), some(e, R), torch.randint(0, 3 * e, (e,)), torch.randint(0, 3 * e, (e,))


MODELS = {
    "points": (lambda: HyperLinear(4, 6, R), points),
    "one point": (lambda: HyperLinear(4, 6, R), one_point),
    "a rank": (lambda: HyperLinear(4, 6, R, rank=2), points),
    "a function of the weights": (lambda: HyperLinear(4, 6, R, weight_map="softplus"), points),
    "normalized rows": (lambda: HyperLinear(4, 6, R, weight_map="normalize"), one_point),
    "convolution": (lambda: HyperConv2d(4, 6, (3, 2), R, padding=1, stride=2), images),
    "transposed convolution": (lambda: HyperConvTranspose2d(4, 6, 3, R, padding=1, stride=2), images),
    "network": (lambda: Hypernetwork(nn.Linear(R, R), hyperize(sequence(), R)), points),
    "repeated z": (
        lambda: Hypernetwork(nn.Linear(R, R), hyperize(sequence(), R), repeat_z=True),
        lambda b: (some(3 * b, 4), some(b, R)),
    ),
    "graph": (Graph, edges),
    "pairs": (lambda: PairwiseBilinear(4, R, 3), lambda b: (some(b, 6, 4), some(b, 7, R))),
}


@pytest.fixture(params=MODELS)
def case(request):
    """Return a model, a function that makes its inputs for a batch size, and the dynamic shapes of a batch."""
    make, inputs = MODELS[request.param]
    model = make().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model, inputs, tuple({0: torch.export.Dim.AUTO} for _ in inputs(4))


def ours(graph):
    return [str(node.target) for node in graph.nodes if "fasthyper" in str(node.target)]


class TestExport:
    def test_decomposed_by_default(self, case):
        model, inputs, shapes = case
        program = torch.export.export(model, inputs(4), dynamic_shapes=shapes)
        assert ours(program.graph)
        program = program.run_decompositions()
        assert ours(program.graph) == []
        for b in (2, 9):
            args = inputs(b)
            torch.testing.assert_close(program.module()(*args), model(*args), atol=1e-5, rtol=1e-4)

    def test_a_user_keeps_an_op(self):
        program = torch.export.export(HyperLinear(4, 6, R), points(4))
        table = torch.export.default_decompositions()
        del table[torch.ops.fasthyper.hyper_linear.default]
        assert ours(program.run_decompositions(table).graph) == ["fasthyper.hyper_linear.default"]
        assert ours(program.run_decompositions({}).graph) == ["fasthyper.hyper_linear.default"]
        assert ours(program.run_decompositions(fasthyper.ops.decompositions()).graph) == []

    def test_compiled_code_keeps_the_ops(self):
        found = []

        def look(graph, args):
            found.extend(ours(graph.graph))
            return graph

        from torch._dynamo.backends.common import aot_autograd
        from torch._inductor.decomposition import select_decomp_table

        layer, (x, z) = HyperLinear(4, 6, R), points(4)
        backend = aot_autograd(fw_compiler=look, bw_compiler=look, decompositions=select_decomp_table)
        torch.compile(layer, backend=backend)(x, z).sum().backward()
        assert found == ["fasthyper.hyper_linear.default", "fasthyper.hyper_linear_grads.default"]

    def test_inductor_has_a_table_without_ours(self):
        """Made while fasthyper is imported: Inductor refuses an op that has both a fallback and a decomposition."""
        code = "import torch, fasthyper; from torch._inductor.decomposition import decompositions as table; "
        code += "print([op for op in table if 'fasthyper.' in str(op)])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.stdout.strip() == "[]", done.stderr

    def test_a_program_runs_without_fasthyper(self, tmp_path):
        model = Hypernetwork(nn.Linear(R, R), hyperize(sequence(), R))
        shapes = ({0: torch.export.Dim.AUTO},) * 2
        program = torch.export.export(model, points(4), dynamic_shapes=shapes).run_decompositions()
        torch.export.save(program, tmp_path / "model.pt2")
        run_alone("torch.export.load('model.pt2').module()", model, points(9), tmp_path)


def run_alone(load, model, args, folder):
    """Compare a loaded model with ours, in a process that cannot import fasthyper."""
    torch.save((args, model(*args).detach()), folder / "data.pt")
    code = f"""
import sys, torch
args, y = torch.load("data.pt")
torch.testing.assert_close({load}(*args), y, atol=1e-5, rtol=1e-4)
assert not any(name.startswith("fasthyper") for name in sys.modules)
print("right")
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.stdout.split()[-1:] == ["right"], done.stderr


def test_onnx(case):
    pytest.importorskip("onnxscript", reason="the extra `deploy` is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the extra `deploy` is not installed")
    model, inputs, shapes = case
    program = torch.onnx.export(model, inputs(4), dynamo=True, dynamic_shapes=shapes, verbose=False)
    file = io.BytesIO()
    program.save(file)
    session = runtime.InferenceSession(file.getvalue())
    for b in (2, 9):
        args = inputs(b)
        given = {name.name: t.numpy() for name, t in zip(session.get_inputs(), args, strict=True)}
        (y,) = session.run(None, given)
        torch.testing.assert_close(torch.from_numpy(y), model(*args).detach(), atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(which("g++") is None, reason="AOTInductor needs a compiler")
@pytest.mark.parametrize("name", ["network", "convolution"])
def test_aot_inductor(name, tmp_path):
    make, inputs = MODELS[name]
    model = make().eval()
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(model, inputs(4), dynamic_shapes=(batch, batch)).run_decompositions()
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    run_alone("torch._inductor.aoti_load_package('model.pt2')", model, inputs(9), tmp_path)


EDGES = torch.tensor([[0, 1, 2, 2], [1, 0, 1, 3]])
LAYERS = {
    **{name: MODELS[name] for name in MODELS if name != "graph"},
    "a norm": (
        lambda: Hypernetwork(
            nn.Linear(R, R), hyperize(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), R, types=("linear", "norm"))
        ),
        points,
    ),
    "bilinear": (lambda: Bilinear(4, R, 3), one_point),
    "experts": (lambda: CondConv2d(4, 6, 3, num_experts=R), images),
    "mixer": (lambda: QMixer((R,), 8, 3), lambda b: (some(b, 3, 1), some(b, R))),
    "edges": (lambda: NNConv(4, 6, nn.Linear(R, 24)), lambda b: (some(b, 4), EDGES, some(4, R))),
    "relations": (lambda: RGCNConv(4, 6, 3, 2), lambda b: (some(b, 4), EDGES, torch.tensor([0, 1, 2, 0]))),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    make, inputs = LAYERS[request.param]
    model = make()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model, inputs


class Two(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, z):
        return 2 * self.layer(torch.relu(x), z)


class Three(Two):
    def forward(self, x, z, w):
        return 2 * self.layer(torch.relu(x), z, w)


class TestFx:
    def test_a_layer_is_one_node(self, layer):
        model, inputs = layer
        args = inputs(4)
        around = (Two if len(args) == 2 else Three)(model)
        traced = torch.fx.symbolic_trace(around)
        assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["layer"]
        again = pickle.loads(pickle.dumps(torch.fx.symbolic_trace(traced)))
        for b in (4, 8):
            args = inputs(b)
            torch.testing.assert_close(traced(*args), around(*args))
            torch.testing.assert_close(again(*args), around(*args))

    def test_inside_a_network(self):
        """The network itself is what fx traces: its layers are nodes, with the z of the trunk."""
        model = Hypernetwork(nn.Linear(R, R), hyperize(sequence(), R))
        traced = torch.fx.symbolic_trace(model)
        called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
        assert called == ["trunk", "primary.0", "primary.1", "primary.2"]
        x, cond = points(4)
        torch.testing.assert_close(traced(x, cond), model(x, cond))
        ids = fasthyper.Incidence.from_batch(torch.tensor([0, 1, 1, 3, 2]))
        x = some(5, 4)
        torch.testing.assert_close(traced(x, cond, incidence=ids), model(x, cond, incidence=ids))

    def test_repeated_z_is_refused_inside_a_network(self):
        model = Hypernetwork(nn.Linear(R, R), hyperize(sequence(), R), repeat_z=True)
        with pytest.raises(ValueError, match=r"repeat_z must be False where torch\.fx traces the primary"):
            torch.fx.symbolic_trace(model)

    def test_functions(self):
        class Functions(nn.Module):
            def forward(self, x, z, weight, image, kernel, a, b):
                y = hyper_linear(x, z, weight, weight_map="tanh")
                p = fasthyper.hyper_conv2d(image, z, kernel, padding=1)
                q = fasthyper.hyper_conv_transpose1d(x.transpose(1, 2), z, weight.unsqueeze(2).transpose(0, 1))
                return y, p, q, fasthyper.low_rank_linear(x, a, b, alpha=2.0)

        args = (*points(4), some(6, 4, R), some(4, 3, 8, 8), some(2, 3, 3, 3, R), some(4, 2, 4), some(4, 6, 2))
        traced = torch.fx.symbolic_trace(Functions())
        assert [node.op for node in traced.graph.nodes].count("call_function") == 4
        again = pickle.loads(pickle.dumps(torch.fx.symbolic_trace(traced)))
        torch.testing.assert_close(again(*args), Functions()(*args))

    def test_a_subclass_sees_the_functions(self):
        """As those of torch: by ``__torch_function__``, which may replace them."""
        seen = []

        class Seeing(torch.Tensor):
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                seen.append(function)
                return super().__torch_function__(function, types, args, kwargs or {})

        x, z = points(4)
        weight = some(6, 4, R)
        y = hyper_linear(x, z.as_subclass(Seeing), weight)
        assert hyper_linear in seen
        assert type(y) is Seeing
        torch.testing.assert_close(y.as_subclass(torch.Tensor), hyper_linear(x, z, weight))


class TestJit:
    def test_traced(self, layer):
        model, inputs = layer
        if isinstance(model, (NNConv, RGCNConv)):
            with pytest.raises(NotImplementedError, match=r"jit.trace cannot record an Incidence .*: make it outside"):
                torch.jit.trace(model, inputs(4))
            return
        traced = torch.jit.trace(model, inputs(4), check_trace=False)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        for b in (4, 5, 9):
            args = inputs(b)
            torch.testing.assert_close(traced(*args), model(*args), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(loaded(*args), model(*args), atol=1e-5, rtol=1e-4)

    def test_a_traced_convolution_refuses_other_pixels(self):
        """Their number is a constant of the trace."""
        traced = torch.jit.trace(HyperConv2d(4, 6, 3, R), images(4))
        with pytest.raises((RuntimeError, ValueError), match=r"image must be \[1, 9, 9\]"):
            traced(some(4, 4, 9, 9), some(4, R))

    def test_script_is_refused(self, layer):
        model, _ = layer
        for module in (model, nn.Sequential(model)):
            with pytest.raises(NotImplementedError, match=f"script does not support {type(model).__name__}: use"):
                torch.jit.script(module)


@pytest.mark.parametrize("how", [("auto",), ("aten",), ("materialised",)])
def test_the_profiler_shows_the_ops(how):
    x, z = (t.requires_grad_() for t in points(4))
    layer, conv, image = HyperLinear(4, 6, R), HyperConv2d(4, 6, 3, R), some(4, 4, 6, 6)
    with torch.profiler.profile() as profile, fasthyper.use_backend(*how):
        (layer(x, z).sum() + conv(image, z).sum()).backward()
        hyper_linear(x, z, layer.weight, weight_map="abs").sum().backward()
    names = {event.key for event in profile.key_averages()}
    for op in ("hyper_linear", "hyper_conv", "mapped_linear"):
        assert {f"fasthyper::{op}", f"fasthyper::{op}_grads"} <= names
    assert {"HyperConvBackward", "MappedLinearBackward"} <= names
