"""Draw docs/_static/initialisation.png: activations and gradients through ten generated layers at initialisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from fasthyper.nn import HyperConv2d, HyperLinear

WIDTH, FEATURES, INSTANCES, DEPTH = 64, 64, 512, 10


def _layers(make: Callable[[], nn.Module]) -> list[nn.Module]:
    return [make() for _ in range(DEPTH)]


def _ways() -> dict[str, list[nn.Module]]:
    linear = lambda **options: _layers(lambda: HyperLinear(WIDTH, WIDTH, FEATURES, bias=False, **options))
    conv = lambda: HyperConv2d(WIDTH, WIDTH, 3, FEATURES, padding=1, padding_mode="circular", bias=False)
    ordinary = _layers(lambda: nn.Linear(WIDTH, WIDTH, bias=False))
    for layer in ordinary:
        nn.init.normal_(layer.weight, std=1 / math.sqrt(WIDTH))
    return {
        "nn.Linear": ordinary,
        "HyperLinear": linear(),
        "rank 8": linear(rank=8),
        'weight_map="tanh"': linear(weight_map="tanh"),
        'weight_map="normalize"': linear(weight_map="normalize"),
        "HyperConv2d": _layers(conv),
    }


def _variances(layers: list[nn.Module], z: Tensor) -> tuple[list[float], list[float]]:
    """Return the second moments of the activations after each layer, and of the gradients before it."""
    shape = (INSTANCES, WIDTH, 4, 4) if isinstance(layers[0], HyperConv2d) else (INSTANCES, WIDTH)
    values = [torch.randn(shape, requires_grad=True)]
    for layer in layers:
        values.append(layer(values[-1]) if isinstance(layer, nn.Linear) else layer(values[-1], z))
    gradients = torch.autograd.grad(values[-1], values[:-1], torch.randn(shape))
    return [v.square().mean().item() for v in values[1:]], [g.square().mean().item() for g in gradients]


def main() -> None:
    torch.manual_seed(0)
    z = math.sqrt(FEATURES) * nn.functional.normalize(torch.randn(INSTANCES, FEATURES))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    depth = range(1, DEPTH + 1)
    for name, layers in _ways().items():
        for axis, moments in zip(axes, _variances(layers, z), strict=True):
            axis.plot(depth, moments, "k--" if name == "nn.Linear" else "-", label=name)
    for axis, title in zip(axes, ("activations after layer", "gradients before layer"), strict=True):
        axis.axhspan(0.5, 2, color="0.93", zorder=0)
        axis.set(yscale="log", ylim=(0.2, 5), title=title, xlabel="layer")
        axis.set_yticks([0.25, 0.5, 1, 2, 4], ["¼", "½", "1", "2", "4"])
        axis.minorticks_off()
    axes[0].set_ylabel("second moment")
    axes[1].legend(fontsize=8, ncols=2, frameon=False)
    figure.savefig(Path(__file__).parent / "_static" / "initialisation.png", dpi=150)


if __name__ == "__main__":
    main()
