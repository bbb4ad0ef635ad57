"""Files of results: reading, writing and replacing records."""

from __future__ import annotations

import csv
import dataclasses
import pathlib

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[2]

with pytest.MonkeyPatch.context() as path:
    path.syspath_prepend(str(ROOT))
    path.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    from example_records import HERE, record

    from benchmarks import context, records


def test_reading_returns_what_was_written(tmp_path):
    path = tmp_path / "here.csv"
    assert records.read(path) == []
    written = [
        record(median=0.125, q1=0.1, q3=0.2, rounds=7, note='a "note", with commas', temporary=1 << 33),
        record(way="copy", role="ceiling", rate=2.5e10, context=dataclasses.replace(HERE, commit="c")),
    ]
    records.write(path, written)
    assert records.read(path) == written
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"here\.csv has other columns"):
        records.read(path)


def without(path, names):
    """Delete columns of a file."""
    rows = [*csv.reader(path.read_text().splitlines())]
    kept = [i for i, name in enumerate(rows[0]) if name not in names]
    with path.open("w", newline="") as lines:
        csv.writer(lines, lineterminator="\n").writerows([row[i] for i in kept] for row in rows)


def test_older_files_lack_sizes(tmp_path):
    path = tmp_path / "here.csv"
    sizes = {"rank": 8, "kernel": 3, "stride": 2, "groups": 4, "weight_map": "abs"}
    older, newer = record(median=0.125), record(**sizes)
    records.write(path, [older])
    without(path, sizes)
    assert records.read(path) == [older]
    records.write(path, [older, newer])
    assert records.read(path) == [older, newer]
    assert len(records.by_subject([older, newer])) == 2
    assert len(records.by_subject([older, record(weight_map="abs")])) == 2
    without(path, ["hidden"])
    with pytest.raises(ValueError, match="other columns"):
        records.read(path)


def test_new_records_replace_those_of_their_subject():
    old = [record(B=1, way=way) for way in ("ours", "gone")] + [record(B=2), record(B=3)]
    new = [record(B=2, median=1.0), record(B=4)]
    found = records.merge(old, new)
    assert [(r.B, r.way, r.median) for r in found] == [
        (1, "ours", None), (1, "gone", None), (2, "ours", 1.0), (3, "ours", None), (4, "ours", None)
    ]  # fmt: skip
    assert [(r.B, r.way) for r in records.merge(old, [record(B=1)])] == [(1, "ours"), (2, "ours"), (3, "ours")]


def test_a_file_is_named_after_its_device():
    assert dataclasses.replace(HERE, device="AMD EPYC, AVX2, 2 threads").slug == "amd-epyc-avx2-2-threads"
    here = context.current_context("cpu")
    assert here.torch == torch.__version__
    assert f"{torch.get_num_threads()} threads" in here.device
