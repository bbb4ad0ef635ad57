"""Small NNConvs and their definition, for the tests of the layer."""

import torch
from graphs import reduced
from torch.nn import Linear, Sequential, Tanh

from fasthyper.nn import NNConv

I, O, D, R = 5, 4, 3, 7


def network(features=I * O):
    return Sequential(Linear(D, R), Tanh(), Linear(R, features))


def layer(cls=NNConv, in_channels=I, nn=None, **kwargs):
    torch.manual_seed(5)
    conv = cls(in_channels, O, network() if nn is None else nn(), **kwargs).double()
    if conv.bias is not None:
        torch.nn.init.normal_(conv.bias)
    return conv


def data(edge_index, nodes=6):
    return torch.randn(nodes, I).double(), torch.randn(edge_index.shape[1], D).double()


def definition(conv, x, x_target, edge_index, edge_attr, targets):
    w = conv.nn(edge_attr).view(-1, I, O)
    y = reduced(torch.einsum("ei,eio->eo", x[edge_index[0]], w), edge_index[1], targets, conv.aggr)
    if conv.root_weight and x_target is not None:
        y = y + x_target @ conv.lin.weight.T
    return y if conv.bias is None else y + conv.bias


class Trunk(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = Linear(D, R), Linear(R, I * O)

    def forward(self, a):
        return self.last(self.first(a).sigmoid())
