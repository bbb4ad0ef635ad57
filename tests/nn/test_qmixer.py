"""`QMixer` against torchrl's, and an EPyMARL-like mixer of `HyperLinear`s against its weights written out."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasthyper.nn import HyperLinear, QMixer

SIZES = {"state_shape": (3, 4), "mixing_embed_dim": 8, "n_agents": 5}


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("torchrl.modules").QMixer


def both(theirs, **sizes):
    sizes = SIZES | sizes
    torch.manual_seed(0)
    original = theirs(**sizes | {"state_shape": torch.Size(sizes["state_shape"])}, device="cpu")
    ours = QMixer(**sizes, device="cpu")
    ours.load_state_dict(original.state_dict())
    return ours, original


def inputs(*lead, state_shape=SIZES["state_shape"], n_agents=SIZES["n_agents"]):
    torch.manual_seed(1)
    return torch.randn(*lead, n_agents, 1), torch.randn(*lead, *state_shape)


def test_the_same_start_from_the_same_seed(theirs):
    _, original = both(theirs)
    torch.manual_seed(0)
    ours = QMixer(**SIZES)
    assert [*ours.state_dict()] == [*original.state_dict()]
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), original.parameters(), strict=True))


@pytest.mark.parametrize("lead", [(), (7,), (2, 3), (0,), (4, 1, 2)])
def test_values_and_gradients(lead, theirs):
    ours, original = both(theirs)
    q, state = inputs(*lead)

    def results(mixer):
        leaf, of = q.clone().requires_grad_(), state.clone().requires_grad_()
        y = mixer(leaf, of)
        return y, mixer.mix(leaf, of), *torch.autograd.grad((y**2).sum(), [leaf, of, *mixer.parameters()])

    if lead == (0,):  # theirs cannot view an empty batch
        assert ours(q, state).shape == (0, 1)
        return
    torch.testing.assert_close(results(ours), results(original))


@pytest.mark.parametrize("sizes", [{"n_agents": 1}, {"mixing_embed_dim": 1}, {"state_shape": (6,)}], ids=str)
def test_sizes(sizes, theirs):
    ours, original = both(theirs, **sizes)
    q, state = inputs(9, **{k: v for k, v in sizes.items() if k != "mixing_embed_dim"})
    torch.testing.assert_close(ours(q, state), original(q, state))


def test_twenty_steps_of_training(theirs):
    mixers = both(theirs)
    q, state = inputs(64)
    target = torch.randn(64, 1)
    losses = [], []
    for mixer, kept in zip(mixers, losses, strict=True):
        adam = torch.optim.Adam(mixer.parameters(), 1e-2)
        for _ in range(20):
            loss = F.mse_loss(mixer(q, state), target)
            adam.zero_grad()
            loss.backward()
            adam.step()
            kept.append(loss.item())
    assert losses[0][-1] < 0.9 * losses[0][0]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    mixers[1].load_state_dict(mixers[0].state_dict())  # and back
    torch.testing.assert_close(mixers[0](q, state), mixers[1](q, state))


def test_no_value_falls_if_an_agents_grows():
    q, state = inputs(200)
    q.requires_grad_()
    for seed in range(3):
        torch.manual_seed(seed)
        (dq,) = torch.autograd.grad(QMixer(**SIZES)(q, state).sum(), q)
        assert (dq >= 0).all()
        assert (dq > 0).float().mean() > 0.9


def test_compile_autocast_copies_and_pickle():
    mixer = QMixer(**SIZES)
    q, state = inputs(6)
    expected = mixer(q, state)
    torch.testing.assert_close(torch.compile(mixer, fullgraph=True, backend="aot_eager")(q, state), expected)
    torch.testing.assert_close(copy.deepcopy(mixer)(q, state), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(mixer))(q, state), expected)
    torch.testing.assert_close(torch.export.export(mixer, (q, state)).module()(q, state), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(mixer(q, state).float(), expected, rtol=0.05, atol=0.05)
    each = torch.func.vmap(mixer)(q, state)
    torch.testing.assert_close(each, expected)


ERRORS = {
    "agents": ((6, 4, 1), (6, 3, 4), r"chosen_action_value must have shape \(\*, 5, 1\), got \(6, 4, 1\)"),
    "state": ((6, 5, 1), (6, 4, 3), r"state must have shape \(\*, 3, 4\), got \(6, 4, 3\)"),
    "batch": ((6, 5, 1), (7, 3, 4), r"leading axes of chosen_action_value \(6, 5, 1\), got \(7, 3, 4\)"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    q, state, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        QMixer(**SIZES)(torch.randn(q), torch.randn(state))


def test_errors_of_sizes():
    with pytest.raises(ValueError, match="n_agents must not be negative, got -1"):
        QMixer(**SIZES | {"n_agents": -1})
    with pytest.raises(TypeError, match=r"state_shape\[1\] must be an integer, got 2.0"):
        QMixer(**SIZES | {"state_shape": (2, 2.0)})


def test_a_mixer_of_hyper_linears():
    """Two-layer hypernetworks for both weights, as in EPyMARL, with its heads as HyperLinears."""
    agents, features, width, batch = 5, 12, 8, 16
    torch.manual_seed(0)

    def hypernetwork(outputs):
        return nn.Sequential(nn.Linear(features, 16), nn.ReLU(), nn.Linear(16, outputs))

    first, last, b1, v = hypernetwork(width * agents), hypernetwork(width), nn.Linear(features, width), hypernetwork(1)
    q, state = torch.randn(batch, agents), torch.randn(batch, features)

    def written_out():
        hidden = torch.bmm(q[:, None], first(state).abs().view(-1, width, agents).mT) + b1(state)[:, None]
        return (torch.bmm(F.elu(hidden), last(state).abs().view(-1, width, 1)) + v(state)[:, None]).view(-1, 1)

    mix1 = HyperLinear.from_head(first[2], agents, width, layout="oi", weight_map="abs")
    mix2 = HyperLinear.from_head(last[2], width, 1, weight_map="abs")

    def generated():
        hidden = F.elu(mix1(q, first[:2](state)) + b1(state))
        return mix2(hidden, last[:2](state)) + v(state)

    torch.testing.assert_close(generated(), written_out())
    trunks = [*first[:2].parameters(), *last[:2].parameters(), *b1.parameters(), *v.parameters()]
    got, expected = (torch.autograd.grad(f().square().sum(), trunks) for f in (generated, written_out))
    torch.testing.assert_close(got, expected)
