"""Python's share of a call on a GPU, as measured without one."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks import overhead


@pytest.mark.parametrize("backend", overhead.BACKENDS)
def test_a_backend_is_measured_in_a_process_of_its_own(backend, monkeypatch):
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    monkeypatch.setattr(overhead, "BACKENDS", (backend,))
    rows = overhead.measure(repeats=1, calls=3)
    assert [row["shape"] for row in rows] == list(overhead.SHAPES)
    for row in rows:
        assert row["backend"] == backend
        assert min(row[name] for name in ("forward", "both", "threads")) > 0
    assert f"| {backend} | QM9 | 5760, 1, 64, 27 → 32 |" in overhead.table(rows)
