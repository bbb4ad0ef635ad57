"""Flat heads: one Linear whose output is all parameters of a network, in the orders and layouts that other code has."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fasthyper.nn import HyperLinear, Hypernetwork, parameter_report, ungenerated

R, B, N = 6, 5, 4


def net(**kwargs):
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5, **kwargs), nn.Tanh(), nn.Linear(5, 2)).double()


def size(primary):
    return sum(p.numel() for p in primary.parameters())


def written_out(vectors, primary, entries, x):
    """Run the primary for each instance with a flat vector, cut as the entries (name, layout) say."""
    results = []
    for vector, points in zip(vectors, x, strict=True):
        parameters = {}
        for name, layout in entries:
            shape = primary.get_parameter(name).shape
            part, vector = vector[: shape.numel()], vector[shape.numel() :]
            if layout == "io" and len(shape) > 1:
                parameters[name] = part.view(shape[1], shape[0]).T
            else:
                parameters[name] = part.view(shape)
        results.append(functional_call(primary, parameters, points[None])[0])
    return torch.stack(results)


def entries_of(primary, order, layout):
    names = [name for name, _ in primary.named_parameters()]
    if order == "weights_first":
        names = [n for n in names if "weight" in n] + [n for n in names if "bias" in n]
    return [(name, layout) for name in names]


MIXED = [("4.bias", None), ("4.weight", "io"), ("0.weight", "oi"), ("0.bias", None), ("2.weight", "io"), "2.bias"]


@pytest.mark.parametrize("head_bias", [False, True])
@pytest.mark.parametrize("layout", ["oi", "io"])
@pytest.mark.parametrize("order", ["layers", "weights_first", "mixed"])
def test_equals_the_vector_written_out(order, layout, head_bias):
    primary = net()
    head = nn.Linear(R, size(primary), bias=head_bias).double()
    given = MIXED if order == "mixed" else order
    entries = [e if isinstance(e, tuple) else (e, None) for e in MIXED]
    entries = entries if order == "mixed" else entries_of(primary, order, layout)
    model = Hypernetwork.from_flat_head(head, primary, given, layout=layout)
    x, z = torch.randn(B, N, 3).double(), torch.randn(B, R, dtype=torch.float64, requires_grad=True)
    y, expected = model(x, z), written_out(head(z), primary, entries, x)
    torch.testing.assert_close(y, expected)
    assert ungenerated(model.primary) == []

    # gradients of z, and of the rows of the head
    g = torch.randn_like(y)
    (dz,) = torch.autograd.grad(expected, z, g, retain_graph=True)
    expected.backward(g)
    before = {name: p.grad for name, p in head.named_parameters()}
    z.grad = None
    y.backward(g)
    torch.testing.assert_close(z.grad, dz)
    grads = copy.deepcopy(model)
    for p, with_grad in zip(grads.parameters(), model.parameters(), strict=True):
        p.data = with_grad.grad
    ours = dict(grads.to_flat_head().named_parameters())
    assert ours.keys() == before.keys()
    for name, grad in before.items():
        torch.testing.assert_close(ours[name].detach(), grad)


def test_parameters_are_copies_of_the_rows():
    primary = net()
    head = nn.Linear(R, size(primary)).double()
    head.bias.requires_grad_(False)
    model = Hypernetwork.from_flat_head(head, primary, "weights_first", layout="io")
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(list(model.parameters()))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in head.parameters())
    assert all(p.requires_grad == ("base" not in name) for name, p in model.named_parameters())
    x, z = torch.randn(B, 3).double(), torch.randn(B, R).double()
    before = head(z).detach()
    model(x, z).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(head(z), before)
    assert not torch.allclose(model.to_flat_head()(z), before)


@pytest.mark.parametrize("head_bias", [False, True])
def test_state_both_ways(head_bias):
    primary = net()
    heads = [nn.Linear(R, size(primary), bias=head_bias).double() for _ in range(2)]
    model = Hypernetwork.from_flat_head(heads[0], primary, MIXED)
    x, z = torch.randn(B, 3).double(), torch.randn(B, R).double()
    model.load_flat_head(heads[1].state_dict())
    torch.testing.assert_close(model(x, z), Hypernetwork.from_flat_head(heads[1], primary, MIXED)(x, z))
    copied = copy.deepcopy(model)
    state = copied.to_flat_head().state_dict()
    assert state.keys() == heads[1].state_dict().keys()
    for name, value in heads[1].state_dict().items():
        assert torch.equal(state[name], value)
    other = Hypernetwork.from_flat_head(nn.Linear(R, size(primary), bias=head_bias).double(), primary, MIXED)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x, z), model(x, z))


def test_other_layers_and_ties():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.norm = nn.LayerNorm(4)
            self.out = nn.Linear(4, 7)
            self.out.weight = self.embed.weight

        def forward(self, ids):
            return self.out(self.norm(self.embed(ids)))

    primary = Net().double()
    head = nn.Linear(R, size(primary)).double()
    model = Hypernetwork.from_flat_head(head, primary, layout="oi")
    assert model.primary.embed.weight is model.primary.out.weight
    assert model.primary.embed.base_weight is model.primary.out.base_weight
    ids, z = torch.randint(7, (B, N)), torch.randn(B, R).double()
    torch.testing.assert_close(model(ids, z), written_out(head(z), primary, entries_of(primary, "layers", "oi"), ids))


def test_transforms_and_copies():
    primary = net()
    head = nn.Linear(R, size(primary)).double()
    model = Hypernetwork.from_flat_head(head, primary, layout="io", trunk=nn.Linear(2, R).double())
    x, cond = torch.randn(B, 3).double(), torch.randn(B, 2).double()
    y = model(x, cond)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, cond), y)
    exported = torch.export.export(model, (x, cond)).module()
    torch.testing.assert_close(exported(x, cond), y)
    torch.testing.assert_close(copy.deepcopy(model)(x, cond), y)
    torch.testing.assert_close(torch.func.functional_call(model, dict(model.named_parameters()), (x, cond)), y)


def test_layout_is_needed_where_both_fit():
    primary = net()
    head = nn.Linear(R, size(primary)).double()
    with pytest.raises(ValueError, match=r"layout is needed: the rows of '0.weight' .*'oi'.*\(4, 3\).*'io'.*\(3, 4\)"):
        Hypernetwork.from_flat_head(head, primary)
    one = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 1)).double()
    Hypernetwork.from_flat_head(nn.Linear(R, size(one)).double(), one)
    with pytest.raises(ValueError, match="layout must be 'oi', 'io' or None, got 'hwio'"):
        Hypernetwork.from_flat_head(head, primary, layout="hwio")


def test_refusals():
    primary = net()
    head = nn.Linear(R, size(primary)).double()
    with pytest.raises(ValueError, match=f"compute the {size(primary)} parameters .* got {size(primary) - 1} outputs"):
        Hypernetwork.from_flat_head(nn.Linear(R, size(primary) - 1), primary, layout="oi")
    with pytest.raises(ValueError, match=r"missing \['0.bias'.*unknown \['fc'\], twice \['0.weight'\]"):
        Hypernetwork.from_flat_head(head, primary, ["0.weight", "0.weight", "fc"], layout="oi")
    with pytest.raises(ValueError, match="order must be 'layers', 'weights_first' or a list"):
        Hypernetwork.from_flat_head(head, primary, "weights", layout="oi")
    with pytest.raises(TypeError, match=r"head must be an nn\.Linear"):
        Hypernetwork.from_flat_head(nn.Conv1d(2, 2, 1), primary, layout="oi")
    odd = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.PReLU())
    with pytest.raises(ValueError, match=r"cannot be generated: \['2.weight"):
        Hypernetwork.from_flat_head(nn.Linear(R, size(odd)), odd, layout="oi")
    model = Hypernetwork(nn.Identity(), HyperLinear(2, 2, R))
    with pytest.raises(ValueError, match="has no flat head"):
        model.to_flat_head()
    model = Hypernetwork.from_flat_head(head, primary, layout="oi")
    with pytest.raises(ValueError, match=r"entries \['bias', 'weight'\], got \['weight'\]"):
        model.load_flat_head({"weight": head.weight})
    with pytest.raises(ValueError, match=r"bias of the state must have shape"):
        model.load_flat_head({"weight": head.weight, "bias": head.bias[1:]})


# chunks


def chunked(primary, K, E=3, bias=True):
    """Return a head for chunks of K numbers, and the embeddings of as many chunks as the primary needs."""
    count = -(-size(primary) // K)
    return nn.Linear(R + E, K, bias=bias).double(), nn.Parameter(torch.randn(count, E, dtype=torch.float64))


def vectors(head, chunks, z, P):
    """Compute the vectors in chunks, with all embeddings beside each z."""
    inputs = torch.cat([z[:, None].expand(-1, chunks.shape[0], -1), chunks.expand(z.shape[0], -1, -1)], 2)
    return head(inputs).flatten(1)[:, :P]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", ["oi", "io"])
@pytest.mark.parametrize("K", [1, 7, 10, 53, 100])
def test_chunks(K, layout, bias):
    primary = net()
    head, chunks = chunked(primary, K, bias=bias)
    model = Hypernetwork.from_flat_head(head, primary, layout=layout, chunks=chunks)
    x, z = torch.randn(B, N, 3).double(), torch.randn(B, R).double()
    out = vectors(head, chunks, z, size(primary))
    expected = written_out(out, primary, entries_of(primary, "layers", layout), x)
    y = model(x, z)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(model.to_flat_head()(z), out)

    trainable = [*head.parameters(), chunks]
    assert {id(p) for p in model.parameters()} == {id(p) for p in trainable}
    assert ungenerated(model.primary) == []
    g = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, trainable, g), torch.autograd.grad(expected, trainable, g), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


class EmbeddingsInTheTrunk(nn.Module):
    """A trunk with hidden layers, which sees z and the embedding of each chunk: (B, C, R)."""

    def __init__(self, count):
        super().__init__()
        self.chunks = nn.Parameter(torch.randn(count, 3, dtype=torch.float64))
        self.hidden = nn.Linear(2 + 3, R).double()

    def forward(self, z):
        z, chunks = z[:, None].expand(-1, self.chunks.shape[0], -1), self.chunks.expand(z.shape[0], -1, -1)
        return torch.tanh(self.hidden(torch.cat([z, chunks], 2)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", ["oi", "io"])
@pytest.mark.parametrize("K", [1, 7, 10, 53, 100])
def test_chunks_whose_embeddings_the_trunk_sees(K, layout, bias):
    primary = net(bias=bias)
    count = -(-size(primary) // K)
    trunk, head = EmbeddingsInTheTrunk(count), nn.Linear(R, K, bias=bias).double()
    model = Hypernetwork.from_flat_head(head, primary, layout=layout, chunks=count, trunk=trunk)
    x, cond = torch.randn(B, N, 3).double(), torch.randn(B, 2).double()
    out = head(trunk(cond)).flatten(1)[:, : size(primary)]
    expected, y = written_out(out, primary, entries_of(primary, "layers", layout), x), model(x, cond)
    torch.testing.assert_close(y, expected)
    trainable = [*head.parameters(), *trunk.parameters()]
    assert {id(p) for p in model.parameters()} == {id(p) for p in trainable}
    g = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, trainable, g), torch.autograd.grad(expected, trainable, g), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    W, _ = model.primary[0].materialize(trunk(cond))
    W_written = out[:, :12].view(B, 4, 3) if layout == "oi" else out[:, :12].view(B, 3, 4).mT
    torch.testing.assert_close(W, W_written)


def test_chunks_with_a_z_each_refusals():
    primary = net()
    head = nn.Linear(R, 10).double()
    with pytest.raises(ValueError, match=r"the 53 parameters .*50 outputs \(5 chunks of 10\)"):
        Hypernetwork.from_flat_head(head, primary, layout="oi", chunks=5)
    model = Hypernetwork.from_flat_head(head, primary, layout="oi", chunks=6)
    x, z = torch.randn(B, 3).double(), torch.randn(B, 6, R).double()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x, z), model(x, z))
    for wrong in (z[:, 0], z[:, :5]):
        with pytest.raises(ValueError, match=r"z must be \(B, C, R\) with \(C, R\) = \(6, 6\)"):
            model(x, wrong)
    with pytest.raises(ValueError, match="no flat head of one z"):
        model.to_flat_head()
    for wrong in (0, -1, "6"):
        with pytest.raises(ValueError, match=r"chunks must be a number, an nn\.Embedding or a tensor"):
            Hypernetwork.from_flat_head(head, primary, layout="oi", chunks=wrong)


def test_chunks_in_copies_and_transforms():
    primary = net()
    head, chunks = chunked(primary, 10)
    model = Hypernetwork.from_flat_head(head, primary, layout="oi", chunks=chunks)
    x, z = torch.randn(B, 3).double(), torch.randn(B, R).double()
    y = model(x, z)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x, z), y)
    torch.testing.assert_close(torch.export.export(model, (x, z)).module()(x, z), y)
    copied = copy.deepcopy(model)
    assert len(list(copied.parameters())) == 3
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    assert not copied(x, z).any()
    copied.load_state_dict(model.state_dict())
    torch.testing.assert_close(copied(x, z), y)
    report = parameter_report(model)
    assert (report.n_f, report.n_g, report.ungenerated) == (sum(p.numel() for p in model.parameters()), size(net()), 0)


def test_chunks_refusals():
    primary = net()
    head, chunks = chunked(primary, 10)
    for wrong in (chunks[:-1], torch.cat([chunks, chunks[:1]])):
        with pytest.raises(ValueError, match=r"the 53 parameters .*chunks of 10\)"):
            Hypernetwork.from_flat_head(head, primary, layout="oi", chunks=wrong)
    with pytest.raises(ValueError, match=r"chunks must be a number, an nn\.Embedding or a tensor \(C, E\)"):
        Hypernetwork.from_flat_head(head, primary, layout="oi", chunks=torch.randn(6))
    with_norm = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)).double()
    with pytest.raises(ValueError, match=r"Linears alone, not '1.weight' of a HyperAffine"):
        Hypernetwork.from_flat_head(
            *chunked(with_norm, 6)[:1], with_norm, layout="oi", chunks=torch.randn(3, 3).double()
        )
    model = Hypernetwork.from_flat_head(head, primary, layout="oi", chunks=chunks)
    with pytest.raises(ValueError, match="load the checkpoint into the head"):
        model.load_flat_head(model.to_flat_head().state_dict())
