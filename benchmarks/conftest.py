"""Options of `pytest benchmarks`, and peak temporary memory below pytest-benchmark's tables of times."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from .devices import CPU, GPU
from .records import BOTH, MODES

MEMORY = pytest.StashKey[list[tuple[str, str, int]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """What is measured; `-k` chooses workloads and ways by name."""
    group = parser.getgroup("fasthyper")
    group.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where (cpu)")
    group.addoption("--dtypes", default="float32", help="of float32, bfloat16, float16, with commas (float32)")
    group.addoption("--modes", default=BOTH, help=f"of {', '.join(MODES)}, with commas ({BOTH})")
    group.addoption("--compiled", action="store_true", help="torch.compile's ways, too, which compile for seconds each")


def pytest_configure(config: pytest.Config) -> None:
    """Nothing measured yet."""
    config.stash[MEMORY] = []


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> Iterator[CPU | GPU]:
    """Where, with two threads on a CPU as `make bench` has them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    yield CPU() if pytestconfig.getoption("device") == "cpu" else GPU()
    torch.set_num_threads(threads)


@pytest.fixture
def remember(pytestconfig: pytest.Config) -> Any:
    """Take down a way's peak temporary bytes for the summary."""
    return lambda group, way, size: pytestconfig.stash[MEMORY].append((group, way, size))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Memory beside time."""
    groups: dict[str, dict[str, int]] = {}
    for group, way, size in config.stash[MEMORY]:
        groups.setdefault(group, {})[way] = size
    if groups:
        terminalreporter.section("peak temporary memory, MiB, outputs and gradients apart")
    for group, ways in groups.items():
        terminalreporter.write_line(group)
        for way, size in sorted(ways.items(), key=lambda item: item[1]):
            terminalreporter.write_line(f"  {size / 2**20:12.2f}  {way}")
