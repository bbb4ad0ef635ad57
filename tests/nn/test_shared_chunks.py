"""`Hypernetwork.from_flat_head(…, chunks=…)`: head and embeddings stay one module, whatever is done to the model."""

import copy

import pytest
import torch
from changes import CHANGES
from torch import nn

from fasthyper.nn import HyperLinear, Hypernetwork, hyperize, parameter_report, ungenerated, what_is_generated

R, E, C, K, B = 5, 3, 6, 10, 4


class Net(nn.Module):
    """A model that had a head and embeddings of chunks, and now has a Hypernetwork of them, too."""

    def __init__(self, kind, bias=True):
        super().__init__()
        self.head = nn.Linear(R + E * (kind != "number"), K, bias=bias)
        self.chunks = nn.Embedding(C, E) if kind == "embedding" else None
        chunks = {"embedding": self.chunks, "number": C}.get(kind)
        if kind == "parameter":
            self.chunks = chunks = nn.Parameter(torch.randn(C, E))
        if kind == "tensor":
            self.register_buffer("copied", torch.randn(C, E))
            chunks = self.copied
        primary = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
        self.model = Hypernetwork.from_flat_head(self.head, primary, layout="oi", chunks=chunks)

    def forward(self, x, z):
        return self.model(x, z)


@pytest.fixture(params=["embedding", "parameter", "tensor", "number"])
def kind(request):
    return request.param


@pytest.fixture(params=[True, False])
def net(request, kind):
    torch.manual_seed(0)
    return Net(kind, request.param)


def inputs(net):
    dtype = net.head.weight.dtype
    shape = (B, C, R) if net.head.in_features == R else (B, R)
    return torch.randn(B, 3, dtype=dtype), torch.randn(shape, dtype=dtype)


def by_hand(net, x, z):
    """Compute what the model does from the outputs of the head."""
    if z.dim() == 2:
        embeddings = net.chunks.weight if isinstance(net.chunks, nn.Module) else net.chunks
        if embeddings is None:
            embeddings = net.model.primary[0].head.chunks
        z = torch.cat([z[:, None].expand(-1, C, -1), embeddings.expand(B, -1, -1)], 2)
    W1, b1, W2, b2, W3, b3 = net.head(z).flatten(1)[:, :53].split([12, 4, 20, 5, 10, 2], 1)
    x = torch.tanh((W1.view(B, 4, 3) @ x[..., None])[..., 0] + b1)
    x = torch.tanh((W2.view(B, 5, 4) @ x[..., None])[..., 0] + b2)
    return (W3.view(B, 2, 5) @ x[..., None])[..., 0] + b3


