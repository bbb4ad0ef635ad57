from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import nn

from fasthyper.experiments import EXPERIMENTS, Comparison
from fasthyper.experiments.catalogue.modularity import GROUPS, SUPPORTS, Teacher, never_seen, trained_on
from fasthyper.experiments.experiment import stream
from fasthyper.experiments.methods import METHODS, counts
from fasthyper.experiments.training import evaluate, train

MODULARITY = EXPERIMENTS["modularity"]


def run_of(method="hypernetwork", support="connected", **options):
    comparison = Comparison.of(MODULARITY, preset="standard", seeds=1, device="cpu", **options)
    study = next(s for s in comparison.studies if s.name == "support")
    return comparison.run(study, support, method, seed=0)


def task_of(**options):
    return MODULARITY.task(run_of(**options), None)


def all_of(examples):
    return examples.draw(torch.arange(examples.count), torch.Generator().manual_seed(3))


def pairs_in(cond):
    return {tuple(row.nonzero()[:, 0].tolist()) for row in cond}


def linked(pairs, modules):
    """Return the modules that pairs link to module 0."""
    found = {0}
    for _ in range(modules):
        found |= {m for pair in pairs if found & set(pair) for m in pair}
    return found


@pytest.mark.parametrize("modules", [6, 8, 12])
def test_connected_support_links_all_modules_and_disconnected_support_two_halves(modules):
    sees = {support: trained_on(support, modules) for support in SUPPORTS}
    assert linked(sees["connected"], modules) == set(range(modules))
    assert linked(sees["disconnected"], modules) == set(range(modules // 2))
    for combined in sees.values():
        assert {c for c in combined if len(c) == 1} == {(m,) for m in range(modules)}
        assert len(set(combined)) == len(combined)
        assert not set(combined) & set(never_seen(modules))
    everything = set(combinations(range(modules), 2))
    assert set(never_seen(modules)) == everything - set(sees["connected"]) - set(sees["disconnected"])


def test_supports_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="support: 'random' is not known; known are connected, disconnected"):
        trained_on("random", 8)
    for modules in (4, 7):
        with pytest.raises(ValueError, match=f"modules: expected an even number of at least 6, got {modules}"):
            trained_on("connected", modules)


def test_the_teacher_is_a_network_whose_weights_are_sums_of_modules():
    teacher = Teacher.drawn(8, torch.Generator().manual_seed(0))
    x, cond = torch.randn(5, 7, 16), torch.rand(5, 8)
    y = teacher(x, cond)
    for b in range(5):
        weight = sum(cond[b, m] * teacher.modules[m] for m in range(8)) / 4
        for n in range(7):
            torch.testing.assert_close(y[b, n], teacher.readout @ torch.relu(weight @ x[b, n]))


@pytest.mark.parametrize("support", SUPPORTS)
def test_no_pair_of_the_test_is_seen_in_training_or_validation(support):
    task = task_of(support=support)
    batches = {name: all_of(examples) for name, examples in vars(task).items() if hasattr(examples, "draw")}
    assert pairs_in(batches["train"].cond) == set(trained_on(support, 8))
    groups = {name: [pairs_in(c) for c in batches[name].cond.chunk(3)] for name in ("test", "validation")}
    for name, (seen, unseen, many) in groups.items():
        assert seen == set(trained_on(support, 8)), name
        assert all(len(combined) == 4 for combined in many), name
        assert unseen < set(never_seen(8)), name
    assert groups["test"][1] | groups["validation"][1] == set(never_seen(8))
    assert not groups["test"][1] & groups["validation"][1]


def test_amounts_and_inputs_are_drawn_anew():
    task = task_of()
    chosen = torch.arange(64)
    generator = torch.Generator().manual_seed(0)
    one, other = (task.train.draw(chosen, generator) for _ in range(2))
    assert not torch.equal(one.x, other.x)
    amounts = one.cond[one.cond > 0]
    assert 0.5 <= amounts.min() < 0.6 < 0.9 < amounts.max() <= 1
    assert one.x.var() == pytest.approx(1, abs=0.03)
    assert one.target[..., :-1].var() == pytest.approx(1, abs=0.6)


def test_errors_are_shares_of_the_variance_of_each_group():
    run, task = run_of(), task_of()
    teacher = Teacher.drawn(8, torch.Generator().manual_seed(stream(run.seed, "task")))

    class Answers(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = scale

        def forward(self, x, cond):
            return self.scale * teacher(x, cond)

    perfect, half = (evaluate(run, task, Answers(scale)) for scale in (1.0, 0.5))
    assert set(perfect) == set(GROUPS)
    assert max(perfect.values()) < 1e-10
    batch = all_of(task.test)
    for group, part in zip(GROUPS, batch.target[..., :-1].chunk(3), strict=True):
        variance = part.var(dim=(0, 1)).mean()
        assert half[group] == pytest.approx((0.25 * part.square().mean() / variance).item(), rel=0.15)


def test_a_hypernetwork_without_activation_in_f_is_linear_in_the_condition():
    """Its weights are sums of modules, as those of the teacher."""
    code = METHODS["hypernetwork"].model(MODULARITY.architecture(run_of())).trunk
    one, other = torch.rand(2, 1, 8)
    torch.testing.assert_close(code((one + other) / 2), (code(one) + code(other)) / 2)


def test_students_train_equally_many_parameters():
    (frontier,) = Comparison.of(MODULARITY, preset="standard", studies=["frontier"], device="cpu").studies
    sizes = {m: counts(METHODS[m].model(MODULARITY.architecture(run_of()))).trainable for m in frontier.methods}
    del sizes["embedding"]
    assert max(sizes.values()) < 1.03 * min(sizes.values())


def test_modules_are_combined_anew_only_by_the_hypernetwork_with_connected_support():
    """Short runs: the unseen pairs are well below a constant only where the paper says so."""
    found = {
        (method, support): train(MODULARITY, run_of(method, support, epochs=5), None).measures
        for method, support in (
            ("hypernetwork", "connected"),
            ("hypernetwork", "disconnected"),
            ("embedding_wide_q", "connected"),
        )
    }
    assert found["hypernetwork", "connected"]["unseen"] < 0.15
    apart = {key: measures["unseen"] / measures["seen"] for key, measures in found.items()}
    assert found["hypernetwork", "disconnected"]["seen"] < 0.1
    assert apart["hypernetwork", "disconnected"] > 1.5 * apart["hypernetwork", "connected"]
    assert found["embedding_wide_q", "connected"]["unseen"] > 0.25
