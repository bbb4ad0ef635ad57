"""Make the helpers of this folder importable by name, in the tests and in the processes that they start."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)


@pytest.fixture
def no_notice():
    """Return a `notify` that fails the test."""

    def notify(problem):
        raise AssertionError(problem)

    return notify


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Train every run on one thread, so that results of several processes agree in every bit."""
    monkeypatch.setattr("fasthyper.experiments.runner._cores", lambda: 1)


@pytest.fixture
def plain_figures(monkeypatch):
    """Do not draw figures: in tests of other things they would take most of the time."""
    monkeypatch.setattr("fasthyper.experiments.report.panels", lambda results: ("a figure",))


@pytest.fixture
def trained(tmp_path_factory, monkeypatch):
    """Return a function that returns the configurations of the runs that started, in all processes."""
    log = tmp_path_factory.mktemp("log") / "trained"
    monkeypatch.setenv("TINY_LOG", str(log))
    return lambda: log.read_text().splitlines() if log.exists() else []
