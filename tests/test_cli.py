from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import sklearn.datasets
import torch

from fasthyper import cli, experiments

FAST = ["--depths", "2", "--seeds", "2", "--epochs", "1", "--width", "8", "--device", "cpu", "--workers", "1"]
FAST += ["--methods", "hypernetwork,embedding"]
FILES = ["report.html", "runs.jsonl", "summary.csv"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Train on one core."""
    monkeypatch.setattr("fasthyper.experiments.runner._cores", lambda: 1)


def call(*arguments):
    out, err, code = StringIO(), StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
    if isinstance(code, str):  # Python prints the message
        err.write(code)
        code = 1
    output = out.getvalue() + err.getvalue()
    return SimpleNamespace(exit_code=code, stdout=out.getvalue(), stderr=err.getvalue(), output=output)


def test_compare_ends_with_a_table_the_findings_and_a_report(tmp_path):
    result = call("compare", "rotation", *FAST, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    lines = [line.strip() for line in result.output.splitlines()]
    assert "Rotation prediction, digits" in lines
    title = "Over the depth of f and e, at the paper's fixed learning rate and sizes: test error (%)"
    assert title in lines
    for label in ("hypernetwork ", "embedding ", "guessing "):
        (row,) = [line for line in lines if line.startswith(label)]
        assert re.search(r"\d+\.\d \[-?\d+\.\d, \d+\.\d\]$", row)
    (outcome,) = [n for n, line in enumerate(lines) if line.startswith("The paper's claim: ")]
    assert outcome < lines.index(title)
    claim = "At the paper's sizes (N_q >= N_g), the hypernetwork wins by a wide margin"
    assert any(re.match(rf"[✓✗?–] \w+.* depth +{re.escape(claim)}", line) for line in lines)
    assert "4/4 runs" in result.output
    assert f"Report: {tmp_path / 'out' / 'report.html'}" in lines
    assert sorted(os.listdir(tmp_path / "out")) == FILES
    again = call("compare", "rotation", *FAST, "--out", tmp_path / "out")
    assert again.exit_code == 0
    assert "runs," not in again.output


def test_a_torn_line_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr("fasthyper.experiments.report.panels", lambda results: ("a figure",))
    call("compare", "rotation", *FAST, "--out", tmp_path)
    with (tmp_path / "runs.jsonl").open("ab") as file:
        file.write(b'{"config": {"exp')
    result = call("compare", "rotation", *FAST, "--out", tmp_path)
    assert result.exit_code == 0
    assert f"warning: {tmp_path / 'runs.jsonl'}, line 5: is torn" in result.stderr


def test_all_experiments_and_one_report_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr("fasthyper.experiments.report.panels", lambda results: ("a figure",))
    rotation = experiments.ROTATION
    studies = lambda preset, data: tuple(s for s in rotation.studies(preset, data) if s.name == "depth")
    two = {name: replace(rotation, name=name, title=f"The {name}", studies=studies) for name in ("first", "second")}
    monkeypatch.setattr(experiments, "EXPERIMENTS", two)
    settings = ["--seeds", "1", "--epochs", "1", "--device", "cpu", "--workers", "1"]
    result = call("compare", "all", *settings, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert sorted(os.listdir(tmp_path)) == ["answer.html", "answer.md", "first", "second"]
    for name in two:
        assert sorted(os.listdir(tmp_path / name)) == FILES
    page = (tmp_path / "answer.html").read_text()
    assert "The first" in page
    assert "The second" in page
    said, path = result.output.rstrip().splitlines()[-2:]
    assert said == "No answer: No study here compares the hypernetwork with methods of equal totals."
    assert path == f"The answer: {tmp_path / 'answer.html'}"


def test_all_leaves_out_experiments_without_studies_in_the_preset(tmp_path, monkeypatch):
    begun = []

    def run(comparison, out, **options):
        begun.append((comparison.experiment.name, options["tune"]))
        raise ValueError("enough")

    monkeypatch.setattr(experiments, "run_comparison", run)
    rotation = experiments.ROTATION
    later = replace(rotation, name="later", studies=lambda preset, data: (1,) if preset == "paper" else ())
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"later": later, "rotation": rotation})
    result = call("compare", "all", "--out", tmp_path / "out")
    assert (begun, result.stderr) == ([("rotation", False)], "error: enough\n")
    result = call("compare", "later", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr == "error: preset: later has no studies in the preset quick, only in paper\n"
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"later": later})
    result = call("compare", "all", "--out", tmp_path / "out")
    assert result.stderr == "error: preset: no experiment has studies in the preset quick\n"
    result = call("compare", "all", "--preset", "slow", "--out", tmp_path / "out")
    assert result.stderr.startswith("error: preset: 'slow' is not known; known are quick, standard, paper")


def test_the_list_of_experiments():
    result = call("compare", "list")
    assert result.exit_code == 0
    names = [line.split()[0] for line in result.output.splitlines()]
    assert names == list(experiments.EXPERIMENTS)
    assert len({re.search(r"\s{2,}", line).end() for line in result.output.splitlines()}) == 1
    assert "Rotation prediction (digits, mnist, cifar10)" in result.output


def test_options_reach_the_comparison(tmp_path, monkeypatch):
    asked = []

    def run(comparison, out, **options):
        asked.append((comparison, out, options))
        raise ValueError("enough")

    monkeypatch.setattr(experiments, "run_comparison", run)
    given = [
        "--data",
        "mnist",
        "--preset",
        "paper",
        "--studies",
        "depth, rate",
        "--methods",
        "embedding",
        "--seeds",
        "3",
    ]
    given += [
        "--epochs",
        "2",
        "--lr",
        "0.5",
        "--width",
        "7",
        "--batch-size",
        "9",
        "--workers",
        "5",
        "--data-home",
        "home",
        "--tune",
    ]
    result = call("compare", "rotation", *given, "--device", "cpu", "--out", tmp_path / "out")
    assert (result.exit_code, result.stderr) == (2, "error: enough\n")
    ((comparison, out, options),) = asked
    assert (comparison.data, comparison.preset, comparison.device) == ("mnist", "paper", "cpu")
    assert [study.name for study in comparison.studies] == ["depth", "rate"]
    for study in comparison.studies:
        assert (study.methods, study.seeds) == (("embedding",), 3)
        setting = study.setting
        assert (setting.epochs, setting.width, setting.batch_size) == (2, 7, 9)
    assert comparison.studies[0].setting.lr == 0.5
    assert (out, options["data_home"], options["workers"]) == (tmp_path / "out", "home", 5)
    assert options["tune"]


@pytest.mark.parametrize("option", ["--data=digits", "--studies=depth", "--depths=2", "--methods=film", "--width=8"])
def test_all_takes_no_options_of_one_experiment(option, tmp_path):
    result = call("compare", "all", option, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert (
        result.stderr
        == "error: data, studies, methods, depths, lr, width and batch-size: of one experiment, not of all\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--data", "svhn"], "data"),
        (["--preset", "slow"], "preset"),
        (["--studies", "height"], "studies"),
        (["--methods", "hypernetwork,magic"], "methods"),
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
        (["--workers", "0"], "workers"),
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


def test_an_unknown_experiment_lists_the_known_ones():
    result = call("compare", "magic")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: name: 'magic' is not an experiment; known are all, rotation")


def test_python_m_fasthyper_is_the_command():
    command = [sys.executable, "-m", "fasthyper", "compare", "rotation", "--data", "svhn"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: data: 'svhn' is not a data set of rotation; known are digits, mnist, cifar10\n"


ALONE = """
import importlib.util, sys

REFUSED = ("rich", "typer", "sklearn", "numpy", "scipy", "matplotlib", "pandas", "jinja2")

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"{name} is not installed", name=name)

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in REFUSED else find(name, *rest)
sys.meta_path.insert(0, Refuse())
from fasthyper import cli
cli.main(sys.argv[1:])
"""


def alone(*arguments):
    """Run the command in a process that has only torch."""
    return subprocess.run([sys.executable, "-W", "ignore", "-c", ALONE, *arguments], capture_output=True, text=True)


def test_info_plan_and_build_need_only_torch():
    done = alone("info")
    assert (done.returncode, done.stderr) == (0, "")
    assert "backend         aten: ready" in done.stdout
    done = alone("plan", "--batch", "4800", "--cond", "128", "--in", "64", "--out", "64")
    assert (done.returncode, done.stderr) == (0, "")
    assert "taken: " in done.stdout
    done = alone("build", "cpu_vsx")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_without_the_extras_one_line_says_what_to_install():
    done = alone("compare", "rotation")
    assert done.returncode == 1
    what = "rich, sklearn, numpy, scipy, matplotlib, pandas, jinja2"
    assert done.stderr == f"fasthyper: this needs {what}, not installed here: pip install fasthyper[compare]\n"


def test_help_names_all_commands_and_options():
    result = call("--help")
    assert result.exit_code == 0
    for name in ("info", "plan", "build", "compare"):
        assert re.search(rf"^    {name} ", result.stdout, re.M)
        assert call(name, "--help").exit_code == 0
    for name in cli.COMPARE_OPTIONS:
        assert f"--{name} " in call("compare", "--help").stdout
    assert "--tune " in call("compare", "--help").stdout
    for name in ("cond", "in", "out", *cli.PLAN_OPTIONS):
        assert f"--{name} " in call("plan", "--help").stdout
    assert call().exit_code == 2


def test_a_reader_that_stops_early_is_no_error():
    command = f"{sys.executable} -m fasthyper info | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_compare_names_what_it_lacks(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "sklearn" else find(name))
    result = call("compare", "rotation")
    assert result.exit_code == 1
    assert "pip install fasthyper[compare]" in result.output


def test_plan_of_a_convolution():
    of = "--batch", 64, "--cond", 4, "--in", 256, "--out", 256
    result = call("plan", *of, "--image", "14x14", "--kernel", 3, "--padding", 1)
    assert result.exit_code == 0, result.output
    assert "256 → 256 channels, 14 × 14 → 14 × 14 pixels, kernel 3 × 3" in result.output
    assert "taken: generate" in result.output
    assert "taken: fold" in call("plan", *of, "--image", "4x4", "--kernel", 4).output
    for wrong in (
        ("--kernel", 3),
        ("--image", "4y4"),
        ("--image", "2x2", "--kernel", 3),
        ("--image", 4, "--groups", 3),
    ):
        result = call("plan", *of, *wrong)
        assert result.exit_code != 0
        assert "must" in result.output
