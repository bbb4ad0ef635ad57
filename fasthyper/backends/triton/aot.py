"""Compile a call ahead of time, for parts that need not be here, and read what came out.

No correctness test sees a spilled register, a generated operand that goes through shared memory, or a product that
ptxas serialises; the compiler's own output shows all three.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from .calls import (
    Call,
    cdiv,
    dx_dz_call,
    dx_dz_tiles,
    fold_call,
    fold_tiles,
    pad_call,
    padded,
    precision_of,
    reduce_call,
    weight_grad_call,
    weight_grad_tiles,
)
from .tiles import PARTS, SHARED

WARNINGS = ("C7508", "C7512", "C7514", "C7515")
"""ptxas: setmaxnreg ignored, and wgmma serialised, for one reason or another."""
_PRODUCTS = {
    "sm_80": r"\bmma\.sync\.",
    "sm_90": r"\bwgmma\.mma_async\.",
    "sm_100": r"\btcgen05\.mma\.",
    "gfx942": r"\bv_mfma_",
}
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_WGMMA = re.compile(r"wgmma\.mma_async\.sync\.aligned\.\S+\s+\{[^}]*\},\s*(\{?)")


class Report(NamedTuple):
    """What the compiler made of a call.

    Args:
        registers: of a thread.
        spilled: bytes of registers kept in memory.
        shared: bytes of shared memory.
        products: instructions of the matrix unit, counted in the assembly.
        from_registers: those of them (wgmma) whose left operand is in registers.
        warnings: of ptxas, by number.
    """

    registers: int
    spilled: int
    shared: int
    products: int
    from_registers: int
    warnings: tuple[str, ...]

    def faults(self, part: str, operand: str) -> list[str]:
        """What is wrong with it, in words; `operand` is a case's."""
        serialised = [w for w in self.warnings if w in WARNINGS]
        faults = {
            f"spills {self.spilled} bytes": self.spilled > 0,
            f"wants {self.shared} bytes of shared memory of {SHARED[part]}": self.shared > SHARED[part],
            "uses no matrix unit": bool(operand) and self.products == 0,
            "takes the generated operand through shared memory": part == "sm_90"
            and operand == "generated"
            and self.from_registers == 0,
            f"ptxas warns of {', '.join(serialised)}": bool(serialised),
        }
        return [text for text, found in faults.items() if found]


def _target(part: str) -> GPUTarget:
    return GPUTarget("hip", part, 64) if part.startswith("gfx") else GPUTarget("cuda", int(part[3:]), 32)


def _type(value: Any) -> str:
    """The type of an argument in a kernel's signature."""
    if isinstance(value, Tensor):
        return f"*{_DTYPES[value.dtype]}"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_DTYPES[value.base.dtype]}{list(value.block_shape)}>"
    return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"


def source(call: Call) -> ASTSource:
    """The call as the compiler sees it at launch: ones and Nones constant, multiples of 16 known as such."""
    constants = call.constants | {k: v for k, v in call.args.items() if v is None or (type(v) is int and v == 1)}
    signature = {k: "constexpr" if k in constants else _type(v) for k, v in (call.args | call.constants).items()}
    names = call.kernel.arg_names
    signature = {name: signature[name] for name in names}
    attributes = {}
    for name, value in call.args.items():
        number = value.data_ptr() if isinstance(value, Tensor) else value
        if name not in constants and isinstance(number, int) and number % 16 == 0:
            attributes[(names.index(name),)] = [["tt.divisibility", 16]]
    return ASTSource(call.kernel, signature, constants, attributes)


def compiled(call: Call, part: str) -> Any:
    """Compile for a part: triton's compiled kernel, with all that it went through in `asm`."""
    options = {"num_warps": call.warps, "num_stages": call.stages}
    return triton.compile(source(call), target=_target(part), options=options)


