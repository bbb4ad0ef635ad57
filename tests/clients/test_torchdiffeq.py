"""torchdiffeq: a field that depends on cond, integrated, with gradients through the solver and by the adjoint."""

import pytest
import torch
from torch import nn

import fasthyper

torchdiffeq = pytest.importorskip("torchdiffeq")
R = 8


class Conditioned(nn.Module):
    """dx/dt = primary(x), with the z that is computed once for all steps of the solver."""

    def __init__(self):
        super().__init__()
        net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
        self.primary = fasthyper.hyperize(net, cond_features=R)
        self.z = None

    def forward(self, t, x):
        with fasthyper.deliver(self.z):
            return self.primary(x)


class Stateful(nn.Module):
    """dx/dt = primary(x; z), dz/dt = 0: z is a part of the state, so that the adjoint has its gradient."""

    def __init__(self, primary):
        super().__init__()
        self.primary = primary

    def forward(self, t, state):
        x, z = state
        with fasthyper.deliver(z):
            return self.primary(x), torch.zeros_like(z)


@pytest.fixture
def field():
    torch.manual_seed(0)
    return Conditioned().double()


T = torch.linspace(0, 1, 5, dtype=torch.double)


def start():
    torch.manual_seed(1)
    return torch.randn(6, 2, dtype=torch.double), torch.randn(6, R, dtype=torch.double, requires_grad=True)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_as_written_out(field, method):
    x, z = start()
    field.z = z
    y = torchdiffeq.odeint(field, x, T, method=method)
    first, act, second = field.primary
    W1, b1 = first.materialize(z)
    W2, b2 = second.materialize(z)

    def written_out(t, x):
        h = act(torch.einsum("boi,bi->bo", W1, x) + b1)
        return torch.einsum("boi,bi->bo", W2, h) + b2

    expected = torchdiffeq.odeint(written_out, x, T, method=method)
    torch.testing.assert_close(y, expected)
    wanted = [z, *field.primary.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), wanted), torch.autograd.grad(expected.square().sum(), wanted)
    )


def test_the_adjoint(field):
    """The solver runs the field in its backward pass, in a block of `deliver` that begins there."""
    x, z = start()
    whole = Stateful(field.primary)
    wanted = [z, *field.primary.parameters()]
    found = []
    for solve in (torchdiffeq.odeint, torchdiffeq.odeint_adjoint):
        y, _ = solve(whole, (x, z), T, method="rk4", options={"step_size": 0.05})
        found.append(torch.autograd.grad(y.square().sum(), wanted))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_the_adjoint_with_a_parameter_for_z(field):
    x, z = start()
    field.z = z
    found = []
    wanted = (z, *field.primary.parameters())
    for solve, more in ((torchdiffeq.odeint, {}), (torchdiffeq.odeint_adjoint, {"adjoint_params": wanted})):
        y = solve(field, x, T, method="rk4", options={"step_size": 0.05}, **more)
        found.append(torch.autograd.grad(y.square().sum(), wanted))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
