from __future__ import annotations

import json
import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasthyper.experiments.files import check_writable, write_atomically
from fasthyper.experiments.store import RunStore, key


def record(seed, **metrics):
    return {"config": {"seed": seed}, "metrics": {"test_error": 0.5, **metrics}, "versions": {}}


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "runs.jsonl", metrics=["test_error"])


def seeds(store):
    return [entry["config"]["seed"] for entry in store.load().records]


def test_what_is_appended_is_loaded(store):
    for seed in range(3):
        store.append(record(seed))
    assert seeds(store) == [0, 1, 2]
    assert store.load().problems == []
    assert store.path.read_bytes().count(b"\n") == 3


def test_no_file_is_no_runs(store):
    assert store.load().records == []
    assert not store.path.exists()


def test_a_file_cut_anywhere_keeps_its_whole_lines_and_goes_on(store):
    store.append(record(0))
    store.append(record(1))
    whole = store.path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(len(whole)):
        store.path.write_bytes(whole[:cut])
        loaded = store.load()
        # A line that lacks only its end is whole: nothing of it is missing.
        expected = [0] * (cut >= first - 1) + [1] * (cut >= len(whole) - 1)
        assert seeds(store) == expected
        torn = cut not in (0, first - 1, first, len(whole) - 1)
        assert len(loaded.problems) == torn
        if torn:
            assert f"line {1 + (cut > first)}: is torn" in loaded.problems[0]
        store.append(record(2))
        assert seeds(store) == [*expected, 2]
        assert store.load().problems == []
        for line in store.path.read_bytes().splitlines():
            json.loads(line)


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"\xff\xfe",
        b"\0\0\0",
        b"[1]",
        b"null",
        b"{}",
        b'{"config": {"seed": 1}, "metrics": {}, "versions": {}}',
        b'{"config": {"seed": 1}, "metrics": {"test_error": null}, "versions": {}}',
        b'{"config": {"seed": 1}, "metrics": {"test_error": NaN}, "versions": {}}',
        b'{"config": 1, "metrics": {"test_error": 1}, "versions": {}}',
        b'{"config": {"seed": 1}, "metrics": {"test_error": 1}}',
    ],
)
def test_a_corrupt_line_is_reported_by_number_and_left_alone(store, line):
    store.append(record(0))
    with store.path.open("ab") as file:
        file.write(line + b"\n")
    store.append(record(2))
    loaded = store.load()
    assert [entry["config"]["seed"] for entry in loaded.records] == [0, 2]
    (problem,) = loaded.problems
    assert "line 2: is not a finished run" in problem
    assert line in store.path.read_bytes().splitlines()


def test_of_two_equal_runs_the_first_counts(store):
    store.append(record(0, test_error=0.1))
    store.append(record(0, test_error=0.2))
    loaded = store.load()
    assert [entry["metrics"]["test_error"] for entry in loaded.records] == [0.1]
    assert "line 2: this run is already listed" in loaded.problems[0]


def test_empty_lines_are_nothing(store):
    store.path.write_bytes(b"\n\n")
    store.append(record(0))
    assert seeds(store) == [0]
    assert store.load().problems == []


def test_what_is_not_finite_becomes_null(store):
    store.append(record(0, train_loss=float("inf"), test_loss=float("nan")))
    metrics = store.load().records[0]["metrics"]
    assert metrics == {"test_error": 0.5, "train_loss": None, "test_loss": None}


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.text(), values, max_size=4))
def test_a_configuration_is_known_again_after_json_in_any_order(config):
    again = json.loads(json.dumps(dict(reversed(config.items()))))
    assert key(again) == key(config)


def test_writing_atomically(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a.txt"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_trying_to_write_leaves_nothing(tmp_path):
    check_writable(tmp_path / "a" / "b", "runs.jsonl")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs.jsonl").write_bytes(b"kept")
    check_writable(tmp_path, "runs.jsonl")
    assert (tmp_path / "runs.jsonl").read_bytes() == b"kept"


def test_where_nothing_can_be_written(tmp_path):
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "runs.jsonl").mkdir()
    for folder in (file, file / "below", tmp_path):
        with pytest.raises(ValueError, match=f"out: cannot write to {folder} "):
            check_writable(folder, "runs.jsonl")
