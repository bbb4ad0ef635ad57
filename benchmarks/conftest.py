"""Options of `pytest benchmarks`, the device, and a summary of peak memory below pytest-benchmark's tables of times."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from .devices import CPU, GPU
from .records import FORWARD_BACKWARD, MODES

MEMORY = pytest.StashKey[dict[str, dict[str, int]]]()
"""Peak temporary bytes by group and way."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("fasthyper", "fasthyper's benchmarks; -k chooses workloads and ways by name")
    group.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where to run (default: cpu)")
    group.addoption(
        "--dtypes",
        metavar="LIST",
        default="float32",
        help="dtypes, separated by commas: float32, bfloat16, float16 (default: float32)",
    )
    group.addoption(
        "--modes",
        metavar="LIST",
        default=FORWARD_BACKWARD,
        help=f"modes of a step, separated by commas: {', '.join(MODES)} (default: {FORWARD_BACKWARD})",
    )
    group.addoption("--compiled", action="store_true", help="also measure ways with torch.compile, seconds each")


def pytest_configure(config: pytest.Config) -> None:
    """Start with no measurements."""
    config.stash[MEMORY] = {}


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> Iterator[CPU | GPU]:
    """Return the device, with two threads on a CPU, as in `make bench`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    yield CPU() if pytestconfig.getoption("device") == "cpu" else GPU()
    torch.set_num_threads(threads)


@pytest.fixture
def report_memory(pytestconfig: pytest.Config) -> Callable[[str, str, int], None]:
    """Return a function of (group, way, bytes) that adds a line to the summary of memory."""

    def add(group: str, way: str, size: int) -> None:
        pytestconfig.stash[MEMORY].setdefault(group, {})[way] = size

    return add


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the peak memory of each way, the least first."""
    groups = config.stash[MEMORY]
    if groups:
        terminalreporter.section("peak temporary memory in MiB, without outputs and gradients")
    for group, ways in groups.items():
        terminalreporter.write_line(group)
        for way, size in sorted(ways.items(), key=lambda item: item[1]):
            terminalreporter.write_line(f"  {size / 2**20:12.2f}  {way}")
