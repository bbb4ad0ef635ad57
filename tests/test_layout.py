"""The folders `kernels` and `csrc`, which the package reaches through symbolic links."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "kernels").glob("*.py"))


def python(code: str, *path: Path) -> str:
    """Run Python in the root of the repository; return its output."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["kernels", "csrc"])
def test_the_package_reaches_the_kernels_through_a_relative_link(name):
    link = ROOT / "fasthyper" / name
    assert link.is_symlink()
    assert os.readlink(link) == os.path.join("..", name)
    assert link.resolve() == (ROOT / name).resolve()


def test_the_folder_is_no_package_of_its_own():
    """`import kernels` from the root runs no code of ours, and finds an installed package of that name first.

    A folder without __init__.py is a namespace package: Python imports it, but it is empty.
    """
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import sys, kernels; print(kernels.__file__, [n for n in vars(kernels) if not n.startswith('__')],"
    code += "sorted(n for n in sys.modules if n.startswith(('kernels', 'triton', 'torch', 'fasthyper'))))"
    assert python(code) == "None [] ['kernels']"


def test_an_installed_package_of_that_name_is_found_first(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("name = 'installed'\n")
    assert python("import kernels; print(kernels.name)", tmp_path) == "installed"


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_import_only_triton_and_each_other(path):
    names = {p.stem for p in KERNELS}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} == {"triton"}
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert node.module in names
        elif isinstance(node, ast.ImportFrom):
            assert str(node.module).partition(".")[0] == "triton"
