"""What torch.compile makes of the ops on a GPU: Inductor launches their kernels itself. A pretended GPU stands for one.

tests/backends/test_triton_traced.py tests the results of such launches.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fasthyper

ROOT = Path(__file__).parents[2]
LAUNCHED = re.compile(r"^ *(fold|dx_dz|weight_grad|reduce)_\d+\.run\((.*)\)$", re.M)


@pytest.fixture(scope="module")
def generated():
    """Return what generated_code.py prints."""
    if find_spec("triton") is None or torch.version.hip:
        pytest.skip("it needs Triton, and a torch in which a GPU of NVIDIA can be pretended")
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FASTHYPER_EMULATED")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
    script = ROOT / "tests" / "pretend" / "generated_code.py"
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"stderr": done.stderr}


def launched(code):
    return [name for name, _ in LAUNCHED.findall(code)]


@pytest.mark.parametrize("case", ["static", "dynamic"])
def test_inductor_launches_the_kernels(case, generated):
    forward, backward = generated[case]
    assert launched(forward) == ["fold"]
    assert sorted(launched(backward)) == ["dx_dz", "weight_grad"]
    for code in (forward, backward):
        assert "ops.fasthyper" not in code
        assert "clone" not in code  # as where Inductor takes all arguments of a kernel for its results
    assert "assuming every input is mutated" not in generated["stderr"]


def test_heads_are_read_by_descriptors(generated):
    for code in generated["static"]:
        assert "TensorDescriptor.from_tensor(" in code


def test_sizes_are_symbols(generated):
    """One graph is for all numbers of instances and points."""
    for code in generated["dynamic"]:
        for name, arguments in LAUNCHED.findall(code):
            symbols = set(re.findall(r"\bs\d+\b", arguments))
            assert len(symbols) == 2, (name, arguments)
    assert generated["other sizes"] == []


@pytest.mark.parametrize("points", [1, 30])
def test_launches_are_those_of_eager_mode(points, generated):
    """Arguments that were symbols have the values of the call, whose sizes are not those that were traced."""
    compiled, eager = generated[f"launches of {points} points"]
    eager = [launch for launch in eager if launch[0] != "reduce_points"]  # compiled code adds points up by itself
    assert [name for name, *_ in eager] == ["dx_dz", "fold", "weight_grad"]
    assert compiled == eager


def test_what_the_kernels_do_not_compute_stays_an_op(generated):
    forward, backward = generated["generate"]
    assert "ops.fasthyper.hyper_linear.default(" in forward
    assert "ops.fasthyper.hyper_linear_grads.default(" in backward


def test_exported_programs_keep_the_ops(generated):
    assert "fasthyper.hyper_linear.default" in generated["exported"]
    assert not any("fasthyper" in target or "triton" in target for target in generated["decomposed"])


def test_a_capture_that_would_compile_says_to_warm_up(generated):
    assert re.search(r"kernel fold is not compiled yet.*warm up.*same call once before", generated["while captured"])
    assert generated["after warming up"] == "no error"


def test_a_cached_graph_is_for_the_code_that_traced_it():
    """torch's cache of compiled graphs has the sources and the limit of the workspace in its keys."""
    from torch._library.triton import get_triton_kernels_for_op

    def keys(name):
        return [kernel.src for kernel in get_triton_kernels_for_op(f"fasthyper::{name}")]

    (before,) = keys("hyper_linear")
    assert keys("apply") == keys("grads") == [before]
    fasthyper.set_workspace_limit(16 << 20)
    assert keys("hyper_linear") != [before]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_torch_reads_the_key_as_a_kernel():
    from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code
    from torch._library.triton import get_triton_kernels_for_op

    (kernel,) = get_triton_kernels_for_op("fasthyper::hyper_linear")
    assert kernel.src in user_defined_triton_kernel_transitive_closure_source_code(kernel)
