"""Compile Triton calls ahead of time, without a GPU, and read the resources that the compiled kernels use.

Tests of results do not notice spilled registers, a generated operand in shared memory, or serialised matrix products.
The compiler's output shows all three. `make aot` prints the table.
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

from fasthyper.backends.gpu import cdiv, padded
from fasthyper.backends.triton.calls import (
    dx_dz_call,
    dx_dz_tiles,
    fold_call,
    fold_tiles,
    pad_call,
    precision_of,
    reduce_call,
    reduce_points_call,
    weight_grad_call,
    weight_grad_tiles,
)
from fasthyper.backends.triton.layouts import in_place
from fasthyper.backends.triton.recording import Call
from fasthyper.backends.triton.term_calls import outer_sum_call, row_products_call, sum_terms_call
from fasthyper.backends.triton.tiles import ARCHS

SHARED_MEMORY = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory that one block can have; for sm_80, those of sm_86, sm_89 and sm_120, which take its tiles."""
WARNINGS = ("C7508", "C7512", "C7514", "C7515")
"""Warnings of ptxas: setmaxnreg is ignored, or wgmma is serialised."""
_MATRIX_INSTRUCTIONS = {
    "sm_80": r"\bmma\.sync\.",
    "sm_90": r"\bwgmma\.mma_async\.",
    "sm_100": r"\btcgen05\.mma\.",
    "gfx942": r"\bv_mfma_",
}
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}
_WGMMA = re.compile(r"wgmma\.mma_async\.sync\.aligned\.\S+\s+\{[^}]*\},\s*(\{?)")


class ResourceUsage(NamedTuple):
    """The resources that a compiled kernel uses.

    Args:
        registers: registers per thread.
        spilled: bytes of spilled registers.
        shared_memory: bytes of shared memory per block.
        matrix_instructions: number of instructions for the matrix unit in the assembly.
        from_registers: number of wgmma instructions whose left operand is in registers.
        warnings: numbers of ptxas's warnings.
    """

    registers: int
    spilled: int
    shared_memory: int
    matrix_instructions: int
    from_registers: int
    warnings: tuple[str, ...]

    def faults(self, arch: str, operand: str) -> list[str]:
        """Describe each fault; `operand` is that of the `Case`."""
        serialised = [w for w in self.warnings if w in WARNINGS]
        limit = SHARED_MEMORY[arch]
        faults = {
            f"spills {self.spilled} bytes": self.spilled > 0,
            f"takes {self.shared_memory} bytes of shared memory of {limit}": self.shared_memory > limit,
            "uses no matrix unit": bool(operand) and self.matrix_instructions == 0,
            "takes the generated operand through shared memory": arch == "sm_90"
            and operand == "generated"
            and self.from_registers == 0,
            f"ptxas warns of {', '.join(serialised)}": bool(serialised),
        }
        return [text for text, is_fault in faults.items() if is_fault]


def _target(arch: str) -> GPUTarget:
    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


def _type(value: Any) -> str:
    """Return the type of an argument in a kernel's signature."""
    if isinstance(value, Tensor):
        return f"*{_DTYPES[value.dtype]}"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_DTYPES[value.base.dtype]}{list(value.block_shape)}>"
    return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"


def source(call: Call) -> ASTSource:
    """Return the source in the form that a launch passes to the compiler.

    Arguments that are 1 or None are constants, and multiples of 16 are marked, unless the kernel is not specialised.
    """
    plain = {p.name for p in call.kernel.params if p.do_not_specialize}
    ones = {k: v for k, v in call.args.items() if type(v) is int and v == 1 and k not in plain}
    constants = call.constants | ones | {k: v for k, v in call.args.items() if v is None}
    signature = {k: "constexpr" if k in constants else _type(v) for k, v in (call.args | call.constants).items()}
    names = call.kernel.arg_names
    signature = {name: signature[name] for name in names}
    attributes = {}
    for name, value in call.args.items():
        number = value.data_ptr() if isinstance(value, Tensor) else value
        if name not in constants and name not in plain and isinstance(number, int) and number % 16 == 0:
            attributes[(names.index(name),)] = [["tt.divisibility", 16]]
    return ASTSource(call.kernel, signature, constants, attributes)


def compiled(call: Call, arch: str) -> Any:
    """Compile a call for an arch; return Triton's compiled kernel, whose `asm` has every stage of the compilation."""
    options = {"num_warps": call.warps, "num_stages": call.stages}
    return triton.compile(source(call), target=_target(arch), options=options)