def assert_tied(net):
    """Change the head and the embeddings, and see whether the model follows, and has no more parameters than these."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            if not name.startswith("model."):
                p.copy_(torch.randn_like(p) / 2)
    x, z = inputs(net)
    torch.testing.assert_close(net(x, z), by_hand(net, x, z))
    assert len(list(net.parameters())) == 1 + (net.head.bias is not None) + (net.chunks is not None)


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_shared_stays_shared(net, kind, change):
    if (kind, change) == ("parameter", "meta"):
        pytest.skip("torch makes two parameters of one that two modules have")
    changed = CHANGES[change](net)
    heads = {layer.head for layer in changed.model.primary[::2]}
    assert len(heads) == 1
    assert heads.pop().head is changed.head
    if kind == "tensor" and change in ("to_empty", "meta"):
        changed.model.primary[0].head.chunks.normal_()
    assert_tied(changed)


def test_a_tensor_is_copied():
    net = Net("tensor")
    x, z = inputs(net)
    y = net(x, z)
    net.copied.zero_()
    torch.testing.assert_close(net(x, z), y)


def emptied(net):
    other = copy.deepcopy(net)
    with torch.no_grad():
        for t in (*other.parameters(), *other.buffers()):
            t.fill_(float("nan"))
    return other


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts(net, kind, assign):
    x, z = inputs(net)
    y, state = net(x, z), net.state_dict()

    def loads(choose, entries):
        other = emptied(net)
        choose(other).load_state_dict(entries, assign=assign)
        torch.testing.assert_close(other(x, z), y)

    loads(lambda net: net, state)
    loads(lambda net: net.model.primary, net.model.primary.state_dict())
    parts = {name.replace(".head.head.", ".head."): t for name, t in state.items()}
    assert parts.keys() != state.keys()
    loads(lambda net: net, parts)  # the entries of a head, without the name that it has in the chunked one
    owned_by_a_module = kind in ("embedding", "number") or not assign  # else assign makes two of a tensor
    if owned_by_a_module and kind != "tensor":
        loads(
            lambda net: net, {name: t for name, t in state.items() if "model" not in name}
        )  # before there was a model
    if owned_by_a_module:
        entries = net.model.state_dict()
        loads(lambda net: net.model, {name: t for name, t in entries.items() if "primary.0" in name})  # under one name


def test_a_missing_head_is_missed(kind):
    net = Net(kind)
    state = {name: t for name, t in net.state_dict().items() if "bias" not in name}
    with pytest.raises(RuntimeError, match=r"Missing.*model\.primary\.0\.head\.head\.bias"):
        net.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing.*head\.weight"):
        net.load_state_dict({})
    with pytest.raises(RuntimeError, match=r"Unexpected.*head\.other"):
        net.load_state_dict({**net.state_dict(), "model.primary.0.head.other": torch.zeros(1)})


def test_safetensors(net, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    x, z = inputs(net)
    y = net(x, z)
    for choose in (lambda net: net, lambda net: net.model, lambda net: net.model.primary[0]):
        file = str(tmp_path / "file")
        safetensors.save_model(choose(net), file)
        other = emptied(net)
        safetensors.load_model(choose(other), file)
        torch.testing.assert_close(other(x, z), y)


def test_gradients_are_those_of_the_head(net):
    x, z = inputs(net)
    parameters = [*net.parameters()]
    expected = torch.autograd.grad(by_hand(net, x, z).square().sum(), parameters)
    torch.testing.assert_close(torch.autograd.grad(net(x, z).square().sum(), parameters), expected)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(x, z).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(net(x, z), by_hand(net, x, z))


def test_what_the_rest_of_the_package_sees(net):
    assert ungenerated(net.model) == []
    assert [s.name for s in what_is_generated(net.model.primary).layers] == ["0", "2", "4"]
    report = parameter_report(net.model)
    assert report.n_f == sum(p.numel() for p in net.model.parameters())
    with pytest.raises(ValueError, match="none of the"):
        hyperize(net.model.primary, R)
    x, z = inputs(net)
    state = {name: p.detach() / 2 for name, p in net.named_parameters()}
    half = copy.deepcopy(net)
    half.load_state_dict(state, strict=False)
    torch.testing.assert_close(torch.func.functional_call(net, state, (x, z)), half(x, z))


CHECKPOINTS = [("embedding", "parameter"), ("embedding", "tensor"), ("parameter", "embedding"), ("tensor", "embedding")]


@pytest.mark.parametrize(("saved", "loaded"), CHECKPOINTS)
@pytest.mark.parametrize("assign", [False, True])
def test_embeddings_load_from_tensors_and_tensors_from_embeddings(saved, loaded, assign):
    net, other = (Net(kind).model for kind in (saved, loaded))
    state = net.state_dict()
    one_name = {name: t for name, t in state.items() if "primary.0" in name}
    for entries in (state, one_name) if not assign or loaded == "embedding" else (state,):
        changed = emptied(other)
        changed.load_state_dict(entries, assign=assign)
        for layer in changed.primary[::2]:
            torch.testing.assert_close(layer.head.embeddings, net.primary[0].head.embeddings)
    both = {**state, **{name.removesuffix(".weight"): t for name, t in state.items()}}
    if saved == "embedding":
        with pytest.raises(RuntimeError, match=r"primary\.0\.head\.chunks"):
            other.load_state_dict(both)


class Own(nn.Embedding):
    def forward(self, indices):
        return indices


REFUSED = {
    "max_norm": (lambda: nn.Embedding(C, E, max_norm=1.0), TypeError, "cannot be converted: its max_norm"),
    "padding_idx": (lambda: nn.Embedding(C, E, padding_idx=0), TypeError, "cannot be converted: its padding_idx"),
    "sparse": (lambda: nn.Embedding(C, E, sparse=True), TypeError, "cannot be converted: its sparse"),
    "frequency": (lambda: nn.Embedding(C, E, scale_grad_by_freq=True), TypeError, "be converted: its scale_grad_by_fr"),
    "forward": (lambda: Own(C, E), TypeError, "cannot be converted: it is a Own with a forward"),
    "dtype": (lambda: nn.Embedding(C, E).double(), TypeError, r"float32, got \(6, 3\) of torch.float64"),
    "dtype of a parameter": (lambda: nn.Parameter(torch.randn(C, E).bfloat16()), TypeError, "of torch.bfloat16"),
    "device": (lambda: nn.Embedding(C, E, device="meta"), ValueError, r"of the head, cpu, got \(6, 3\) on meta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_are_no_plain_embeddings_is_refused(case):
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=f"^chunks .*{message}"):
        Hypernetwork.from_flat_head(nn.Linear(R + E, K), nn.Linear(3, 4), layout="oi", chunks=make())
    for kind in ("embedding", "parameter", "tensor"):
        head = Net(kind).model.primary[0].head
        with pytest.raises(error, match=f"^chunks of the ChunkedHead .*{message}"):
            head.chunks = make()


WRONG = {
    "rows": (
        lambda head: ("head", nn.Linear(R + E, K + 1)),
        ValueError,
        r"must have a weight \(10, 8\), got \(11, 8\)",
    ),
    "features": (lambda head: ("head", nn.Linear(R, K)), ValueError, r"must have a weight \(10, 8\), got \(10, 5\)"),
    "module": (lambda head: ("head", nn.Sequential()), TypeError, r"an nn.Linear .* \(10, 8\), got Sequential"),
    "embeddings": (lambda head: ("chunks", nn.Embedding(C, E + 1)), ValueError, r"shape \(6, 3\), got \(6, 4\)"),
    "no embeddings": (lambda head: ("chunks", None), TypeError, r"a tensor \(6, 3\), got NoneType"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_parts_are_refused(case):
    net = Net("embedding")
    make, error, message = WRONG[case]
    shared = net.model.primary[0].head
    with pytest.raises(error, match=rf"of the ChunkedHead with in_features=5 and out_features=60 .*{message}"):
        setattr(shared, *make(shared))
    shared.head, shared.chunks = net.head, net.chunks = nn.Linear(R + E, K), nn.Embedding(C, E)
    assert_tied(net)


@pytest.mark.parametrize("kind", ["embedding", "parameter", "tensor"])
@pytest.mark.parametrize("new", ["embedding", "parameter", "tensor"])
def test_chunks_of_another_kind(kind, new):
    net = Net(kind)
    shared = net.model.primary[0].head
    made = {
        "embedding": lambda: nn.Embedding(C, E),
        "parameter": lambda: nn.Parameter(torch.randn(C, E)),
        "tensor": lambda: torch.randn(C, E),
    }[new]()
    if new == "tensor" and kind != "tensor":  # which would not be trained
        with pytest.raises(TypeError, match=r"must be an nn\.Embedding or an nn\.Parameter \(6, 3\), got Tensor"):
            shared.chunks = made
        return
    shared.chunks = made
    assert shared.chunks is made
    names = [name for name, _ in (*shared.named_parameters(), *shared.named_buffers()) if "chunks" in name]
    assert names == ["chunks.weight" if new == "embedding" else "chunks"]
    net.chunks = None
    x, z = inputs(net)
    plain = by_hand(type("Plain", (), {"head": net.head, "chunks": shared.embeddings, "model": net.model}), x, z)
    torch.testing.assert_close(net(x, z), plain)


def test_no_chunks():
    net = Net("number")
    shared = net.model.primary[0].head
    shared.chunks = None
    del shared.chunks
    shared.chunks = None
    with pytest.raises(TypeError, match="must be None, got Embedding"):
        shared.chunks = nn.Embedding(C, E)
    assert_tied(net)


def test_deleted_chunks_are_put_back():
    net = Net("embedding")
    shared = net.model.primary[0].head
    del shared.chunks
    with pytest.raises(ValueError, match=r"must have shape \(6, 3\), got \(6, 4\)"):
        shared.chunks = nn.Embedding(C, E + 1)
    shared.chunks = net.chunks
    assert_tied(net)


def test_a_head_is_not_deleted():
    for owner in (
        (net := Net("embedding").model.primary[0]),
        net.head,
        HyperLinear.from_head(nn.Linear(R, 12), 4, 3, "oi"),
    ):
        with pytest.raises(AttributeError, match=f"head of the {type(owner).__name__} with .*: assign another head"):
            del owner.head
    layer = HyperLinear(4, 3, R)
    layer.head = nn.Identity()  # it has no part in what the layer computes
    del layer.head


def test_a_wrong_chunked_head_is_refused():
    layer, other = Net("embedding").model.primary[0], Net("number").model.primary[0].head
    with pytest.raises(TypeError, match="in_features=3 and out_features=4 must be a ChunkedHead, got Linear"):
        layer.head = nn.Linear(R + E, K)
    with pytest.raises(ValueError, match=r"must have a weight \(10, 8\), got \(10, 5\)"):
        layer.head = other
    other = copy.deepcopy(layer.head)
    other.in_features += 1
    with pytest.raises(ValueError, match=r"\(in_features, out_features\) \(5, 60\), got \(6, 60\)"):
        layer.head = other
