from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from fasthyper.experiments import ROTATION, Comparison, DatasetUnavailable, run_comparison
from fasthyper.experiments.data import Splits, load_images
from fasthyper.experiments.training import batches, build, evaluate, train


def tiny(data, data_home):
    splits = load_images("digits")
    return Splits(splits.train[:80], splits.test[:30])


TINY = dataclasses.replace(ROTATION, load=tiny)


def comparison_of(depths="2-3", seeds=2, epochs=2, **options):
    return Comparison.of(TINY, "digits", depths=depths, seeds=seeds, epochs=epochs, device="cpu", **options)


def lines(out):
    return [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]


def numbers(records):
    """What must not change from one time to the next."""
    return {
        json.dumps(record["config"], sort_keys=True): (
            record["metrics"]["test_error"],
            record["metrics"]["test_loss"],
            record["metrics"]["train_loss"],
            record["metrics"]["peak_temporary_bytes"],
        )
        for record in records
    }


@pytest.fixture
def no_notice():
    def notify(problem):
        raise AssertionError(problem)

    return notify


def test_everything_is_written(tmp_path, no_notice):
    out = tmp_path / "deep" / "out"
    seen = []
    comparison = comparison_of()
    summary = run_comparison(comparison, out, progress=lambda *args: seen.append(args), notify=no_notice)
    assert sorted(os.listdir(out)) == ["errors.png", "report.md", "runs.jsonl", "summary.csv"]
    records = lines(out)
    assert [record["config"] for record in records] == [run.config() for run in comparison.runs()]
    for record in records:
        assert {"fasthyper", "torch", "python", "platform"} <= set(record["versions"])
        assert 0 <= record["metrics"]["test_error"] <= 1
        assert record["metrics"]["step_seconds"] > 0
        assert record["date"].startswith("20")
    assert [done for done, _, _ in seen if done] == sorted(done for done, _, _ in seen if done)
    assert seen[0] == (0, 16, "hypernetwork, depth 2, seed 0")
    assert seen[-1] == (16, 16, "embedding, depth 3, seed 1")
    assert len(summary.rows) == 4


def test_finished_runs_are_kept(tmp_path, no_notice):
    run_comparison(comparison_of(seeds=1), tmp_path, notify=no_notice)
    before = (tmp_path / "runs.jsonl").read_bytes()
    trained = []
    run_comparison(comparison_of(), tmp_path, progress=lambda *args: trained.append(args[2]), notify=no_notice)
    assert (tmp_path / "runs.jsonl").read_bytes().startswith(before)
    assert len(lines(tmp_path)) == 8
    assert {name.split()[-1] for name in trained} == {"1"}


def test_when_all_is_finished_nothing_is_trained_or_loaded(tmp_path, no_notice):
    run_comparison(comparison_of(), tmp_path, notify=no_notice)
    before = (tmp_path / "runs.jsonl").read_bytes()
    (tmp_path / "report.md").unlink()

    def no_load(data, data_home):
        raise AssertionError("loaded")

    comparison = dataclasses.replace(comparison_of(), experiment=dataclasses.replace(TINY, load=no_load))
    run_comparison(comparison, tmp_path, notify=no_notice)
    assert (tmp_path / "runs.jsonl").read_bytes() == before
    assert (tmp_path / "report.md").exists()


def test_runs_of_another_configuration_are_left_alone(tmp_path, no_notice):
    foreign = run_comparison(comparison_of(epochs=1, seeds=1), tmp_path, notify=no_notice)
    before = lines(tmp_path)
    mixed = run_comparison(comparison_of(seeds=1), tmp_path, notify=no_notice)
    assert lines(tmp_path)[:4] == before
    assert len(lines(tmp_path)) == 8
    alone = run_comparison(comparison_of(seeds=1), tmp_path / "alone", notify=no_notice)
    assert [row.error_mean for row in mixed.rows] == [row.error_mean for row in alone.rows]
    assert all(row.seeds == 1 for row in mixed.rows)
    again = run_comparison(comparison_of(epochs=1, seeds=1), tmp_path, notify=no_notice)
    assert again.rows == foreign.rows


