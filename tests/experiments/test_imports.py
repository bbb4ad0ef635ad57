"""The modules of the comparison build on each other in one direction."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from fasthyper import experiments

NAME, ROOT = experiments.__name__, Path(experiments.__file__).parent


def name_of(path):
    return ".".join((NAME, *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


PATHS = {name_of(path): path for path in ROOT.rglob("*.py")}


def imported_by(path):
    """The modules of the comparison that a file imports, anywhere in it; imports for type checkers count, too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & set(PATHS)


def test_no_module_imports_itself_through_others():
    order = list(TopologicalSorter({name: imported_by(path) for name, path in PATHS.items()}).static_order())
    assert order.index(f"{NAME}.experiment") < order.index(f"{NAME}.results") < order.index(f"{NAME}.claims")


def test_the_catalogue_builds_on_what_serves_all_and_not_the_other_way_round():
    catalogue = f"{NAME}.catalogue"
    for name, path in PATHS.items():
        if name != NAME and not name.startswith(catalogue):
            assert not any(other.startswith(catalogue) for other in imported_by(path)), name