def report(call: Call, part: str) -> Report:
    """Compile for a part, and read what came out."""
    kernel = compiled(call, part)
    if part.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        numbers = {k: int(v) for k, v in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", text)}
        spilled = 4 * (numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"])
        products = len(re.findall(_PRODUCTS[part], text))
        return Report(numbers["vgpr_count"], spilled, kernel.metadata.shared, products, 0, ())
    text = kernel.asm["ptx"]
    log = _ptxas(text, part)
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    if spilled and not re.search(r"\b(LDL|STL)\b", _disassembled(kernel.asm["cubin"])):
        spilled = 0  # for sm_100, ptxas counts a few bytes of which nothing is left in the code
    found = re.search(r"Used (\d+) registers", log)
    return Report(
        int(found[1]) if found else 0,
        spilled,
        kernel.metadata.shared,
        len(re.findall(_PRODUCTS[part], text)),
        Counter(_WGMMA.findall(text))["{"],
        tuple(sorted(set(re.findall(r"\bC\d{4}\b", log)))),
    )


_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _disassembled(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run(
            [str(_TOOLS / "cuobjdump"), "-sass", str(path)], capture_output=True, text=True, check=True
        ).stdout


def _ptxas(text: str, part: str) -> str:
    """What ptxas says of PTX with -v; it is part of the triton package."""
    newest = _TOOLS / "ptxas-blackwell"
    binary = newest if int(part[3:]) >= 100 and newest.exists() else _TOOLS / "ptxas"
    arch = part + ("a" if int(part[3:]) >= 90 else "")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "kernel.ptx"
        path.write_text(text)
        command = [str(binary), "-v", f"-arch={arch}", str(path), "-o", str(Path(scratch) / "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ptxas failed for {part}: {done.stderr.strip()[-1000:]}")
    return done.stdout + done.stderr


class Case(NamedTuple):
    """A call to compile.

    Args:
        name: part, dtype, kind of sizes, kernel, tile.
        call: the call.
        operand: the left one of its products: ``"generated"``, of 16 bits, which belongs in registers; ``"stored"``;
            empty where there are no products.
    """

    name: str
    call: Call
    operand: str


# R, I, O: even; as large as dx_dz takes; a tail of R; odd sizes, padded; few features, several columns a step; few
# outputs; ones, which the compiler takes for constants.
_SIZES = {
    "even": (128, 64, 128),
    "large": (128, 64, 256),
    "tail": (144, 48, 48),
    "odd": (101, 101, 50),
    "few": (25, 64, 64),
    "skinny": (32, 64, 10),
    "ones": (16, 1, 24),
}
CENTRAL = ("even", "even, affine")
"""Kinds of sizes that every tile is compiled for in the ordinary tests; the rest with --slow."""


def kinds() -> list[str]:
    """Names of the kinds of sizes that `cases` knows."""
    return [*_SIZES, "even, affine", "odd, affine", "few, affine", "even, points", "even, strided"]


def cases(part: str, dtype: torch.dtype, allow_tf32: bool, kind: str) -> Iterator[Case]:
    """Every kernel with every tile that a part may take, for one kind of sizes. Tensors are meta."""
    sizes, _, variant = kind.partition(", ")
    R, I, O = _SIZES[sizes]
    B, N = 1 if sizes == "ones" else 4800, 3 if variant == "points" else 1
    bits, W = dtype.itemsize * 8, padded(R)
    precision = precision_of(dtype, part, allow_tf32)

    def new(*shape: int) -> Tensor:
        if variant == "strided":  # no axis is contiguous: pointers everywhere
            return torch.empty(*shape, 2, dtype=dtype, device="meta")[..., 1]
        return torch.empty(shape, dtype=dtype, device="meta")

    x, z, h, g = new(B, N, I), new(B, W), new(O, I, W), new(B, N, O)
    base, bias, b0 = (new(O, I), new(O, R), new(O)) if variant == "affine" else (None, None, None)
    rows = z[:, None].expand(-1, N, -1)
    transposed = lambda t: None if t is None else t.T
    generated = "generated" if bits == 16 else "stored"
    folds = {
        "y": (x, rows, h.permute(1, 2, 0), base, bias, b0, O),
        "dx": (g, rows, h.permute(0, 2, 1), transposed(base), None, None, I),
        "dz": (g, x, h, transposed(bias), None, None, R),
    }
    how = (part, precision)
    text = f"{part} {str(dtype).removeprefix('torch.')} {precision} {kind}"
    for role, (u, v, head, a, c, d, P) in folds.items():
        out = torch.empty(B * N, P, dtype=dtype, device="meta")
        for tile in fold_tiles(v, head, P, part):
            call = fold_call(u, v, head, a, c, d, out, u.shape[2], tile, *how)
            yield Case(f"{text} fold {role} {tuple(tile)}", call, generated)
    dx, dz = (torch.empty(B * N, n, dtype=dtype, device="meta") for n in (I, R))
    for tile in dx_dz_tiles(z, h, R, O, part):
        call = dx_dz_call(x, z, h, base, bias, g, dx, dz, I, tile, *how)
        yield Case(f"{text} dx_dz {tuple(tile)}", call, "stored")
    for parts in (1, 2):
        shape = (O, I, R) if parts == 1 else (parts, O, I, R)
        out = torch.empty(shape, dtype=dtype if parts == 1 else torch.float32, device="meta")
        for tile in weight_grad_tiles(z, g, part):
            call = weight_grad_call(x, z, g, out, cdiv(cdiv(B * N, parts), 64) * 64, tile, *how)
            yield Case(f"{text} weight_grad{'' if parts == 1 else ', split'} {tuple(tile)}", call, generated)

    if kind == "odd":
        yield Case(f"{text} pad", pad_call(new(B, R), new(O, I, R), z, h), "")
    partial = torch.empty(4, O, I, R, dtype=torch.float32, device="meta")
    yield Case(f"{text} reduce", reduce_call(partial, new(O, I, R)), "")


PRECISIONS = ((torch.bfloat16, False), (torch.float16, False), (torch.float32, False), (torch.float32, True))
"""Dtypes, and whether float32 may be rounded to TF32."""


def main() -> None:
    """Print the table, of all parts or of those named: kernel, tile, registers, shared memory, products."""
    for part in sys.argv[1:] or PARTS:
        for dtype, allow_tf32 in PRECISIONS:
            if allow_tf32 and part.startswith("gfx"):
                continue
            for kind in kinds():
                for name, call, operand in cases(part, dtype, allow_tf32, kind):
                    r = report(call, part)
                    faults = "; ".join(r.faults(part, operand)) or "clean"
                    numbers = f"{r.registers:4d} registers {r.spilled:5d} spilled {r.shared / 1024:6.1f} KiB"
                    print(f"{name:<84}{numbers} {r.products:4d} products  {faults}", flush=True)


if __name__ == "__main__":
    main()
