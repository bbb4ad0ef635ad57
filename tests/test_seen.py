"""The results that `make gpu` has recorded."""

from __future__ import annotations

import json

import pytest

from fasthyper import info, seen


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    def record(*runs):
        file = tmp_path / "seen.json"
        fields = {"device": "NVIDIA Test", "triton": "3.6.0", "torch": "2.11.0", "commit": "abc"}
        file.write_text(json.dumps([{**fields, **run} for run in runs]))
        monkeypatch.setattr(seen, "FILE", file)
        seen._read.cache_clear()

    yield record
    seen._read.cache_clear()


OLD = {"arch": "sm_90", "date": "2026-01-31", "right": ["cuda", "triton"]}
NEW = {"arch": "sm_90", "date": "2026-12-01", "right": ["triton"]}


def test_the_file_of_the_package_can_be_read():
    for run in seen.runs():
        assert set(run.right) <= {"cuda", "triton"}
        assert run.device
        assert run.date > "2026"


def test_the_latest_run_on_an_architecture_counts(recorded):
    recorded(OLD, NEW)
    assert seen.is_right("triton", "sm_90")
    assert not seen.is_right("cuda", "sm_90")
    recorded(NEW, {**OLD, "date": "2027-01-01"})
    assert seen.is_right("cuda", "sm_90")
    assert not seen.is_right("cuda", "sm_80")


def test_the_description(recorded):
    recorded()
    assert seen.describe("cuda") == "it has never run on a GPU"
    recorded(OLD)
    assert seen.describe("cuda") == "its tests passed on NVIDIA Test, 2026-01-31, with torch 2.11.0"
    recorded(OLD, NEW)
    assert seen.describe("cuda") == "its tests did not all pass on NVIDIA Test, 2026-12-01, with torch 2.11.0"
    recorded(OLD, {**NEW, "arch": "sm_80"})
    assert seen.describe("cuda").count("NVIDIA Test") == 2


FULL = {**NEW, "device": "NVIDIA Test", "torch": "2.11.0", "triton": "3.6.0", "commit": "abc"}
DAMAGED = {
    "cut": '[{"device": "NVIDIA Test", "arch": "sm',
    "empty": "",
    "binary": b"\xff\xfe\x00",
    "no list": "3",
    "no records": '["cuda"]',
    "another field": json.dumps([{**FULL, "kernels": 1}]),
    "a field is missing": json.dumps([OLD]),
    "a number": json.dumps([{**FULL, "date": 3}]),
    "a word for a list": json.dumps([{**FULL, "right": "cuda"}]),
    "nothing for a list": json.dumps([{**FULL, "right": None}]),
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("name", [*DAMAGED, "there is none"])
def test_a_damaged_file_shows_nothing(name, recorded, tmp_path):
    """The package must be imported whatever is in the file, and no kernel is taken because of it."""
    recorded()
    seen.FILE.unlink()
    if name in DAMAGED:
        text = DAMAGED[name]
        seen.FILE.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert seen.runs() == ()
    assert not seen.is_right("cuda", "sm_90")
    assert seen.describe("cuda").startswith("seen.json cannot be read (")


def test_info_says_what_was_seen():
    assert seen.describe("triton") in info.describe()
    assert seen.describe("cuda") in info.describe()
