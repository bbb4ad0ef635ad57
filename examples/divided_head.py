"""A head that is divided among processes, so that it may be larger than one of them could hold.

Every instance has a network of its own, from a description of a function to the function. The hypernetwork's two heads
are by far the largest part. Each process makes, applies and trains one part of them. A check says that no process
ever gathers a head: what is sent has the size of z and of the network's input and output.

    torchrun --nproc-per-node 2 examples/divided_head.py
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module

from fasthyper import HyperLinear, Hypernetwork
from fasthyper.distributed import HeadParallel, reset_parts


def random_functions(instances: int, points: int, features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return points, descriptions of functions, and the values of the functions at the points."""
    x, cond = torch.randn(instances, points, features), torch.randn(instances, features)
    return x, cond, torch.sin(x + cond[:, None]) * cond[:, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--instances", type=int, default=32, help="in a batch")
    parser.add_argument("--width", type=int, default=1024, help="of the generated network")
    parser.add_argument("--hidden", type=int, default=64, help="features of z")
    parser.add_argument("--features", type=int, default=4, help="of the network's input and output")
    args = parser.parse_args()

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),))

    warnings.filterwarnings("ignore", "Full backward hook is firing")  # of CommDebugMode, about x without a gradient
    torch.manual_seed(0)  # all processes have the same data, and the same trunk
    trunk = nn.Sequential(nn.Linear(args.features, args.hidden), nn.ReLU(), nn.Linear(args.hidden, args.hidden))
    with torch.device("meta"):  # the whole heads are never made
        first = HyperLinear(args.features, args.width, args.hidden)
        second = HyperLinear(args.width, args.features, args.hidden)
    primary = nn.Sequential(first, nn.Tanh(), second)
    parallelize_module(primary, mesh, {"0": HeadParallel("out"), "2": HeadParallel("in")})
    reset_parts(primary.to_empty(device=device))
    model = Hypernetwork(trunk.to(device), primary)

    whole = sum(layer.weight.numel() for layer in (first, second))
    here = sum(layer.weight.to_local().numel() for layer in (first, second))
    if dist.get_rank() == 0:
        print(f"heads of {whole} parameters, {here} of them in this process")

    batches = [[t.to(device) for t in random_functions(args.instances, 16, args.features)] for _ in range(args.batches)]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in range(args.epochs):
        start, total = time.perf_counter(), 0.0
        for x, cond, y in batches:
            optimizer.zero_grad()
            with CommDebugMode() if epoch == 0 else nullcontext() as traffic:
                loss = nn.functional.mse_loss(model(x, cond), y)
                loss.backward()
                optimizer.step()
            if traffic is not None:
                sent = {str(op) for op, count in traffic.get_comm_counts().items() if count}
                assert all("all_reduce" in op for op in sent), sent
            total += loss.item()
        if dist.get_rank() == 0:
            seconds = time.perf_counter() - start
            print(f"epoch {epoch + 1}: loss {total / len(batches):.4f}, {seconds:.2f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
