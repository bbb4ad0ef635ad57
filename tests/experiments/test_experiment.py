from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from made_up import DEPTH, PERCENT
from tiny_experiment import BOTH, SETTING, TINY, TinySetting

from fasthyper.experiments.experiment import Examples, Line, Run, Study
from fasthyper.experiments.setting import Setting, is_integer


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", -1),
        ("width", 0),
        ("depth", 1),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("momentum", -0.5),
        ("offset", float("inf")),
        ("optimizer", "lion"),
        ("schedule", "linear"),
    ],
)
def test_a_setting_that_cannot_be_run_is_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}: "):
        TinySetting(**{**asdict(SETTING), name: value})


def test_the_smallest_settings_are_fine():
    Setting(epochs=1, lr=1e-9, batch_size=1, momentum=0.0)
    TinySetting(epochs=1, lr=1e-9, batch_size=1, depth=2, width=1, embedding=1)


def test_true_counts_nothing():
    assert is_integer(3)
    assert not any(map(is_integer, (True, 3.0, "3", None)))


def test_examples_are_entries_of_tensors():
    tensors = torch.arange(12.0).view(4, 3), torch.arange(8.0).view(4, 2), torch.arange(4.0).view(4, 1)
    examples = Examples.of(*tensors)
    assert examples.count == 4
    chosen = torch.tensor([2, 0])
    for found, whole in zip(examples.draw(chosen, torch.Generator()), tensors, strict=True):
        assert torch.equal(found, whole[chosen])


def study_of(**more):
    return Study("s", "S", DEPTH, (2, 3), BOTH, SETTING, 2, PERCENT, **more)


def test_a_study_draws_a_line_for_each_method_and_level():
    lines = study_of(levels=(("zero", "answering zero"),)).all_lines()
    assert [(line.key, line.dashed) for line in lines] == [
        ("hypernetwork:error", False),
        ("embedding:error", False),
        ("hypernetwork:zero", True),
    ]


def test_a_study_may_name_its_own_lines():
    own = (Line("hypernetwork", "error", "one"), Line("embedding", "apart", "two"))
    study = study_of(lines=own)
    assert study.all_lines() == own
    alone = study.only(["embedding"])
    assert alone.methods == ("embedding",)
    assert alone.all_lines() == own[1:]


def test_the_setting_at_a_value():
    study = study_of()
    assert study.setting_at(7).depth == 7
    assert asdict(study.setting_at(7)) == {**asdict(SETTING), "depth": 7}
    with pytest.raises(ValueError, match="depth: expected an integer of at least 2, got 1"):
        study.setting_at(1)


def test_a_run_is_known_by_all_that_decides_its_numbers():
    run = Run("tiny", 1, "line", "embedding", 3, "cpu", SETTING)
    assert run.config() == {
        "experiment": "tiny",
        "protocol": 1,
        "data": "line",
        "method": "embedding",
        "seed": 3,
        "device": "cpu",
        "setting": asdict(SETTING),
        "split": "test",
    }


def test_data_drawn_from_the_seed_need_no_loading():
    assert TINY.load("line", None) is None
