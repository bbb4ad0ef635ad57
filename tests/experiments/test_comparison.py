from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny_experiment import BOTH, SETTING, TINY

from fasthyper.experiments import ROTATION, Comparison
from fasthyper.experiments.claims import Learns, Wins
from fasthyper.experiments.comparison import parse_depths, resolve_device
from fasthyper.experiments.experiment import Axis


def tiny(**options):
    return Comparison.of(TINY, device="cpu", **options)


@pytest.mark.parametrize(
    ("text", "depths"),
    [("3", (3,)), ("2-9", tuple(range(2, 10))), ("2,4,8", (2, 4, 8)), (" 2 - 3 , 7", (2, 3, 7)), ("4,2", (4, 2))],
)
def test_depths(text, depths):
    assert parse_depths(text) == depths


@pytest.mark.parametrize(
    "text", ["", "9-2", "1", "0-3", "-3", "2.5", "a", "2,", "2--4", "2-4-6", "1e3", "٣", "99999999"]
)
def test_bad_depths(text):
    with pytest.raises(ValueError, match="depths: "):
        tiny(depths=text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("depths", ()),
        ("depths", (1, 2)),
        ("depths", (2, 2)),
        ("depths", (2.0,)),
        ("depths", (3, True)),
        ("depths", "2,2"),
        ("seeds", 0),
        ("seeds", True),
        ("seeds", 1.0),
        ("epochs", 0),
        ("epochs", 1.5),
        ("epochs", True),
        ("width", -1),
        ("batch_size", 0),
        ("batch_size", "64"),
        ("lr", 0.0),
        ("lr", -1.0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("lr", "fast"),
        ("optimizer", "lion"),
        ("schedule", "linear"),
        ("device", "tpu"),
        ("preset", "slow"),
        ("data", "svhn"),
        ("studies", ["depth", "height"]),
        ("studies", []),
        ("methods", ["hypernetwork", "film"]),
        ("learning", 0.1),
    ],
)
def test_bad_values_are_named(name, value):
    names = "depths?" if name == "depths" else name
    with pytest.raises(ValueError, match=f"^{names}: "):
        Comparison.of(TINY, **{"device": "cpu", name: value})


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"^data: 'svhn' is not a data set of tiny; known are line, curve$"):
        tiny(data="svhn")
    with pytest.raises(ValueError, match=r"^studies: 'height' is not a study of tiny; known are depth, embedding$"):
        tiny(studies=["height"])
    with pytest.raises(ValueError, match=r"^methods: 'x' is .* known are embedding, embedding_flops, hypernetwork$"):
        tiny(methods=["x"])


def test_depths_need_a_study_over_depth():
    flat = replace(TINY, studies=lambda preset, data: TINY.studies(preset, data)[1:])
    with pytest.raises(ValueError, match="depths: tiny has no study over depth"):
        Comparison.of(flat, depths="2")


def changed(**changes):
    """Return the tiny experiment with changed studies."""
    return replace(TINY, studies=lambda *of: tuple(replace(study, **changes) for study in TINY.studies(*of)))


@pytest.mark.parametrize("absent", [{"over": "film"}, {"line": "film"}, {"at": "none"}, {"least": 9}])
def test_a_claim_about_what_a_study_lacks_is_refused(absent):
    with pytest.raises(ValueError, match=r"^claims: 'It wins' is about a method or value that 'depth' lacks$"):
        Comparison.of(changed(claims=(Wins(text="It wins", **absent),)))


def test_claims_about_methods_that_are_not_chosen_are_kept():
    assert tiny(methods=["embedding"]).studies[0].claims == tiny().studies[0].claims


def test_an_axis_that_the_setting_lacks_is_refused():
    with pytest.raises(ValueError, match=r"^axis: the setting of study 'depth' has no field 'height'$"):
        Comparison.of(changed(axis=Axis("height", "height"), claims=()))


def test_a_frontier_is_over_the_size():
    with pytest.raises(ValueError, match=r"^structure: a frontier has the axis 'size', but 'depth' has 'depth'$"):
        Comparison.of(changed(structure="a product"))