def test_another_protocol_is_another_configuration(tmp_path, no_notice):
    run_comparison(comparison_of(seeds=1), tmp_path, notify=no_notice)
    newer = dataclasses.replace(comparison_of(seeds=1), experiment=dataclasses.replace(TINY, protocol=2))
    run_comparison(newer, tmp_path, notify=no_notice)
    assert len(lines(tmp_path)) == 8


def test_torn_and_corrupt_and_double_lines(tmp_path):
    run_comparison(comparison_of(), tmp_path)
    whole = (tmp_path / "runs.jsonl").read_bytes()
    parts = whole.splitlines(keepends=True)
    expected = numbers(lines(tmp_path))
    broken = b"".join([*parts[:3], b"garbage\n", parts[1], *parts[3:6], parts[6][:100]])
    (tmp_path / "runs.jsonl").write_bytes(broken)
    problems = []
    summary = run_comparison(comparison_of(), tmp_path, notify=problems.append)
    assert len(problems) == 3
    for number, problem in zip((4, 5, 9), problems, strict=True):
        assert f"line {number}:" in problem
    kept = (tmp_path / "runs.jsonl").read_bytes().splitlines()
    assert kept[3] == b"garbage"
    del kept[3:5]
    assert numbers(map(json.loads, kept)) == expected
    assert all(row.seeds == 2 for row in summary.rows)


def test_by_default_problems_are_warnings(tmp_path):
    run_comparison(comparison_of(seeds=1), tmp_path)
    with (tmp_path / "runs.jsonl").open("ab") as file:
        file.write(b'{"config"')
    with pytest.warns(UserWarning, match="line 5: is torn"):
        run_comparison(comparison_of(seeds=1), tmp_path)


