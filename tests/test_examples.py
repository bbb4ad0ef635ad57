"""The examples run, and their losses fall."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
ARGUMENTS = {
    "clipped_gradients.py": "--epochs 3 --batches 12",
    "maml.py": "--epochs 3 --batches 12 --tasks 8 --width 16",
    "newton.py": "--epochs 3 --instances 16",
    "divided_head.py": "--epochs 3 --batches 8 --width 256 --hidden 32",
    "qm9_message_passing.py": "--epochs 3 --batches 6 --molecules 8 --width 16 --hidden 16",
    "ragged_graphs.py": "--epochs 3 --batches 8 --graphs 16 --width 16 --hidden 32",
}
LAUNCHERS = {"divided_head.py": "-m torch.distributed.run --standalone --nproc-per-node 2"}


def losses(name: str, *more: str) -> list[float]:
    """Run an example; return the losses that it prints."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, *LAUNCHERS.get(name, "").split(), str(EXAMPLES / name), *ARGUMENTS[name].split(), *more]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return [float(loss) for loss in re.findall(r"^epoch \d+: loss (\S+), \S+ s$", done.stdout, re.M)]


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_loss_falls(name):
    first, _, last = losses(name)
    assert last < 0.9 * first


@pytest.mark.skipif(find_spec("torch_geometric") is None, reason="PyTorch Geometric is not installed")
def test_the_other_layer_learns_the_same():
    ours, theirs = losses("qm9_message_passing.py"), losses("qm9_message_passing.py", "--layer", "pyg")
    assert ours == pytest.approx(theirs, rel=1e-3)