def test_the_measures_that_the_studies_of_a_run_need():
    comparison = tiny()
    deep = comparison.run(comparison.studies[0], 3, "embedding", 0)
    assert comparison.measures_of(deep) == {"error", "zero"}
    read = Learns(text="", level="one", lines=("embedding:two",))
    named = changed(claims=(Wins(text="", premises=(read,)),), baseline=("three", ""), also=(("four", ""),))
    assert Comparison.of(named).studies[0].measures() == {"error", "zero", "one", "two", "three", "four"}
    alone = tiny(studies=["embedding"])
    assert {frozenset(alone.measures_of(run)) for run in alone.runs()} == {frozenset({"error"})}
    assert alone.measures_of(deep) == set()
    assert alone.measures_of(replace(alone.runs()[0], setting=replace(SETTING, lr=0.7))) == {"error"}  # as if tuned


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    with pytest.raises(ValueError, match="device: cuda was requested"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == resolve_device("cuda") == "cuda"
    assert resolve_device("cpu") == "cpu"


def test_what_is_not_named_stays_as_the_preset_has_it():
    for preset in ("quick", "paper"):
        comparison = tiny(preset=preset)
        assert comparison.studies == TINY.studies(preset, "line")
        assert (comparison.data, comparison.changed) == ("line", ())
    assert tiny(epochs=None, width=None).studies == tiny().studies


def test_what_is_chosen_and_changed():
    comparison = tiny(data="curve", methods=["embedding"], seeds=7, lr=1, epochs=3, offset=0.5)
    for study in comparison.studies:
        assert (study.methods, study.seeds) == (("embedding",), 7)
        assert (study.setting.lr, study.setting.epochs, study.setting.offset) == (1.0, 3, 0.5)
        assert isinstance(study.setting.lr, float)
    assert {run.data for run in comparison.runs()} == {"curve"}
    assert comparison.changed == ("methods embedding", "seeds 7", "lr 1", "epochs 3", "offset 0.5")


def test_studies_are_chosen_by_name():
    assert [study.name for study in tiny(studies=["embedding"]).studies] == ["embedding"]
    (study,) = tiny(depths=(4, 2)).studies
    assert (study.name, study.values) == ("depth", (4, 2))


def test_a_study_without_any_of_the_methods_is_left_out():
    assert [study.name for study in tiny(methods=["embedding_flops"]).studies] == ["depth"]


def test_a_study_keeps_its_own_axis():
    depth, embedding = tiny(depth=5).studies
    assert depth.values == (2, 3)
    assert embedding.setting.depth == 5
    with pytest.raises(ValueError, match=r"^depth: no study here"):
        tiny(studies=["depth"], depth=5)


def test_the_runs_of_a_comparison():
    comparison = tiny(depths="3,2", methods=BOTH, seeds=2, lr=1)
    found = [(run.seed, run.setting.depth, run.method) for run in comparison.runs()]
    assert found == [(seed, depth, method) for seed in (0, 1) for depth in (3, 2) for method in BOTH]
    config = json.loads(json.dumps(comparison.runs()[0].config()))
    assert set(config) == {"experiment", "protocol", "data", "method", "seed", "device", "setting", "split"}
    assert config["setting"]["lr"] == 1.0
    assert (config["experiment"], config["protocol"]) == ("tiny", 1)


def test_a_run_that_two_studies_share_is_listed_once():
    runs = tiny(seeds=1).runs()
    assert len(set(runs)) == len(runs)
    # Over depth 2 x 3; over E the embedding at 2 and 8: at 4 it is that of depth 2, as the hypernetwork is.
    assert len(runs) == 6 + 2


def test_over_e_a_method_without_an_embedding_has_one_run():
    comparison = tiny(studies=["embedding"], seeds=2)
    (study,) = comparison.studies
    hyper = {comparison.run(study, value, "hypernetwork", 0) for value in study.values}
    embed = {comparison.run(study, value, "embedding", 0).setting.embedding for value in study.values}
    assert len(hyper) == 1
    assert embed == {2, 4, 8}
    assert len(comparison.runs()) == 2 * (1 + 3)


def test_seeds_differ_between_studies():
    def studies(preset, data):
        depth, embedding = TINY.studies(preset, data)
        return replace(depth, seeds=1), replace(embedding, seeds=3, axis=Axis("width", "width"))

    comparison = Comparison.of(replace(TINY, studies=studies), device="cpu")
    assert [run.seed for run in comparison.runs()] == [0] * (6 + 6) + [1] * 6 + [2] * 6


def test_a_given_learning_rate_is_in_the_titles_that_name_another():
    frontier, depth = Comparison.of(ROTATION, lr=0.25, device="cpu").studies
    assert frontier.title == "Over all trained parameters, at tuned learning rates (changed: learning rate 0.25)"
    assert depth.title.endswith("at the paper's fixed learning rate and sizes (changed: learning rate 0.25)")
    over_rates = Comparison.of(ROTATION, preset="standard", studies=["depth", "rate"], lr=0.25, device="cpu").studies[1]
    assert over_rates.title == "Over the learning rate"


def test_two_studies_of_one_name_are_refused():
    """The rates of one would be those of the other."""
    study = TINY.studies("quick", TINY.data[0])[0]
    with pytest.raises(ValueError, match="studies: expected a name of its own for each, got depth, depth"):
        Comparison.of(replace(TINY, studies=lambda preset, data: (study, replace(study, seeds=9))), device="cpu")
