from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import PurePath

import pytest
from tiny_experiment import TUNED, lines

from fasthyper.experiments import EXPERIMENTS, Comparison, run_comparison, runner
from fasthyper.experiments.catalogue.record import record
from fasthyper.experiments.store import RunStore, config_key
from fasthyper.experiments.tuning import SHIPPED, shipped, tuned

pytestmark = pytest.mark.usefixtures("plain_figures")
DEPTH_RUNS, EMBEDDING_RUNS = 3 * 2 * 3 * 2, 2 * 3 * 2  # over E, most runs are those of depth 2
ALL_RUNS = DEPTH_RUNS + EMBEDDING_RUNS


@pytest.fixture
def experiment(monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "tiny", TUNED)
    return TUNED


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of a tuned comparison."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fasthyper.experiments.report.panels", lambda results: ("a figure",))
        run_comparison(comparison(), out, tune=True)
    return out


def comparison(**options):
    return Comparison.of(TUNED, device="cpu", seeds=1, **options)


def edited(whole, folder, edit):
    """Write the runs of the whole folder to another one; `edit` returns a record, or None for none."""
    store = RunStore(folder / "runs.jsonl", {})
    for found in lines(whole):
        del found["digest"]
        if (kept := edit(found)) is not None:
            store.append(kept)
    return folder


def test_what_is_recorded_is_shipped(whole, experiment, tmp_path):
    into = tmp_path / "tuning"
    path = record(whole, "quick", into)
    assert path == into / "quick" / "tiny.jsonl"
    header, *entries = map(json.loads, path.read_text().splitlines())
    assert (header["experiment"], header["versions"]) == ("tiny", lines(whole)[0]["versions"])
    assert len(entries) == ALL_RUNS
    assert {tuple(entry["measures"]) for entry in entries} == {("error",)}
    known = shipped(comparison(), into)
    assert known.keys() == {config_key(run.config()) for run in comparison().tuning_runs()}
    stored = {config_key(found["config"]): found for found in lines(whole)}
    for key, found in known.items():
        error = stored[key]["metrics"]["measures"]["error"]
        assert found["metrics"]["measures"]["error"] == (error if error is None else pytest.approx(error, rel=1e-5))
        assert "shipped, of 2" in found["versions"]["learning rates"]
    rates, expected = (tuned(comparison(), found).rates for found in (known, stored))
    assert [rate.lr for rate in rates] == [rate.lr for rate in expected]
    assert {rate.errors[1e9] for rate in rates} == {math.inf}


def test_shipped_runs_serve_any_device_and_no_other_configuration(whole, experiment, tmp_path):
    record(whole, "quick", tmp_path)
    assert len(shipped(replace(comparison(), device="cuda"), tmp_path)) == ALL_RUNS
    assert shipped(comparison(epochs=3), tmp_path) == {}
    assert shipped(replace(comparison(), experiment=replace(TUNED, protocol=2)), tmp_path) == {}
    assert shipped(comparison(data="curve"), tmp_path) == {}
    assert len(shipped(comparison(depths="2,4"), tmp_path)) == DEPTH_RUNS // 2


def test_presets_share_runs(whole, experiment, tmp_path):
    """What one preset has is not written again for another, and serves both."""
    record(whole, "quick", tmp_path)
    standard = comparison(preset="standard")
    assert len(shipped(standard, tmp_path)) == len(shipped(comparison(), tmp_path)) == ALL_RUNS
    lost = lines(whole)[5]["config"]
    (tmp_path / "fewer").mkdir()
    fewer = edited(whole, tmp_path / "fewer", lambda found: None if found["config"] == lost else found)
    path = record(fewer, "standard", tmp_path)
    assert len(path.read_text().splitlines()) == ALL_RUNS  # with the header, and without one run
    (tmp_path / "quick" / "tiny.jsonl").unlink()
    with pytest.raises(ValueError, match="lacks "):
        record(fewer, "standard", tmp_path)
    assert path.exists()


