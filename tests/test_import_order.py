"""Imports only go down, from the command line to the types of the planner, and never in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fasthyper

ROOT = Path(fasthyper.__file__).parent

FLOORS = (
    ("__init__", "__main__"),
    ("cli",),
    ("experiments",),
    ("distributed",),
    ("measure", "info", "explain", "build_command"),
    ("nn",),
    ("fused",),
    ("functional", "functional_conv", "adapters"),
    ("convolution",),
    ("incidence",),
    ("ops",),
    ("backends",),
    ("planner", "compiled", "kernels"),
    ("costs",),
    ("problem", "processor", "building", "seen", "_version"),
    ("terms", "geometry", "maps"),
)
"""The floors of the package, highest first: a component imports only from itself and from lower floors."""

FLOOR = {name: height for height, names in enumerate(reversed(FLOORS)) for name in names}


def modules() -> dict[str, Path]:
    """Return the path of every module by its dotted name within the package; an __init__ has the name of its folder."""
    found = {}
    linked = (ROOT / "kernels").glob("*.py")  # rglob does not follow a link
    for path in sorted({*ROOT.rglob("*.py"), *linked}):
        *folders, name = path.relative_to(ROOT).with_suffix("").parts
        if "_compiled" not in folders:
            found[".".join(folders if name == "__init__" and folders else [*folders, name])] = path
    return found


MODULES = modules()


def imported(name: str) -> Iterator[str]:
    """Yield the modules of the package that a module imports, at its top or within a function."""
    path = MODULES[name]
    package = list(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name.removeprefix("fasthyper.") for a in node.names if a.name.startswith("fasthyper."))
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level:
                start = [*package[: len(package) - node.level + 1], *module]
            elif module[:1] == ["fasthyper"]:
                start = module[1:]
            else:
                continue
            for alias in node.names:
                inner, outer = ".".join([*start, alias.name]), ".".join(start)
                yield inner if inner in MODULES else outer or "__init__"


GRAPH = {name: set(imported(name)) - {name} for name in MODULES}


def component(name: str) -> str:
    return name.partition(".")[0]


def test_every_component_has_a_floor():
    assert {component(name) for name in MODULES} == set(FLOOR)


def test_known_imports_are_found():
    """They are relative and absolute, of modules and of names."""
    assert {"functional", "ops.register", "backends.contract"} <= GRAPH["fused"]
    assert "planner" in GRAPH["backends.cpu"]
    assert "kernels.fold" in GRAPH["backends.triton.calls"]
    assert any(component(name) == "experiments" for name in GRAPH["cli"])


@pytest.mark.parametrize("name", MODULES)
def test_no_import_goes_up(name):
    above = {other for other in GRAPH[name] if FLOOR[component(other)] > FLOOR[component(name)]}
    beside = {
        other
        for other in GRAPH[name]
        if FLOOR[component(other)] == FLOOR[component(name)] and component(other) != component(name)
    }
    allowed = {"__init__"} if name == "__main__" else set()
    assert above | beside <= allowed


def test_no_file_imports_in_a_circle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in GRAPH[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


def test_what_serves_all_experiments_imports_none_of_them():
    engine = {name for name in GRAPH if name.startswith("experiments.") and "catalogue" not in name}
    assert engine
    assert not {other for name in engine for other in GRAPH[name] if other.startswith("experiments.catalogue")}
