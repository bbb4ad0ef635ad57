"""What the machine code of the Triton kernels' hot loops shows, and how published shapes fill an H200, without a GPU.

`make aot` prints the table. A hot loop is the innermost loop with the most matrix instructions. Its columns are counts
for one thread and one step, and numbers that follow from them at the matrix unit's full rate; nothing is measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import aot
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from fasthyper.backends import gpu
from fasthyper.backends.gpu import cdiv
from fasthyper.backends.triton import launch, tuning
from fasthyper.backends.triton.recording import Call

H200 = gpu.Device("H200", "sm_90", 132)
SHAPES = {  # B, I, R padded, O, of benchmarks/workloads.py, with as many instances as published
    "qm9": (39_168, 64, 128, 64),
    "modelnet": (8_192, 64, 32, 128),
    "diffdock": (50_000, 48, 144, 48),
    "square": (16_384, 128, 128, 128),
}
_FLOPS_A_CLOCK = 4096  # of one multiprocessor's matrix units, in 16 bits
_SCHEDULERS = 4  # each issues one instruction a clock

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
_BACK = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)")
_PRODUCT = re.compile(r"\bHGMMA\.64x(\d+)x(\d+)")
_LOAD = re.compile(r"\bLDG\S*\s+(R\d+)\b")


class HotLoop(NamedTuple):
    """One step of a kernel's hot loop, as the machine code has it.

    Args:
        instructions: number of instructions of a thread.
        barriers: number of barriers of the whole block.
        waits: number of waits for matrix products.
        full_waits: waits that leave no product in flight.
        loads: number of loads from global memory, without the copies of descriptors.
        exposed: loads whose value is needed before another product is issued.
        flops: operations of one warpgroup's matrix products.
    """

    instructions: int
    barriers: int
    waits: int
    full_waits: int
    loads: int
    exposed: int
    flops: int


def hot_loop(sass: str) -> HotLoop | None:
    """Return the hot loop in a disassembly for sm_90; None if no loop has wgmma instructions."""
    code = [(int(at, 16), text) for at, text in _INSTRUCTION.findall(sass)]
    loops = []
    for at, text in code:
        back = _BACK.search(text)
        if back and int(back[1], 16) <= at:
            loops.append([text for place, text in code if int(back[1], 16) <= place <= at])
    # A wait that failed is repeated behind the end of the kernel, and jumps back from there.
    loops = [loop for loop in loops if not any("EXIT" in text for text in loop)]
    loops = [loop for loop in loops if any(_PRODUCT.search(text) for text in loop)]
    inner = [loop for loop in loops if not any(len(other) < len(loop) and set(other) <= set(loop) for other in loops)]
    if not inner:
        return None
    step = max(inner, key=lambda loop: sum(bool(_PRODUCT.search(text)) for text in loop))
    count = lambda word: sum(word in text for text in step)
    products = [match for text in step if (match := _PRODUCT.search(text))]
    return HotLoop(
        len(step),
        count("BAR.SYNC"),
        count("WARPGROUP.DEPBAR"),
        count("WARPGROUP.DEPBAR.LE gsb0, 0x0"),
        sum(bool(_LOAD.search(text)) for text in step),
        sum(_is_exposed(step, at) for at, text in enumerate(step) if _LOAD.search(text)),
        sum(2 * 64 * int(match[1]) * int(match[2]) for match in products),
    )


def _is_exposed(step: list[str], at: int) -> bool:
    """Return whether the value of the load at an index is used before the next product."""
    register = re.compile(rf"\b{_LOAD.search(step[at])[1]}\b")  # type: ignore[index]
    for text in step[at + 1 :] + step[:at]:
        if _PRODUCT.search(text):
            return False
        if register.search(text):
            return True
    return False


def copied_bytes(call: Call) -> int:
    """Return the bytes that a block copies by descriptors in one step; they come from L2."""
    boxes = [t for name, t in call.args.items() if isinstance(t, TensorDescriptor) and name != "h_tail"]
    return sum(math.prod(t.block_shape) * t.base.element_size() for t in boxes)


def fill(blocks: int, processors: int) -> float:
    """Return the mean share of the processors at work while blocks of equal length run in waves."""
    return blocks / (cdiv(blocks, processors) * processors)


def recorded(run: Callable[[], None], device: gpu.Device = H200) -> list[Call]:
    """Return the calls that a function of `launch` would make on a device, with the tiles that are predicted best."""
    calls: list[Call] = []
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(gpu, "device", return_value=device))
        stack.enter_context(mock.patch.object(tuning, "_may_time", return_value=False))
        stack.enter_context(mock.patch.object(Call, "launch", lambda call: calls.append(call)))
        run()
    return calls


def published() -> Iterator[tuple[str, list[Call]]]:
    """Yield the calls of forward and backward of each shape, in bfloat16, on an H200."""
    new = lambda *sizes: torch.empty(sizes, dtype=torch.bfloat16, device="meta")
    for name, (B, I, R, O) in SHAPES.items():
        x, z, h, g = new(B, 1, I), new(B, R), new(O, I, R), new(B, 1, O)
        results = new(B, 1, I), new(B, R), new(O, I, R)
        forward = partial(launch.apply, x, z, h, None, None, None, torch.empty_like(g))
        yield name, recorded(forward) + recorded(partial(launch.grads, x, z, h, None, None, g, *results))


_HEAD = ("call", "blocks", "fill", "registers", "instructions", "barriers", "waits", "loads", "issue", "B/clock")


def _tile(call: Call) -> tuple[int, ...]:
    """Return rows, columns and depth of the block's product."""
    c = call.constants
    if "CB" in c:
        return c["BM"], c["BP"], c["CB"] * c["BK"]
    return (c["BM"], c["BR"], c["BO"]) if "READ" in c else (c["BI"] * c["BR"], c["BO"], c["BM"])


def row(name: str, call: Call) -> tuple[Any, ...] | None:
    """Return the row of a call in the table; None if it has no matrix products."""
    kernel = aot.compiled(call, H200.arch)
    loop = hot_loop(aot.disassembled(kernel.asm["cubin"]))
    if loop is None:
        return None
    clocks = loop.flops * (call.warps // 4) / _FLOPS_A_CLOCK
    tile = _tile(call)
    blocks = math.prod(call.grid)
    return (
        f"{name} {call.kernel.__name__} {'×'.join(map(str, tile))}",
        blocks,
        f"{100 * fill(blocks, H200.processors):.0f} %",
        aot.resource_usage(call, H200.arch).registers,
        loop.instructions,
        loop.barriers,
        f"{loop.waits}, {loop.full_waits} full",
        f"{loop.loads}, {loop.exposed} exposed",
        f"{100 * loop.instructions * call.warps / _SCHEDULERS / clocks:.0f} %",
        f"{copied_bytes(call) / clocks:.0f}",
    )


def main() -> None:
    """Print the table, in Markdown."""
    print(f"| {' | '.join(_HEAD)} |\n|---{'|--:' * (len(_HEAD) - 1)}|")
    for name, calls in published():
        for call in calls:
            cells = row(name, call)
            if cells is not None:
                print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
