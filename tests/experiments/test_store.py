from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasthyper.experiments.files import check_writable, write_atomically
from fasthyper.experiments.store import RunStore, config_key

EXPECTED = {"experiment": "tiny", "protocol": 1}


def record(seed, **metrics):
    return {"config": {**EXPECTED, "seed": seed}, "metrics": {"error": 0.5, **metrics}, "versions": {"torch": "2.0"}}


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "runs.jsonl", EXPECTED)


def seeds(store):
    return [entry["config"]["seed"] for entry in store.load().records]


def test_what_is_appended_is_loaded(store):
    for seed in range(3):
        store.append({**record(seed), "date": "2020"})
    assert store.load().records == [{**record(seed), "date": "2020"} for seed in range(3)]
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
        # A line without its line end is still a whole record.
        expected = [0] * (cut >= first - 1) + [1] * (cut >= len(whole) - 1)
        assert seeds(store) == expected
        torn = cut not in (0, first - 1, first, len(whole) - 1)
        assert len(loaded.problems) == torn
        if torn:
            assert f"line {1 + (cut > first)}: " in loaded.problems[0]
        store.append(record(2))
        assert seeds(store) == [*expected, 2]


@pytest.mark.parametrize("length", [1, 5, 9, 10, 60])
def test_what_is_left_of_a_torn_line_is_gone_with_the_next(store, length):
    store.append(record(0))
    whole = store.path.read_bytes()
    store.path.write_bytes(whole + whole[:length])
    assert "line 2: is torn, its run was cut off; skipped" in store.load().problems[0]
    store.append(record(1))
    assert store.load().problems == []
    assert seeds(store) == [0, 1]


def test_a_digit_changed_in_a_line_is_seen(store):
    store.append(record(10, error=0.125))
    whole = store.path.read_bytes()
    digits = [place for place, byte in enumerate(whole) if chr(byte).isdigit()]
    assert len(digits) > 10
    for place in digits:
        changed = bytearray(whole)
        changed[place] = ord("3") if whole[place] != ord("3") else ord("4")
        store.path.write_bytes(changed)
        loaded = store.load()
        assert loaded.records == []
        assert "line 1: is no finished run, or corrupt; skipped" in loaded.problems[0]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"\xff\xfe",
        b"\0\0\0",
        b"[1]",
        b"null",
        b"{}",
        b"[" * 100_000,
        b'{"config": {"experiment": "tiny", "protocol": 1}, "metrics": {}, "versions": {}}',
        b'{"config": {"experiment": "tiny", "protocol": 1}, "metrics": {}, "versions": {}, "digest": 1}',
        b'{"config": 1, "metrics": {"error": 1}, "versions": {}}',
        b'{"config": {"seed": 1}, "metrics": {"error": 1}}',
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
    assert f"{store.path}, line 2: is no finished run, or corrupt" in problem
    assert line in store.path.read_bytes().splitlines()


def test_what_somebody_else_wrote_last_is_ended_and_left_alone(store):
    store.path.write_bytes(b"a note without a line end")
    store.append(record(0))
    assert store.path.read_bytes().startswith(b"a note without a line end\n{")
    assert seeds(store) == [0]


def test_of_two_equal_runs_the_first_counts(store):
    store.append(record(0, error=0.1))
    store.append(record(0, error=0.2))
    loaded = store.load()
    assert [entry["metrics"]["error"] for entry in loaded.records] == [0.1]
    assert "line 2: this run is already listed" in loaded.problems[0]


@pytest.mark.parametrize("other", [{"experiment": "large"}, {"protocol": 2}])
def test_runs_of_something_else_are_reported_and_left_alone(store, other):
    foreign = record(0)
    foreign["config"] |= other
    store.append(foreign)
    store.append(record(0))
    loaded = store.load()
    assert loaded.records == [record(0)]
    (problem,) = loaded.problems
    expected = EXPECTED | other
    what = f"a run of experiment {expected['experiment']!r}, protocol {expected['protocol']}; skipped"
    assert problem == f"{store.path}, line 1: {what}"
    assert store.path.read_bytes().count(b"\n") == 2


def test_empty_lines_are_nothing(store):
    store.path.write_bytes(b"\n\n")
    store.append(record(0))
    assert seeds(store) == [0]
    assert store.load().problems == []


def test_what_is_not_finite_becomes_null(store):
    store.append(record(0, loss=float("inf"), measures={"a": float("nan"), "b": [1.0, -float("inf")]}))
    metrics = store.load().records[0]["metrics"]
    assert metrics == {"error": 0.5, "loss": None, "measures": {"a": None, "b": [1.0, None]}}


@pytest.mark.skipif(os.name != "posix", reason="flock")
def test_two_processes_do_not_write_at_once(store, monkeypatch):
    monkeypatch.setattr("fasthyper.experiments.store._PAUSE", 0.0)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.flock(f, 2); print('held', flush=True); input()"
    command = [sys.executable, "-c", hold, str(store.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match=f"out: another process is writing to {store.path}"), store.locked():
            pass
        other.kill()
    with store.locked():
        store.append(record(0))
    assert seeds(store) == [0]


@pytest.mark.skipif(os.name != "posix", reason="flock")
def test_a_lock_is_waited_for(store, monkeypatch):
    first = RunStore(store.path, EXPECTED).locked()
    first.__enter__()
    monkeypatch.setattr(time, "sleep", lambda seconds: first.__exit__(None, None, None))
    with store.locked():
        store.append(record(0))
    assert seeds(store) == [0]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.text(), values, max_size=4))
def test_a_configuration_is_known_again_after_json_in_any_order(config):
    again = json.loads(json.dumps(dict(reversed(config.items()))))
    assert config_key(again) == config_key(config)


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


def test_several_processes_try_to_write_to_one_folder(tmp_path):
    """As the processes of torchrun do: none of them removes what another has just made."""
    folder = tmp_path / "a" / "b"
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(check_writable, folder, "runs.jsonl") for _ in range(800)]:
            done.result()
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_nothing_cannot_be_written_to(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nothing" / "there")
    with pytest.raises(ValueError, match="out: cannot write to "):
        check_writable(tmp_path / "out")


def test_where_nothing_can_be_written(tmp_path):
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "runs.jsonl").mkdir()
    for folder in (file, file / "below", tmp_path):
        with pytest.raises(ValueError, match=f"out: cannot write to {folder} "):
            check_writable(folder, "runs.jsonl")