def test_a_run_without_the_measure_of_the_study_does_not_serve(whole, experiment, tmp_path):
    record(whole, "quick", tmp_path)
    depth, embedding = comparison().studies
    other = replace(comparison(), studies=(replace(depth, measure=replace(depth.measure, name="apart")), embedding))
    assert len(shipped(other, tmp_path)) == EMBEDDING_RUNS


def test_without_a_file_nothing_is_shipped(tmp_path):
    assert shipped(comparison(), tmp_path) == {}


@pytest.mark.parametrize("workers", [1, 2])
def test_shipped_runs_are_not_trained_and_not_stored(whole, experiment, tmp_path, monkeypatch, workers, no_notice):
    into = tmp_path / "tuning"
    record(whole, "quick", into)
    monkeypatch.setattr(runner, "shipped", lambda comparison: shipped(comparison, into))
    totals = set()
    for _ in range(2):
        summary = run_comparison(
            comparison(),
            tmp_path / "out",
            workers=workers,
            progress=lambda done, total, run: totals.add(total),
            notify=no_notice,
        )
    results = [found for found in lines(whole) if found["config"]["split"] == "test"]
    assert totals == {len(results)}
    written = lines(tmp_path / "out")
    assert sorted(map(config_key, (found["config"] for found in written))) == sorted(
        map(config_key, (found["config"] for found in results))
    )
    assert [rate.lr for rate in summary.rates] == [
        rate.lr for rate in run_comparison(comparison(), whole, notify=no_notice).rates
    ]
    assert any("learning rates" in versions for versions in summary.versions)


def test_asked_to_tune_it_trains_what_is_shipped(whole, experiment, tmp_path, monkeypatch):
    into = tmp_path / "tuning"
    record(whole, "quick", into)
    monkeypatch.setattr(runner, "shipped", lambda comparison: shipped(comparison, into))
    run_comparison(comparison(), tmp_path / "out", tune=True)
    assert len(lines(tmp_path / "out")) == len(lines(whole))


def test_a_folder_that_lacks_a_run_is_refused(whole, experiment, tmp_path):
    lost = lines(whole)[5]["config"]
    folder = edited(whole, tmp_path, lambda found: None if found["config"] == lost else found)
    with pytest.raises(ValueError, match=rf"lacks {lost['method']}, seed {lost['seed']}, TinySetting"):
        record(folder, "quick", tmp_path / "tuning")
    assert not (tmp_path / "tuning").exists()


def test_runs_of_several_versions_are_refused(whole, experiment, tmp_path):
    one = lines(whole)[5]["config"]
    folder = edited(
        whole, tmp_path, lambda found: {**found, "versions": {"torch": "1"}} if found["config"] == one else found
    )
    with pytest.raises(ValueError, match="expected runs of one version on one machine"):
        record(folder, "quick", tmp_path / "tuning")


def test_a_folder_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected tuning runs of one experiment on one device, got \[\]"):
        record(tmp_path, "quick")


def test_the_package_includes_the_files():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")
    root = SHIPPED.parents[3]
    if not (root / "pyproject.toml").exists():
        pytest.skip("the package is installed")
    tools = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    path = PurePath((SHIPPED / "quick" / "rotation.jsonl").relative_to(root / "fasthyper"))
    assert any(path.match(pattern) for pattern in tools["package-data"]["fasthyper"])


def test_the_shipped_files_can_be_read():
    """They serve every tuning run of their preset."""
    assert {path.relative_to(SHIPPED).as_posix() for path in SHIPPED.glob("*/*")} == {
        f"{preset}/{name}.jsonl"
        for preset in ("quick", "standard")
        for name, experiment in EXPERIMENTS.items()
        if any(study.tuning for study in experiment.studies(preset, experiment.data[0]))
    }
    for path in SHIPPED.glob("*/*"):
        assert path.suffix == ".jsonl"
        found = Comparison.of(EXPERIMENTS[path.stem], preset=path.parent.name, device="cpu")
        assert shipped(found).keys() == {config_key(run.config()) for run in found.tuning_runs()}
