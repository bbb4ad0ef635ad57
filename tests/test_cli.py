from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from urllib.error import URLError

import pytest
import sklearn.datasets
import torch
from typer.testing import CliRunner

from fasthyper import cli, experiments

FAST = ["--depths", "2", "--seeds", "2", "--epochs", "1", "--width", "8", "--device", "cpu"]


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def test_compare_ends_with_a_table_and_a_report(tmp_path):
    result = call("compare", "rotation", *FAST, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for text in (
        "N_f or N_e",
        "N_g or N_q",
        "peak temporary memory",
        "hypernetwork",
        "embedding",
        "±",
    ):
        assert text in result.output
    assert "4/4 epochs" in result.output
    assert f"Report: {tmp_path / 'out' / 'report.md'}" in result.output
    assert sorted(os.listdir(tmp_path / "out")) == ["errors.png", "report.md", "runs.jsonl", "summary.csv"]
    again = call("compare", "rotation", *FAST, "--out", tmp_path / "out")
    assert again.exit_code == 0
    assert "epochs" not in again.output


def test_a_torn_line_is_a_warning(tmp_path):
    call("compare", "rotation", *FAST, "--out", tmp_path)
    with (tmp_path / "runs.jsonl").open("ab") as file:
        file.write(b'{"config": {"exp')
    result = call("compare", "rotation", *FAST, "--out", tmp_path)
    assert result.exit_code == 0
    assert f"warning: {tmp_path / 'runs.jsonl'}, line 5: is torn" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--data", "svhn"], "data"),
        (["--depths", "9-2"], "depths"),
        (["--depths", "1"], "depths"),
        (["--depths", "two"], "depths"),
        (["--seeds", "0"], "seeds"),
        (["--epochs", "0"], "epochs"),
        (["--width", "-3"], "width"),
        (["--lr", "0"], "lr"),
        (["--lr", "nan"], "lr"),
        (["--batch-size", "0"], "batch_size"),
        (["--device", "tpu"], "device"),
        (["--device", "cuda"], "device"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, arguments, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = call("compare", "rotation", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {name}: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    result = call("compare", "rotation", "--out", tmp_path / "file" / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: out: cannot write to {tmp_path / 'file' / 'out'}")
    assert result.stderr.count("\n") == 1


def test_without_a_network(tmp_path, monkeypatch):
    def fetch(*args, **options):
        raise URLError("no route")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    home, out = tmp_path / "home", tmp_path / "out"
    result = call("compare", "rotation", "--data", "mnist", "--data-home", home, "--out", out)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: data: mnist is not in {home}")
    assert "api/v1/json/data/554.gz" in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_stopped_by_hand_it_says_how_to_go_on(tmp_path, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiments, "run_comparison", stop)
    result = call("compare", "rotation", *FAST, "--out", tmp_path)
    assert result.exit_code == 130
    assert f"finished runs are kept in {tmp_path}; the same command goes on" in result.stderr


def test_python_m_fasthyper_is_the_command():
    command = [sys.executable, "-m", "fasthyper", "compare", "rotation", "--data", "svhn"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: data: 'svhn' is not a data set of rotation; known are digits, mnist, cifar10\n"


def test_without_the_extras_one_line_says_what_to_install():
    hidden = "import sys; sys.modules['rich'] = None; import fasthyper.cli"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "fasthyper: this needs rich, not installed here: pip install fasthyper[compare]\n"


def test_compare_names_what_it_lacks(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "sklearn" else find(name))
    result = call("compare", "rotation")
    assert result.exit_code == 1
    assert "pip install fasthyper[compare]" in result.output
