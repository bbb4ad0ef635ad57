import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

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


V, WIDE, UNITS, MANY = 6, 40, 4, 24  # features of z, E, units of the first layer, instances: the other order is shorter


def wide(bias=True, embed=None):
    embed = embed or nn.Sequential(nn.Linear(7, V), nn.Tanh(), nn.Linear(V, WIDE, bias=bias))
    q = nn.Sequential(nn.Linear(I + WIDE, UNITS, bias=bias), nn.ReLU(), nn.Linear(UNITS, 2))
    return EmbeddingNetwork(embed, q)


def many(*points, dtype=torch.float64):
    return torch.randn(MANY, *points, I, dtype=dtype), torch.randn(MANY, 7, dtype=dtype)


def joined(model, x, cond):
    """Compute the concatenation with the embedding formed, without the module."""
    e = model.embed(cond)
    e = e.reshape(len(e), *[1] * (x.ndim - 2), WIDE).expand(*x.shape[:-1], WIDE)
    return model.primary(torch.cat([x, e], -1))


def flops(function, *args):
    with FlopCounterMode(display=False) as counter:
        function(*args).sum().backward()
    return counter.get_total_flops()


def forms_embeddings(model, x, cond):
    """Return whether a matrix of B x E is formed: it is then saved for the backward pass of the first layer."""
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        model(x, cond)
    return (len(x), WIDE) in shapes


@pytest.mark.parametrize("points", [(), (5,), (2, 3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_the_product_of_both_weights_is_the_same_function(points, bias, dtype, tolerance):
    model = wide(bias).to(dtype)
    x, cond = many(*points, dtype=dtype)
    assert not forms_embeddings(model, x, cond)
    wanted = [t.requires_grad_() for t in (x, cond)] + list(model.parameters())
    results = []
    for y in (model(x, cond), joined(model, x, cond)):
        results.append((y, *torch.autograd.grad(y.square().sum(), wanted)))
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def test_second_derivatives_with_the_product_of_both_weights():
    model = wide().double()
    x, cond = many()
    cond.requires_grad_()
    second = []
    for y in (model(x, cond), joined(model, x, cond)):
        (first,) = torch.autograd.grad(y.square().sum(), cond, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), list(model.parameters())))
    torch.testing.assert_close(*second)


@pytest.mark.parametrize(("instances", "formed"), [(1, True), (2, True), (3, False), (MANY, False)])
def test_the_order_with_fewer_flops(instances, formed):
    model = wide(bias=False).double()
    x, cond = many()
    x, cond = x[:instances], cond[:instances]
    assert forms_embeddings(model, x, cond) == formed
    embeddings = instances * WIDE * (V + UNITS)
    together = UNITS * WIDE * V + instances * UNITS * V
    others = instances * (7 * V + I * UNITS + UNITS * 2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, cond)
    assert counter.get_total_flops() == 2 * (others + min(embeddings, together))
    assert (embeddings < together) == formed


def test_a_counter_of_flops_sees_the_shorter_products():
    model = wide().double()
    assert flops(model, *many()) < 0.5 * flops(lambda *args: joined(model, *args), *many())


def scaled(module, args, output):
    return 2 * output


class Doubled(nn.Linear):
    def forward(self, z):
        return 2 * super().forward(z)


@pytest.mark.parametrize("where", ["last", "embed", "forward", "parametrization", "subclass"])
def test_what_the_last_layer_does_besides_is_done(where):
    model, (x, cond) = wide().double(), many()
    if where == "subclass":
        model.embed[2] = Doubled(V, WIDE).double()
    elif where == "forward":
        plain = model.embed[2].forward
        model.embed[2].forward = lambda z: 2 * plain(z)
    elif where == "parametrization":
        nn.utils.parametrizations.weight_norm(model.embed[2])
        with torch.no_grad():
            model.embed[2].parametrizations.weight.original0.mul_(3)
    else:
        (model.embed if where == "embed" else model.embed[2]).register_forward_hook(scaled)
    torch.testing.assert_close(model(x, cond), joined(model, x, cond))
    assert forms_embeddings(model, x, cond)


def test_hooks_of_earlier_layers_run():
    model, (x, cond) = wide().double(), many()
    model.embed[0].register_forward_hook(scaled)
    torch.testing.assert_close(model(x, cond), joined(model, x, cond))
    assert not forms_embeddings(model, x, cond)


@pytest.mark.parametrize("embed", [nn.Linear(7, WIDE), nn.Sequential(nn.Tanh(), nn.Sequential(nn.Linear(7, WIDE)))])
def test_other_networks_that_end_in_a_linear(embed):
    model, (x, cond) = wide(embed=copy.deepcopy(embed)).double(), many(5)
    torch.testing.assert_close(model(x, cond), joined(model, x, cond))
    assert not forms_embeddings(model, x, cond)


def test_compiled_exported_and_mapped():
    model, (x, cond) = wide().double(), many(5)
    expected = joined(model, x, cond)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x, cond), expected)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (x, cond), dynamic_shapes=({0: batch}, {0: batch}))
    for size in (2, MANY, 5 * MANY):
        a, b = torch.randn(size, 5, I, dtype=torch.float64), torch.randn(size, 7, dtype=torch.float64)
        torch.testing.assert_close(program.module()(a, b), joined(model, a, b))
    conds = torch.randn(3, MANY, 7, dtype=torch.float64)
    torch.testing.assert_close(
        torch.func.vmap(lambda c: model(x, c))(conds), torch.stack([joined(model, x, c) for c in conds])
    )


def test_autocast_keeps_its_dtype():
    model, (x, cond) = wide(), many(5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = model(x, cond), joined(model, x, cond)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


def test_parameters_keep_their_names():
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert list(wide().state_dict()) == [f"{part}.{name}" for part in ("embed", "primary") for name in names]


def test_wrong_sizes_where_no_embedding_is_formed():
    model, (x, cond) = wide().double(), many()
    with pytest.raises(ValueError, match=rf"same B, got \({MANY - 1}, {I}\) and \({MANY}, {WIDE}\)"):
        model(x[1:], cond)
    with pytest.raises(ValueError, match=rf"for x \({MANY}, {I - 1}\) and an embedding \({MANY}, {WIDE}\)"):
        model(x[:, 1:], cond)
