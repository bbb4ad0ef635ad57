"""`import fasthyper` needs only torch and has no side effects."""

from __future__ import annotations

import os
import subprocess
import sys

OPTIONAL = ("sklearn", "matplotlib", "rich", "numpy", "pandas", "triton", "hypothesis", "pytest")

ONLY_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"{name} is not installed", name=name)

REFUSED = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Refuse())
import warnings
warnings.simplefilter("ignore")  # torch warns that numpy is missing
import torch
warnings.simplefilter("error")
import fasthyper

layer = fasthyper.nn.HyperLinear(3, 6, 5)
x, z = torch.randn(4, 3, requires_grad=True), torch.randn(4, 5, requires_grad=True)
y = layer(x, z)
y.sum().backward()
W, b = layer.materialize(z)
torch.testing.assert_close(y, torch.einsum("boi,bi->bo", W, x) + b, atol=1e-5, rtol=1e-5)
assert all(p.grad is not None for p in (x, z, *layer.parameters()))
assert not REFUSED & set(sys.modules), REFUSED & set(sys.modules)
print("right")
"""

NO_SIDE_EFFECTS = """
import sys
import torch
before, threads = set(sys.modules), torch.get_num_threads()
import fasthyper
assert not torch.cuda.is_initialized()
assert torch.get_num_threads() == threads
assert not any(name.partition(".")[0] in sys.argv[1].split(",") for name in set(sys.modules) - before)
assert not any(name.startswith(("fasthyper.experiments", "fasthyper.cli")) for name in sys.modules)
assert not any(name.startswith(("torch._dynamo", "torch._inductor")) for name in set(sys.modules) - before)
assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
print("right")
"""


def run(code: str) -> None:
    env = {**os.environ, "FASTHYPER_NO_WARNING": "1"}
    command = [sys.executable, "-c", code, ",".join(OPTIONAL)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "right"


def test_torch_is_the_only_requirement():
    run(ONLY_TORCH)


def test_importing_has_no_side_effects():
    run(NO_SIDE_EFFECTS)


def test_the_public_names_are_there():
    import fasthyper

    assert set(fasthyper.__all__) <= set(dir(fasthyper))
    for name in ("hyper_linear", "use_backend", "set_backend", "set_workspace_limit"):
        assert name in fasthyper.__all__
    assert {"nn", "ops", "__version__"} <= set(dir(fasthyper))


def test_a_star_import_takes_no_name_from_its_user():
    names = {"__version__": "1.0"}
    exec("import torch\nfrom torch import nn, ops\nimport torch.nn.functional as F", names)
    before = {name: value for name, value in names.items() if name != "__builtins__"}
    exec("from fasthyper import *", names)
    assert {name: names[name] for name in before} == before
    assert "HyperLinear" in names
