"""The layer in other libraries, each in its fastest form: their hypernetwork generates W, and their layer uses it.

The three hypernetwork libraries have no batched product for per-instance weights, so `torch.func.vmap` maps their layer
over the instances. The heads have no biases; their only parameter is the given `weight`. A package is imported
where it is used, so that the others can be measured without it.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from .inputs import Function
from .terms import indices
from .workloads import Workload


def hypnettorch(w: Workload, device: str) -> Function:
    """Use hypnettorch 0.0.4: an `HMLP` without hidden layers generates the weights of an `MLP` without own weights."""
    from hypnettorch.hnets import HMLP
    from hypnettorch.mnets import MLP

    network = MLP(n_in=w.I, n_out=w.O, hidden_layers=[], use_bias=False, no_weights=True, verbose=False)
    head = HMLP(
        network.hyper_shapes_learned,
        cond_in_size=w.R,
        layers=[],
        use_bias=False,
        no_cond_weights=True,
        num_cond_embs=0,
        verbose=False,
    ).to(device)
    (name,) = dict(head.named_parameters())

    def layer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        W = functional_call(head, {name: weight.flatten(0, 1)}, (), {"cond_input": z, "ret_format": "flattened"})
        return vmap(lambda own, points: network.forward(points, weights=[own]))(W.unflatten(1, (w.O, w.I)), x)

    return layer


def hyperlight(w: Workload, device: str) -> Function:
    """Use hyperlight 0.0.5: a `HyperNet` without hidden layers sets the weights of a `HyperLinear`."""
    import hyperlight as hl

    network = hl.HyperLinear(w.I, w.O, bias=False)
    head = hl.HyperNet(
        {"z": (w.R,)},
        {"weight": (w.O, w.I)},
        hidden_sizes=[],
        encoding=None,
        init_independent_weights=False,
        fc_kws={"out_bias": False},
    ).to(device)
    (name,) = dict(head.named_parameters())

    def instance(own: Tensor, points: Tensor) -> Tensor:
        with network.using_externals({"weight": own}):
            return network(points)

    def layer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        W = functional_call(head, {name: weight.flatten(0, 1)}, (), {"z": z})["weight"]
        return vmap(instance)(W.view(-1, w.O, w.I), x)

    return layer


def hyper_nn(w: Workload, device: str) -> Function:
    """Use hyper-nn 0.2.2: a `TorchHyperNetwork` that takes its weights from a linear layer of this module."""
    from hypernn.torch import TorchHyperNetwork

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it calls functions that torch.func has replaced
        network = TorchHyperNetwork(nn.Linear(w.I, w.O, bias=False))

    def instance(own: Tensor, points: Tensor) -> Tensor:
        return network.target_forward(points, generated_params=own)

    def layer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return vmap(instance)(nn.functional.linear(z, weight.flatten(0, 1)), x)

    return layer


def nnconv(w: Workload, device: str) -> Function:
    """Use PyTorch Geometric's `NNConv`, which sums over incoming edges. Its head is `(I, O, R)`."""
    from torch_geometric.nn import NNConv

    head = nn.Linear(w.R, w.I * w.O, bias=False, device=device)
    conv = NNConv(w.I, w.O, head, aggr="add", root_weight=False, bias=False)
    source, _, target = indices(w, device)
    index = torch.stack((source, target))  # type: ignore[arg-type]

    def layer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return functional_call(conv, {"nn.weight": weight.flatten(0, 1)}, ((x, None), index, z, (w.S, w.T)))

    return layer


def rgcnconv(w: Workload, device: str, fast: bool = False) -> Function:
    """Use PyTorch Geometric's `RGCNConv` with bases, or its `FastRGCNConv`. Its head is `(R, I, O)`."""
    from torch_geometric.nn import FastRGCNConv, RGCNConv

    kind = FastRGCNConv if fast else RGCNConv
    conv = kind(w.I, w.O, w.C, num_bases=w.R, aggr="add", root_weight=False, bias=False).to(device)
    source, cond, target = indices(w, device)
    index = torch.stack((source, target))  # type: ignore[arg-type]
    targets = torch.empty(w.T, 1, device=device)  # without a root weight, only their number counts

    def layer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return functional_call(conv, {"weight": weight, "comp": z}, ((x, targets), index, cond))

    return layer


def condconv(w: Workload, device: str) -> Function:
    """Use timm's `CondConv2d`. Its weight is `(R, O, I / groups, kernel, kernel)`, flat after the first axis."""
    for name in ("nms", "qnms"):  # timm imports torchvision: a build for another torch lacks two ops that it describes
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    from timm.layers import CondConv2d

    conv = CondConv2d(w.I, w.O, w.kernel, w.stride, w.kernel // 2, groups=w.groups, num_experts=w.R).to(device)
    return lambda x, z, weight: functional_call(conv, {"weight": weight.flatten(1)}, (x, z))
