"""The interaction of Sparse R-CNN: two layers generated from each proposal, (I, O), with norms between them."""

import torch
from torch import nn

from fasthyper.nn import HyperLinear, Hypernetwork

PROPOSALS, POINTS, HIDDEN, DYNAMIC = 5, 49, 16, 4


class Interaction(nn.Module):
    """Written out: a product of each region's points with the weights of its proposal, a norm and a ReLU, twice."""

    def __init__(self):
        super().__init__()
        self.dynamic = nn.Linear(HIDDEN, 2 * HIDDEN * DYNAMIC)
        self.norms = nn.ModuleList([nn.LayerNorm(DYNAMIC), nn.LayerNorm(HIDDEN)])

    def forward(self, proposals, regions):
        first, second = self.dynamic(proposals).chunk(2, 1)
        y = torch.bmm(regions, first.view(-1, HIDDEN, DYNAMIC))
        y = torch.bmm(torch.relu(self.norms[0](y)), second.view(-1, DYNAMIC, HIDDEN))
        return torch.relu(self.norms[1](y))


def test_its_head_becomes_two_generated_layers():
    torch.manual_seed(0)
    written_out = Interaction().double()
    regions = torch.randn(PROPOSALS, POINTS, HIDDEN, requires_grad=True, dtype=torch.float64)
    proposals = torch.randn(PROPOSALS, HIDDEN, requires_grad=True, dtype=torch.float64)
    head, layers = written_out.dynamic, []
    for rows, sizes in zip(
        torch.arange(head.out_features).chunk(2), ((HIDDEN, DYNAMIC), (DYNAMIC, HIDDEN)), strict=True
    ):
        part = nn.Linear(HIDDEN, len(rows), dtype=torch.float64)
        part.load_state_dict({"weight": head.weight.detach()[rows], "bias": head.bias.detach()[rows]})
        layers.append(HyperLinear.from_head(part, *sizes, layout="io"))
    norms = written_out.norms
    primary = nn.Sequential(layers[0], norms[0], nn.ReLU(), layers[1], norms[1], nn.ReLU())
    ours = Hypernetwork(nn.Identity(), primary)(regions, proposals)
    expected = written_out(proposals, regions)
    torch.testing.assert_close(ours, expected)
    g = torch.randn_like(ours)
    wanted = regions, proposals, *norms.parameters()
    torch.testing.assert_close(torch.autograd.grad(ours, wanted, g), torch.autograd.grad(expected, wanted, g))
