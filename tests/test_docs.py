"""The pages agree with the sources: variables, macros, public names, links; and they build without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import fasthyper

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")])
CODE = ("setup.py", "Makefile", "fasthyper/**/*.py", "kernels/**/*.py", "benchmarks/**/*.py", "tests/**/*.py")
CPP = ("csrc/**/*.h", "csrc/**/*.cpp", "csrc/**/*.cu")


def in_sources(*patterns: str) -> set[str]:
    """Return all names that begin with FASTHYPER_ in the files of these patterns."""
    paths = {path for pattern in patterns for path in ROOT.glob(pattern) if path.name != Path(__file__).name}
    return set(re.findall(r"\bFASTHYPER_[A-Z0-9_]+", "\n".join(path.read_text() for path in sorted(paths))))


def in_table(heading: str) -> set[str]:
    """Return the names in the first column of the table below a heading."""
    (section,) = re.findall(rf"^#+ {heading}\n(.*?)(?=^#|\Z)", (DOCS / "environment.md").read_text(), re.S | re.M)
    rows = re.findall(r"^\| (.*?) \|", section, re.M)
    return {name for row in rows for name in re.findall(r"`(FASTHYPER_[A-Z0-9_]+)`", row)}


def test_every_environment_variable_is_in_the_table():
    assert in_table("Environment variables") == in_sources(*CODE)


def test_every_macro_is_in_the_table():
    assert in_table("Macros of the C\\+\\+ sources") == in_sources(*CPP)


def test_every_public_name_is_in_the_reference():
    pytest.importorskip("rich", reason="the experiments need the extra `compare`")
    from fasthyper import experiments

    text = (DOCS / "api.md").read_text()
    modules = {"fasthyper": fasthyper, "fasthyper.ops": fasthyper.ops, "fasthyper.experiments": experiments}
    names = {f"{module}.{name}" for module, found in modules.items() for name in found.__all__}
    names |= {f"fasthyper.nn.{name}" for name in set(fasthyper.nn.__all__) - set(fasthyper.__all__)}
    assert {name for name in names if not re.search(rf"{re.escape(name)}\b", text)} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert {link for link in links if not (page.parent / link).exists()} == set()


def test_the_readme_is_short_beside_its_results():
    text = (ROOT / "README.md").read_text()
    own = re.sub(r"(?<=by `make bench` -->\n).*?(?=<!-- end -->)", "", text, flags=re.S)
    assert len(own.splitlines()) <= 110


def test_the_readme_names_what_is_run():
    """`.ci/run` runs only a command that the README describes."""
    *_, command = (ROOT / ".ci" / "run").read_text().splitlines()
    assert re.search(rf"^{re.escape(command)} ", (ROOT / "README.md").read_text(), re.M)


@pytest.mark.skipif(find_spec("sphinx") is None, reason="the extra `docs` is not installed")
def test_the_pages_build_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "--quiet", "-W", "--keep-going", "--builder", "html", "docs", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "HyperLinear" in (tmp_path / "api.html").read_text()
