import pytest
import torch
from torch import nn

from fasthyper.nn import EmbeddingNetwork

B, I, E = 5, 3, 4


def network(primary=None):
    q = nn.Sequential(nn.Linear(I + E, 6), nn.ReLU(), nn.Linear(6, 2)) if primary is None else primary
    return EmbeddingNetwork(nn.Linear(7, E), q).double()


def concatenated(model, x, cond):
    e = model.embed(cond)
    e = e.reshape(e.shape[0], *[1] * (x.ndim - 2), E).expand(*x.shape[:-1], E)
    return model.primary(torch.cat([x, e], -1))


def data(*points, b=B):
    return torch.randn(b, *points, I, dtype=torch.float64), torch.randn(b, 7, dtype=torch.float64)


@pytest.mark.parametrize("points", [(), (1,), (8,), (0,), (2, 3)])
@pytest.mark.parametrize("primary", ["sequential", "one linear", "no bias"])
def test_is_the_concatenation(points, primary):
    model = network({"one linear": nn.Linear(I + E, 2), "no bias": nn.Linear(I + E, 2, bias=False)}.get(primary))
    x, cond = data(*points)
    x.requires_grad_()
    wanted = [x, *model.parameters()]
    results = []
    for y in (model(x, cond), concatenated(model, x, cond)):
        results.append((y, *torch.autograd.grad(y.square().sum(), wanted)))
    torch.testing.assert_close(*results)


def test_order_is_x_then_embedding():
    model = EmbeddingNetwork(nn.Identity(), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model.primary.weight.copy_(torch.tensor([[1.0, 10.0, 100.0]]))
    assert model(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])).item() == 321.0


def test_nothing_is_repeated_per_point():
    model, (x, cond) = network(), data(50)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape) or t, lambda t: t):
        model(x, cond)
    assert not any(shape[-1:] in ((I + E,), (E,)) and shape.numel() >= B * 50 * E for shape in sizes)


def test_compiled_and_vmap():
    model = network()
    f = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, cond = data(8)
    torch.testing.assert_close(f(x, cond), concatenated(model, x, cond))
    conds = torch.randn(3, B, 7, dtype=torch.float64)
    y = torch.func.vmap(lambda c: model(x, c))(conds)
    torch.testing.assert_close(y, torch.stack([model(x, c) for c in conds]))


def test_parametrized_later_layer():
    q = nn.Sequential(nn.Linear(I + E, 6), nn.utils.parametrizations.weight_norm(nn.Linear(6, 2)))
    model, (x, cond) = network(q), data(8)
    torch.testing.assert_close(model(x, cond), concatenated(model, x, cond))


@pytest.mark.parametrize(
    ("x", "e", "message"),
    [
        ((B, I), (B + 1, E), rf"same B, got \({B}, {I}\) and \({B + 1}, {E}\)"),
        ((B, I), (1, E), "same B"),
        ((B, I), (E,), "same B"),
        ((B, I), (B, 8, E), "same B"),
        ((I,), (1, E), "same B"),
        ((B, I), (B, E + 1), rf"{I + E} for x \({B}, {I}\) and an embedding \({B}, {E + 1}\)"),
        ((B, 8, I + 1), (B, E), "I \\+ E in_features"),
    ],
)
def test_wrong_sizes(x, e, message):
    model = EmbeddingNetwork(nn.Identity(), nn.Linear(I + E, 2))
    with pytest.raises(ValueError, match=message):
        model(torch.randn(x), torch.randn(e))


def test_wrong_kinds():
    class OwnForward(nn.Sequential):
        def forward(self, x):
            return -super().forward(x)

    linear = nn.Linear(I + E, 2)
    for primary, message in [
        (nn.Sequential(nn.ReLU(), linear), "got Sequential of ReLU"),
        (nn.Sequential(), "got Sequential"),
        (nn.ReLU(), "got ReLU"),
        (OwnForward(linear), "got OwnForward"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(I + E, 2)), "parametrization"),
    ]:
        with pytest.raises(TypeError, match=message):
            EmbeddingNetwork(nn.Identity(), primary)
    with pytest.raises(TypeError, match=r"embed must be an nn\.Module, got a function"):
        EmbeddingNetwork(lambda cond: cond, linear)
    model = EmbeddingNetwork(nn.Identity(), linear)
    with pytest.raises(TypeError, match="embed must return a tensor, got a tuple"):
        model(torch.randn(B, I), (torch.randn(B, E),))


@pytest.mark.parametrize("where", ["primary", "first"])
def test_hooks_are_not_lost(where):
    model, inputs = network(), data()
    (model.primary if where == "primary" else model.primary[0]).register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="hooks"):
        model(*inputs)
