from __future__ import annotations

import fcntl
import json
import re
from contextlib import suppress
from dataclasses import replace

import pytest
from tiny_experiment import ALL_FILES, TINY, comparison_of, files, lines, numbers

from fasthyper.experiments import run_comparison
from fasthyper.experiments.store import RunStore
from fasthyper.experiments.training import train

pytestmark = pytest.mark.usefixtures("plain_figures")


def test_torn_and_corrupt_and_changed_and_double_lines(tmp_path):
    run_comparison(comparison_of(), tmp_path)
    whole = (tmp_path / "runs.jsonl").read_bytes().splitlines(keepends=True)
    expected = numbers(lines(tmp_path))
    changed = whole[5].replace(b'"steps": 6', b'"steps": 7')
    assert changed != whole[5]
    broken = [*whole[:3], b"garbage\n", whole[1], *whole[3:5], changed, whole[6][:100]]
    (tmp_path / "runs.jsonl").write_bytes(b"".join(broken))
    problems = []
    run_comparison(comparison_of(), tmp_path, notify=problems.append)
    assert [re.search(r"line (\d): (.*);", problem).groups() for problem in problems] == [
        ("4", "is no finished run, or corrupt"),
        ("5", "this run is already listed above"),
        ("8", "is no finished run, or corrupt"),
        ("9", "is torn, its run was cut off"),
    ]
    kept = (tmp_path / "runs.jsonl").read_bytes().splitlines(keepends=True)
    assert kept[:8] == broken[:8]
    assert numbers([json.loads(line) for line in kept[:3] + kept[5:7] + kept[8:]]) == expected


def test_by_default_problems_are_warnings(tmp_path):
    run_comparison(comparison_of(seeds=1), tmp_path)
    with (tmp_path / "runs.jsonl").open("ab") as file:
        file.write(b'{"config"')
    with pytest.warns(UserWarning, match="line 5: is torn"):
        run_comparison(comparison_of(seeds=1), tmp_path)


def rank_file_of(comparison, out, number, runs):
    """Write the file that process `number` leaves if torchrun is killed."""
    store = RunStore(out / f"runs.{number}.jsonl", {})
    for run in runs:
        metrics = vars(train(comparison.experiment, run, None))
        store.append({"config": run.config(), "metrics": metrics, "versions": {"torch": "earlier"}})


def test_files_of_other_ranks_are_picked_up_and_removed(tmp_path, no_notice, trained):
    comparison = comparison_of()
    runs = comparison.runs()
    rank_file_of(comparison, tmp_path, 1, runs[1:3])
    rank_file_of(comparison, tmp_path, 2, runs[2:4])
    begun = len(trained())
    run_comparison(comparison, tmp_path, notify=no_notice)
    assert len(trained()) - begun == 8 - 3
    assert len(numbers(lines(tmp_path))) == 8
    assert sum(record["versions"] == {"torch": "earlier"} for record in lines(tmp_path)) == 3
    assert files(tmp_path) == ALL_FILES


def test_runs_of_another_configuration_in_a_rank_file_are_kept(tmp_path, no_notice):
    other = comparison_of(seeds=1, epochs=1)
    rank_file_of(other, tmp_path, 1, other.runs()[:2])
    run_comparison(comparison_of(seeds=1), tmp_path, notify=no_notice)
    assert len(numbers(lines(tmp_path))) == 4 + 2
    assert files(tmp_path) == ALL_FILES


def test_runs_of_another_experiment_in_a_rank_file_are_not_thrown_away(tmp_path):
    other = replace(comparison_of(seeds=1), experiment=replace(TINY, protocol=2))
    rank_file_of(other, tmp_path, 1, other.runs()[:1])
    before = (tmp_path / "runs.1.jsonl").read_bytes()
    run_comparison(comparison_of(seeds=1), tmp_path, notify=lambda problem: None)
    kept = [path.read_bytes() for path in tmp_path.glob("runs*.jsonl")]
    assert any(before in content for content in kept)


def test_a_rank_file_that_another_process_writes_is_not_removed(tmp_path, monkeypatch):
    """A comparison runs under torchrun while another process reports its finished runs."""
    monkeypatch.setattr("fasthyper.experiments.store._PAUSE", 0.0)
    comparison = comparison_of(seeds=1)
    run_comparison(comparison, tmp_path)
    rank_file_of(comparison, tmp_path, 1, comparison_of(seeds=2).runs()[-1:])
    with (tmp_path / "runs.1.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(ValueError):  # an error is fine, too
            run_comparison(comparison, tmp_path)
        assert (tmp_path / "runs.1.jsonl").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_two_comparisons_do_not_write_to_one_folder(tmp_path, monkeypatch, workers):
    monkeypatch.setattr("fasthyper.experiments.store._PAUSE", 0.0)
    with (tmp_path / "runs.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="out: another process is writing to"):
            run_comparison(comparison_of(), tmp_path, workers=workers)
    assert (tmp_path / "runs.jsonl").read_bytes() == b""