def test_the_numbers_depend_on_nothing_but_the_seed(tmp_path, no_notice):
    run_comparison(comparison_of(), tmp_path / "a", notify=no_notice)
    expected = numbers(lines(tmp_path / "a"))
    assert len({loss for _, _, loss, _ in expected.values()}) == 8

    runs = comparison_of().runs()
    random.Random(0).shuffle(runs)
    splits = tiny("digits", None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for run in runs[:3]:
            torch.manual_seed(123)
            metrics = train(TINY, run, splits)
            found = (metrics.test_error, metrics.test_loss, metrics.train_loss, metrics.peak_temporary_bytes)
            assert found == expected[json.dumps(run.config(), sort_keys=True)]
    finally:
        torch.set_num_threads(threads)


def test_the_number_of_threads_is_put_back(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run_comparison(comparison_of(depths="2", seeds=1, epochs=1), tmp_path)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert lines(tmp_path)[0]["versions"]["threads"] == "1"


def test_both_methods_see_the_same_data():
    hypernetwork, embedding = comparison_of(depths="2", seeds=1).runs()
    splits = tiny("digits", None)
    for _ in range(2):
        pair = [
            list(batches(TINY, run, splits.train, torch.Generator().manual_seed(3 * run.seed + 1)))
            for run in (hypernetwork, embedding)
        ]
        assert [len(batch.target) for batch in pair[0]] == [64, 16]
        for one, other in zip(*pair, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_training_and_testing_see_is_drawn_anew(monkeypatch):
    """Every epoch turns the images by other angles; the test angles depend on the seed, not on the method."""
    seen = {}

    def spy(pixels, run, generator):
        batch = ROTATION.draw(pixels, run, generator)
        seen.setdefault((run.method, run.seed), []).append(batch)
        return batch

    experiment = dataclasses.replace(TINY, draw=spy)
    comparison = comparison_of(depths="2", seeds=2)
    for run in comparison.runs():
        train(experiment, run, tiny("digits", None))
    for seed in (0, 1):
        one, other = seen["hypernetwork", seed], seen["embedding", seed]
        assert len(one) == 2 * 2 + 1 + 1  # two epochs of two batches, the test, the measurement
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a.x, b.x)
    first, second = seen["hypernetwork", 0], seen["hypernetwork", 1]
    assert not torch.equal(first[0].x, first[2].x)
    assert not torch.equal(first[4].x, second[4].x)
    assert torch.equal(first[4].cond, second[4].cond)


def test_training_is_plain_sgd():
    """One epoch by the loop against the same epoch written out."""
    run = comparison_of(depths="2", seeds=1, epochs=1, batch_size=40).runs()[1]
    splits = tiny("digits", None)
    metrics = train(TINY, run, splits)
    model = build(TINY, run)
    generator = torch.Generator().manual_seed(3 * run.seed + 1)
    losses = []
    for chosen in torch.randperm(80, generator=generator).split(40):
        batch = TINY.draw(splits.train[chosen], run, generator)
        loss = torch.nn.functional.cross_entropy(model(batch.x, batch.cond), batch.target)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= run.lr * gradient
        losses.append(loss.item())
    assert metrics.train_loss == pytest.approx(sum(losses) / 2, rel=1e-5)
    error, loss = evaluate(TINY, run, model, splits.test)
    assert metrics.test_error == pytest.approx(error)
    assert metrics.test_loss == pytest.approx(loss, rel=1e-5)
    assert model.training


def test_the_error_is_the_share_of_wrong_answers():
    run = comparison_of(depths="2", seeds=1).runs()[0]
    splits = tiny("digits", None)

    class Always(torch.nn.Module):
        def forward(self, x, cond):
            return torch.nn.functional.one_hot(torch.full((len(x),), 3), 12).float()

    error, _ = evaluate(TINY, run, Always(), splits.test)
    batch = TINY.draw(splits.test, run, torch.Generator().manual_seed(3 * run.seed + 2))
    assert error == pytest.approx((batch.target != 3).float().mean().item())


def test_data_that_cannot_be_had_write_nothing(tmp_path):
    def load(data, data_home):
        raise DatasetUnavailable("not here")

    comparison = dataclasses.replace(comparison_of(), experiment=dataclasses.replace(TINY, load=load))
    with pytest.raises(DatasetUnavailable):
        run_comparison(comparison, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="out: cannot write"):
        run_comparison(comparison_of(), tmp_path / "file")


def test_a_diverging_run_is_a_finished_run(tmp_path, no_notice):
    comparison = comparison_of(depths="2", seeds=1, lr=1e6)
    run_comparison(comparison, tmp_path, notify=no_notice)
    assert None in [record["metrics"]["train_loss"] for record in lines(tmp_path)]
    before = (tmp_path / "runs.jsonl").read_bytes()
    run_comparison(comparison, tmp_path, notify=no_notice)
    assert (tmp_path / "runs.jsonl").read_bytes() == before


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_half_way_it_goes_on(tmp_path):
    out = tmp_path / "out"
    arguments = ["--depths", "2", "--seeds", "3", "--epochs", "3", "--device", "cpu", "--out", str(out)]
    command = [sys.executable, "-m", "fasthyper", "compare", "rotation", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    runs = out / "runs.jsonl"
    deadline = time.monotonic() + 60
    while not (runs.exists() and runs.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = runs.read_bytes()
    finished = kept.count(b"\n")
    assert 2 <= finished < 6
    assert os.listdir(out) == ["runs.jsonl"]
    runs.write_bytes(kept + kept[:57])  # killed in the middle of a line

    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"line {finished + 1}: is torn" in done.stderr
    assert runs.read_bytes().startswith(kept)
    records = lines(out)
    assert len(records) == len(numbers(records)) == 6
    rows = (out / "summary.csv").read_text().splitlines()
    assert [row.split(",")[2] for row in rows[1:]] == ["3", "3"]

    uninterrupted = tmp_path / "uninterrupted"
    run_comparison(Comparison.of(ROTATION, "digits", depths="2", seeds=3, epochs=3, device="cpu"), uninterrupted)
    assert numbers(lines(uninterrupted)) == numbers(records)
