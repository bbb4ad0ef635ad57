"""The same layer as other libraries have it, at their best: their own networks make the weights, and theirs use them.

None of the three hypernetwork libraries has a batched product for weights of each instance, so that `torch.func.vmap`
does it for them; heads have no biases, and their parameter is the `weight` given. Packages are imported where they are
used: whoever has none of them measures the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from .inputs import edges
from .workloads import Workload

Way = Callable[..., Tensor]


def hypnettorch(w: Workload, device: str) -> Way:
    """hypnettorch 0.0.4: an `HMLP` without hidden layers gives weights to an `MLP` without any of its own."""
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

    def way(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        made = functional_call(head, {name: weight.flatten(0, 1)}, (), {"cond_input": z, "ret_format": "flattened"})
        return vmap(lambda own, rows: network.forward(rows, weights=[own]))(made.unflatten(1, (w.O, w.I)), x)

    return way


def hyperlight(w: Workload, device: str) -> Way:
    """hyperlight 0.0.5: a `HyperNet` without hidden layers sets the weights of a `HyperLinear`."""
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

    def one(own: Tensor, rows: Tensor) -> Tensor:
        with network.using_externals({"weight": own}):
            return network(rows)

    def way(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        made = functional_call(head, {name: weight.flatten(0, 1)}, (), {"z": z})["weight"]
        return vmap(one)(made.view(-1, w.O, w.I), x)

    return way


def hyper_nn(w: Workload, device: str) -> Way:
    """hyper-nn 0.2.2: a `TorchHyperNetwork` whose parameters are those that a linear layer of ours makes from z."""
    from hypernn.torch import TorchHyperNetwork

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it calls what torch.func has replaced
        network = TorchHyperNetwork(nn.Linear(w.I, w.O, bias=False))

    def one(own: Tensor, rows: Tensor) -> Tensor:
        return network.target_forward(rows, generated_params=own)

    def way(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return vmap(one)(nn.functional.linear(z, weight.flatten(0, 1)), x)

    return way


def nnconv(w: Workload, device: str) -> Way:
    """PyTorch Geometric's `NNConv`, which sums over the edges that come in. The head is `(I, O, R)` here."""
    from torch_geometric.nn import NNConv

    head = nn.Linear(w.R, w.I * w.O, bias=False, device=device)
    layer = NNConv(w.I, w.O, head, aggr="add", root_weight=False, bias=False)
    index = torch.stack(edges(w, device))

    def way(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return functional_call(layer, {"nn.weight": weight.flatten(0, 1)}, (x.squeeze(1), index, z)).unsqueeze(1)

    return way