def resource_usage(call: Call, arch: str) -> ResourceUsage:
    """Compile a call for an arch, and return the resources that it uses."""
    kernel = compiled(call, arch)
    if arch.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        numbers = {k: int(v) for k, v in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", text)}
        spilled = 4 * (numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"])
        products = len(re.findall(_MATRIX_INSTRUCTIONS[arch], text))
        return ResourceUsage(numbers["vgpr_count"], spilled, kernel.metadata.shared, products, 0, ())
    text = kernel.asm["ptx"]
    log = _ptxas(text, arch)
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    if spilled and not re.search(r"\b(LDL|STL)\b", disassembled(kernel.asm["cubin"])):
        spilled = 0  # for sm_100, ptxas counts a few bytes, but the code has no such loads or stores
    registers = re.search(r"Used (\d+) registers", log)
    return ResourceUsage(
        int(registers[1]) if registers else 0,
        spilled,
        kernel.metadata.shared,
        len(re.findall(_MATRIX_INSTRUCTIONS[arch], text)),
        Counter(_WGMMA.findall(text))["{"],
        tuple(sorted(set(re.findall(r"\bC\d{4}\b", log)))),
    )


_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def disassembled(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run(
            [str(_TOOLS / "cuobjdump"), "-sass", str(path)], capture_output=True, text=True, check=True
        ).stdout


def _ptxas(text: str, arch: str) -> str:
    """Return what `ptxas -v` prints for a PTX text; the triton package contains ptxas."""
    newest = _TOOLS / "ptxas-blackwell"
    binary = newest if int(arch[3:]) >= 100 and newest.exists() else _TOOLS / "ptxas"
    target = arch + ("a" if int(arch[3:]) >= 90 else "")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "kernel.ptx"
        path.write_text(text)
        command = [str(binary), "-v", f"-arch={target}", str(path), "-o", str(Path(scratch) / "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ptxas failed for {arch}: {done.stderr.strip()[-1000:]}")
    return done.stdout + done.stderr


class Case(NamedTuple):
    """A call to compile.

    Args:
        name: arch, dtype, precision, shape, kernel and tile.
        call: the call.
        operand: the left operand of its matrix products: ``"generated"``, in 16 bits, which must stay in registers;
            ``"stored"``; or empty where there are no products.
    """

    name: str
    call: Call
    operand: str


# R, I, O: multiples of the tile; the largest of dx_dz; R with a tail; rows that are aligned, but no multiples of 16;
# odd sizes, padded; few features, so that a step has several columns; few outputs; ones, which the compiler treats as
# constants.
_SIZES = {
    "even": (128, 64, 128),
    "large": (128, 64, 256),
    "tail": (144, 48, 48),
    "aligned": (104, 40, 72),
    "odd": (101, 101, 50),
    "few": (25, 64, 64),
    "skinny": (32, 64, 10),
    "ones": (16, 1, 24),
}
FAST_SHAPES = ("even", "even, affine")
"""The shapes for which the ordinary tests compile every tile of sm_90; the others need --slow."""


def shape_names() -> list[str]:
    """Return the names of the shapes of `cases`."""
    return [*_SIZES, "even, affine", "odd, affine", "few, affine", "even, points", "even, strided"]


def cases(arch: str, dtype: torch.dtype, allow_tf32: bool, shape: str) -> Iterator[Case]:
    """Yield every kernel with every tile of an arch, for one shape. Tensors are on the meta device."""
    sizes, _, variant = shape.partition(", ")
    R, I, O = _SIZES[sizes]
    B, N = 1 if sizes == "ones" else 4800, 3 if variant == "points" else 1
    bits = dtype.itemsize * 8
    precision = precision_of(dtype, arch, allow_tf32)

    def new(*sizes: int) -> Tensor:
        if variant == "strided":  # no axis is contiguous: every load is by pointers
            return torch.empty(*sizes, 2, dtype=dtype, device="meta")[..., 1]
        return torch.empty(sizes, dtype=dtype, device="meta")

    W = R if in_place(new(O, I, R), arch) else padded(R)
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
    text = f"{arch} {str(dtype).removeprefix('torch.')} {precision} {shape}"
    for role, (u, v, head, a, c, d, P) in folds.items():
        out = torch.empty(B * N, P, dtype=dtype, device="meta")
        for tile in fold_tiles(v, head, P, arch):
            call = fold_call(u, v, head, a, c, d, out, u.shape[2], tile, arch, precision)
            yield Case(f"{text} fold {role} {tuple(tile)}", call, generated)
    dx, dz = (torch.empty(B * N, n, dtype=dtype, device="meta") for n in (I, R))
    for tile in dx_dz_tiles(z, h, R, O, arch):
        call = dx_dz_call(x, z, h, base, bias, g, dx, dz, I, tile, arch, precision)
        yield Case(f"{text} dx_dz {tuple(tile)}", call, "stored")
    for splits in (1, 2):
        out_sizes = (O, I, R) if splits == 1 else (splits, O, I, R)
        out = torch.empty(out_sizes, dtype=dtype if splits == 1 else torch.float32, device="meta")
        for tile in weight_grad_tiles(z, g, arch):
            call = weight_grad_call(x, z, g, out, cdiv(cdiv(B * N, splits), 64) * 64, tile, arch, precision)
            yield Case(f"{text} weight_grad{'' if splits == 1 else ', split'} {tuple(tile)}", call, generated)

    if shape == "odd":
        yield Case(f"{text} pad", pad_call(new(B, R), new(O, I, R), z, h), "")
    points = torch.empty(16, 300, R, dtype=torch.float32, device="meta")
    yield Case(f"{text} reduce_points", reduce_points_call(points, new(16, 4, R)), "")
    partial = torch.empty(4, O, I, R, dtype=torch.float32, device="meta")
    yield Case(f"{text} reduce", reduce_call(partial, new(O, I, R)), "")


def term_cases(arch: str, dtype: torch.dtype, allow_tf32: bool, sizes: tuple[int, int] = (64, 128)) -> Iterator[Case]:
    """Yield the kernels over terms, as `aggregate` calls them: for pieces with many terms, with some and with one."""
    Q, C = sizes
    product = "stored" if min(sizes) > 32 else ""  # wgmma takes 64 rows; smaller products take older instructions
    work = torch.float32 if dtype == torch.float16 else dtype

    def new(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    u, v, tile = new(3000, Q), new(4800, C), new(512, Q, C, dtype=work)
    index, ptr = new(4800, dtype=torch.int64), new(513, dtype=torch.int64)
    text = f"{arch} {str(dtype).removeprefix('torch.')} {precision_of(dtype, arch, allow_tf32)} {Q}×{C}"
    for mean in (20.0, 4.0):
        call = outer_sum_call(u, v, tile, ptr, index, index, 0, 1, mean, arch, allow_tf32)
        yield Case(f"{text} outer_sum, {mean} terms", call, product if mean > 8 else "")
    for role, m, f, width in (("u", tile, v, Q), ("v", tile.mT, u, C)):
        to = new(3000, width, dtype=work)
        for most, mean in ((64, 20.0), (16, 9.0), (1, 1.0)):
            call = row_products_call(m, f, to, ptr, index, None, 0, 0, 1, most, mean, False, arch, allow_tf32)
            yield Case(f"{text} row_products {role}, {mean} terms", call, product if mean > 2 else "")
    u_points, v_points = new(1000, 3, Q), new(1600, 3, C)  # as `generate` calls them
    call = outer_sum_call(u_points, v_points, tile, ptr, index, None, 0, 3, 20.0, arch, allow_tf32)
    yield Case(f"{text} outer_sum, points", call, product)
    to = new(1000, 3, Q, dtype=work)
    call = row_products_call(tile, v_points, to, ptr, None, index, 0, 0, 3, 64, 20.0, True, arch, allow_tf32)
    yield Case(f"{text} row_products, points", call, product)
    total, some, all_terms = new(3000, Q, dtype=torch.float32), range(1000), range(4800)
    call = sum_terms_call(total, new(4800, Q, dtype=work), ptr, index, index, some, all_terms, 0)
    yield Case(f"{text} sum_terms", call, "")


PRECISIONS = ((torch.bfloat16, False), (torch.float16, False), (torch.float32, False), (torch.float32, True))
"""Dtypes, and whether float32 may be rounded to TF32."""


def main() -> None:
    """Print the resource usage of every kernel and tile, for all archs or for those in the arguments."""
    for arch in sys.argv[1:] or ARCHS:
        for dtype, allow_tf32 in PRECISIONS:
            if allow_tf32 and arch.startswith("gfx"):
                continue
            every = [cases(arch, dtype, allow_tf32, shape) for shape in shape_names()]
            for some in (*every, term_cases(arch, dtype, allow_tf32)):
                for name, call, operand in some:
                    used = resource_usage(call, arch)
                    faults = "; ".join(used.faults(arch, operand)) or "clean"
                    numbers = f"{used.registers:4d} registers {used.spilled:5d} spilled"
                    numbers += f" {used.shared_memory / 1024:6.1f} KiB {used.matrix_instructions:4d} products"
                    print(f"{name:<84}{numbers}  {faults}", flush=True)


if __name__ == "__main__":
    main()
