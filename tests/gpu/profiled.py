"""The stage `ncu` of `make gpu`: one call of each part at two sizes, between marks for the profiler."""

from __future__ import annotations

import sys

import torch
from gpu_common import TIMED, available, described, made, say, sized
from gpu_ways import PARTS, part_call

PROBLEMS = {"qm9": ("triton", "cuda"), "qmix": ("cuda",)}


def main() -> int:
    """Call everything once to compile and warm up, and once for the profiler."""
    failed = 0
    for problem, backends in PROBLEMS.items():
        x, z, weight, g = made(sized(TIMED[problem]), torch.bfloat16, affine=False)
        for backend in filter(available, backends):
            for part in PARTS:
                call = part_call(backend, part, (x, z, weight, g))
                try:
                    call()
                    torch.cuda.synchronize()
                    torch.cuda.profiler.start()
                    call()
                    torch.cuda.synchronize()
                    torch.cuda.profiler.stop()
                except Exception as failure:
                    say(f"{problem} {backend} {part}: {described(failure)}")
                    failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
