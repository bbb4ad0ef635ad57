"""Lets the tests, and the processes that they start, import the helpers of this folder by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)


@pytest.fixture
def no_notice():
    """A `notify` for files in which nothing is wrong."""

    def notify(problem):
        raise AssertionError(problem)

    return notify


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Every run on one thread, so that numbers of this process and of others agree to the last bit."""
    monkeypatch.setattr("fasthyper.experiments.runner._cores", lambda: 1)


@pytest.fixture
def plain_figures(monkeypatch):
    """Figures are for the tests of the report; elsewhere they would take most of the time."""
    monkeypatch.setattr("fasthyper.experiments.report.figure_png", lambda results: b"a figure")
