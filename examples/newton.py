"""Find the z of each instance by Newton's method: the Hessian of each instance's loss in its z.

A hypernetwork with a decoder for curves is given. Each curve is seen at some points, and its z is unknown. An instance
has few features of z and many weights, so that Newton's steps in z are cheap. Losses and Hessians of all instances are
computed in one call of each op: `vmap(hessian(…))`.

    python examples/newton.py
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn
from torch.func import grad, hessian, vmap

import fasthyper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8, help="Newton's steps")
    parser.add_argument("--instances", type=int, default=64)
    parser.add_argument("--points", type=int, default=40)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=4, help="features of z")
    parser.add_argument("--damping", type=float, default=0.01)
    args = parser.parse_args()

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, args.width), nn.Tanh(), nn.Linear(args.width, 1))
    model = fasthyper.Hypernetwork(
        nn.Identity(), fasthyper.hyperize(network, cond_features=args.hidden, init="hyperfan_in")
    )
    for p in model.parameters():
        p.requires_grad_(False)
    x = torch.linspace(-2, 2, args.points).expand(args.instances, -1).unsqueeze(-1)
    true = torch.randn(args.instances, args.hidden)
    y = model(x, true)

    def loss(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(model(x[None], z[None])[0], y)

    z = true + 0.5 * torch.randn_like(true)
    damping = args.damping * torch.eye(args.hidden)
    for epoch in range(args.epochs):
        start = time.perf_counter()
        losses = vmap(loss)(z, x, y)
        gradient, curvature = vmap(grad(loss))(z, x, y), vmap(hessian(loss))(z, x, y)
        values, axes = torch.linalg.eigh(curvature)  # steps go down where the loss curves up, and where it curves down
        positive = axes @ torch.diag_embed(values.abs()) @ axes.mT
        step = torch.linalg.solve(positive + damping, gradient.unsqueeze(-1)).squeeze(-1)
        shorter = vmap(loss)(z - step, x, y) < losses
        z = torch.where(shorter[:, None], z - step, z - 0.25 * step)
        print(f"epoch {epoch + 1}: loss {losses.mean():.6f}, {time.perf_counter() - start:.2f} s", flush=True)


if __name__ == "__main__":
    main()
