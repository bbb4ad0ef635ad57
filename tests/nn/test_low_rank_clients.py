"""Generated adapters in transformers: Text-to-LoRA's step against the same by hand, and PEFT's LoRA."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fasthyper
from fasthyper import Incidence
from fasthyper.nn import HyperLinear, Hypernetwork, hyperize

WIDTH, RANK, ALPHA, TASKS, TOKENS, FEATURES = 16, 4, 8, 3, 5, 6


@pytest.fixture(scope="module")
def transformers():
    for name in ("nms", "qnms"):  # torchvision needs them at import, where it was built for another torch
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    found = pytest.importorskip("transformers")
    pytest.importorskip("transformers.models.bert.modeling_bert")
    return found


def bert(transformers):
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=20, **sizes), add_pooling_layer=False)
    return model.eval(), ("query", "value")


def llama(transformers):
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.LlamaModel(transformers.LlamaConfig(vocab_size=20, **sizes)).eval(), ("q_proj", "v_proj")


MODELS = {"bert": bert, "llama": llama}


class ByHand(nn.Module):
    """A Linear with an adapter for each task of the batch, by batched products."""

    def __init__(self, base):
        super().__init__()
        self.base, self.factors = base, None

    def forward(self, x):
        a, b = self.factors
        return self.base(x) + ALPHA / RANK * torch.bmm(torch.bmm(x, a.mT), b.mT)


class Ours(ByHand):
    def forward(self, x):
        return fasthyper.low_rank_linear(x, *self.factors, self.base.weight, self.base.bias, alpha=ALPHA)


class Generator(nn.Module):
    """From task embeddings to A and B of each place."""

    def __init__(self, places):
        super().__init__()
        self.places = nn.Parameter(torch.randn(places, FEATURES))
        self.trunk, self.head = nn.Sequential(nn.Linear(FEATURES, 12), nn.SiLU()), nn.Linear(12, 2 * RANK * WIDTH)

    def forward(self, task):
        out = self.head(self.trunk(task[:, None] + self.places)).unflatten(-1, (2, -1))
        return [(p[:, 0].view(-1, RANK, WIDTH), p[:, 1].view(-1, WIDTH, RANK)) for p in out.unbind(1)]


def adapted(model, names, kind):
    """Return a copy of a model in which the layers of these names are of a kind, and these layers."""
    model, found = copy.deepcopy(model), []
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in names:
            found.append(kind(module))
            model.set_submodule(name, found[-1])
    return model, found


@pytest.fixture(params=MODELS)
def model(request, transformers):
    model, names = MODELS[request.param](transformers)
    return model.requires_grad_(False), names


def test_a_step_of_text_to_lora(model):
    model, names = model
    ids, task = torch.randint(20, (TASKS, TOKENS)), torch.randn(TASKS, FEATURES)
    results = []
    for kind in (ByHand, Ours):
        torch.manual_seed(0)
        network, layers = adapted(model, names, kind)
        generator = Generator(len(layers))
        for layer, factors in zip(layers, generator(task), strict=True):
            layer.factors = factors
        loss = network(ids).last_hidden_state[..., :3].square().mean()
        results.append([loss, *torch.autograd.grad(loss, generator.parameters())])
    for ours, by_hand in zip(*results, strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=1e-4, atol=1e-6)
    assert results[0][1].abs().max() > 0


class Generated(ByHand):
    """A layer whose A and B come from the heads of a HyperLinear."""

    def __init__(self, layer):
        super().__init__(None)
        self.layer, self.z = layer, None

    def forward(self, x):
        a = torch.einsum("kir,br->bki", self.layer.weight_a, self.z)
        b = torch.einsum("okr,br->bok", self.layer.weight_b, self.z)
        y = nn.functional.linear(x, self.layer.base_weight, self.layer.base_bias)
        return y + ALPHA / RANK * torch.bmm(torch.bmm(x, a.mT), b.mT)


def test_hyperize_by_name_and_merged(model):
    model, names = model
    ids, task = torch.randint(20, (TASKS, TOKENS)), torch.randn(TASKS, FEATURES)
    patterns = [f"*{name}" for name in names]
    primary = hyperize(model, 7, patterns, rank=RANK, alpha=ALPHA, bias=False)
    trunk = nn.Linear(FEATURES, 7)
    hypernetwork = Hypernetwork(trunk, primary)
    layers = [m for m in primary.modules() if isinstance(m, HyperLinear)]
    assert len(layers) == 4
    start = model(ids).last_hidden_state
    torch.testing.assert_close(hypernetwork(ids, task).last_hidden_state, start)  # B is zero
    for layer in layers:
        nn.init.normal_(layer.weight_b, std=0.1)
    network, by_hand = adapted(primary, names, Generated)
    z = trunk(task)
    for layer in by_hand:
        layer.z = z
    results = []
    for outputs, owners in ((hypernetwork(ids, task), layers), (network(ids), [m.layer for m in by_hand])):
        loss = outputs.last_hidden_state[..., :3].square().mean()
        heads = [p for layer in owners for p in (layer.weight_a, layer.weight_b)]
        results.append([loss, *torch.autograd.grad(loss, [*trunk.parameters(), *heads])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    merged = hypernetwork.merged(task[1])
    assert list(merged.state_dict()) == list(model.state_dict())
    expected = hypernetwork(ids, task).last_hidden_state[1:2]
    torch.testing.assert_close(merged(ids[1:2]).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, start[1:2], atol=1e-3)


def test_lora_of_peft(transformers):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
    base = nn.Linear(WIDTH, 12)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config).base_model.model[0]
    lora_a, lora_b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    nn.init.normal_(lora_b)
    x = torch.randn(4, 9, WIDTH)
    # from PEFT to here: as given factors, by id, and in a layer with one feature
    expected = theirs(x)
    given = [lora_a.expand(4, -1, -1), lora_b.expand(4, -1, -1)]
    y = fasthyper.low_rank_linear(x, *given, base.weight, base.bias, alpha=ALPHA)
    torch.testing.assert_close(y, expected)
    incidence = Incidence.from_batch(torch.zeros(36, dtype=torch.int64), num_conds=1)
    factors = lora_a[None], lora_b[None], base.weight, base.bias
    y = fasthyper.low_rank_linear(x.flatten(0, 1), *factors, alpha=ALPHA, incidence=incidence)
    torch.testing.assert_close(y.view(4, 9, 12), expected)
    layer = hyperize(base, 1, rank=RANK, alpha=ALPHA, bias=False)
    with torch.no_grad():
        layer.weight_a.copy_(lora_a[..., None])
        layer.weight_b.copy_(lora_b[..., None])
    torch.testing.assert_close(layer(x, torch.ones(4, 1)), expected)
    # from here to PEFT, and merged
    with torch.no_grad():
        for p in (layer.weight_a, layer.weight_b):
            nn.init.normal_(p)
        lora_a.copy_(layer.weight_a[..., 0])
        lora_b.copy_(layer.weight_b[..., 0])
    torch.testing.assert_close(layer(x, torch.ones(4, 1)), theirs(x))
    merged = layer.merged(torch.ones(1))
    theirs.merge()
    torch.testing.assert_close(merged.weight, theirs.base_layer.weight)
    torch.testing.assert_close(merged.bias, theirs.base_layer.bias)
