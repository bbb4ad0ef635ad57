"""Resource usage of the kernels of csrc/cuda: registers, spills, stack and instructions, by ptxas and the disassembly.

This needs nvcc, but no GPU: each file is compiled for one arch after another. `python tests/kernels/resource_usage.py`
prints a table, with the numbers of instructions in the loop of matrix products.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from torch.utils.cpp_extension import include_paths

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
ARCHS = ("sm_80", "sm_90a", "sm_100")
FLAGS = ("-O3", "-std=c++20", "--expt-relaxed-constexpr", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000")
REGISTERS_PER_SM = 1 << 16  # on every arch
WARNING = re.compile(r"\bC75(?:08|1[0-5])\b|Performance Loss|setmaxnreg.* ignored|warning")
"""ptxas ignores setmaxnreg, or serialises wgmma for any of several reasons, or gives another warning."""
INSTRUCTIONS = ("HGMMA", "HMMA", "UTMALDG", "MULTICAST", "LDGSTS", "LDL", "STL")


def _tool(name: str, *more: str) -> str | None:
    """Return the path of a CUDA tool from PATH, the CUDA installation or more folders; None if there is none."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home), *more]
    return shutil.which(name, path=os.pathsep.join(places))


def _triton() -> list[str]:
    try:
        import triton
    except ImportError:
        return []
    return [str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin")]


NVCC, CUOBJDUMP = _tool("nvcc"), _tool("cuobjdump", *_triton())


def missing() -> str | None:
    """Return which tool is missing, or None."""
    for name, tool in (("nvcc", NVCC), ("cuobjdump", CUOBJDUMP)):
        if tool is None:
            return f"{name} is not installed"
    return None


class Loop(NamedTuple):
    """The numbers of instructions in a loop: all, and those of some kinds.

    Args:
        all: all instructions.
        products: matrix products.
        waits: waits for matrix products or asynchronous copies.
        mbarriers: waits for mbarriers and arrivals at them.
        barriers: barriers of a block.
        fences: fences of memory.
        loads: loads from shared memory.
        cold: loads from global memory, without asynchronous copies.
    """

    all: int = 0
    products: int = 0
    waits: int = 0
    mbarriers: int = 0
    barriers: int = 0
    fences: int = 0
    loads: int = 0
    cold: int = 0


KINDS = {
    "products": ("HGMMA", "HMMA"),
    "waits": ("WARPGROUP.DEPBAR", "DEPBAR"),
    "mbarriers": ("SYNCS",),
    "barriers": ("BAR", "UCGABAR"),
    "fences": ("MEMBAR", "ERRBAR"),
    "loads": ("LDS", "LDSM"),
    "cold": ("LDG",),
}


class Kernel(NamedTuple):
    """The resource usage of one kernel.

    Args:
        name: the name, without namespace and template arguments.
        symbol: the mangled name.
        registers: per thread.
        threads: per CTA, from the launch bound; 0 without one.
        stack: bytes per thread.
        spilled: bytes of spill stores and loads that ptxas counts.
        shared: bytes of static shared memory.
        instructions: those of INSTRUCTIONS that occur.
        loop: the numbers of instructions in the loop with the largest share of matrix products.
    """

    name: str
    symbol: str
    registers: int
    threads: int
    stack: int
    spilled: int
    shared: int
    instructions: tuple[str, ...]
    loop: Loop = Loop()

    def faults(self) -> list[str]:
        """Return the faults of the kernel."""
        found = []
        has = set(self.instructions)
        # For sm_100, ptxas may count a few bytes of spills that the final code does not have.
        if self.spilled and has & {"LDL", "STL"}:
            found.append(f"spills {self.spilled} bytes")
        if self.stack:
            found.append(f"has {self.stack} bytes of stack")
        if not self.threads:
            found.append("has no launch bound")
        if self.registers * self.threads > REGISTERS_PER_SM:
            found.append(f"takes {self.registers} registers for each of {self.threads} threads")
        if "hopper" in self.name:
            found += [] if "HGMMA" in has else ["has no HGMMA"]
            found += ["has a fence of memory in its loop"] if self.loop.fences else []
            if self.name in ("hopper_dx_dz", "hopper_weight_grad") and "MULTICAST" not in has:
                found.append("shares no operands in clusters")
        elif re.search("fold|grads|primary", self.name) and "HMMA" not in has:
            found.append("has no HMMA")
        return found


class ResourceUsage(NamedTuple):
    """The kernels of a file, and the warnings of ptxas."""

    kernels: tuple[Kernel, ...]
    warnings: tuple[str, ...]

    def faults(self, arch: str) -> list[str]:
        """Return all warnings and faults. Kernels for Hopper are empty for another arch, and are not checked."""
        kernels = [k for k in self.kernels if arch == "sm_90a" or "hopper" not in k.name]
        return [*self.warnings, *(f"{demangled(k.symbol)} {fault}" for k in kernels for fault in k.faults())]


def resource_usage(source: Path, arch: str, cache: Path, *flags: str) -> ResourceUsage:
    """Compile a file for an arch and return its resource usage, cached in a folder by the content of the sources."""
    headers = [path for path in sorted(source.parent.glob("*.h")) if not path.stem.endswith("emulated")]
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256(repr((arch, flags, FLAGS, include_paths(), version)).encode())
    for path in (source, *headers, Path(__file__)):
        key.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    cached = cache / f"{source.stem}-{arch}-{key.hexdigest()[:24]}.json"
    if cached.exists():
        kernels, warnings = json.loads(cached.read_text())
        kernels = (Kernel(*k[:-2], tuple(k[-2]), Loop(*k[-1])) for k in kernels)
        return ResourceUsage(tuple(kernels), tuple(warnings))
    usage = _compile(source, arch, flags)
    for old in cache.glob(f"{source.stem}-{arch}-*.json"):
        old.unlink()
    cached.write_text(json.dumps(usage))
    return usage


def _compile(source: Path, arch: str, flags: tuple[str, ...]) -> ResourceUsage:
    includes = [flag for path in include_paths() for flag in ("-isystem", path)]
    with tempfile.TemporaryDirectory() as scratch:
        cubin = Path(scratch) / "kernels.cubin"
        command = [NVCC, *FLAGS, *flags, *includes, f"-arch={arch}", "-Xptxas=-v", "-keep", f"-keep-dir={scratch}"]
        done = subprocess.run(
            [*command, "-cubin", str(source), "-o", str(cubin)], capture_output=True, text=True, check=False
        )
        log = done.stdout + done.stderr
        if done.returncode:
            raise RuntimeError(f"nvcc failed on {source.name} for {arch}: {log[-2000:]}")
        ptx = (Path(scratch) / f"{source.stem}.ptx").read_text()
        code = subprocess.run([CUOBJDUMP, "--dump-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    return parse(log, ptx, code)


def parse(log: str, ptx: str, code: str) -> ResourceUsage:
    """Return the resource usage from ptxas's log, the PTX and the disassembly."""
    bounds = re.findall(r"\.entry (\w+)\([^)]*\)\s*((?:\.\w+ [\d, ]+\s*)*)", ptx)
    threads = {symbol: _product(re.search(r"\.(?:maxntid|reqntid) ([\d, ]+)", text)) for symbol, text in bounds}
    bodies = re.split(r"^\s*Function : (\S+)$", code, flags=re.MULTILINE)[1:]
    codes = dict(zip(bodies[::2], bodies[1::2], strict=True))
    kernels = []
    texts = re.split(r"Compiling entry function '(\S+)'", log)[1:]
    for symbol, text in zip(texts[::2], texts[1::2], strict=True):
        kernels.append(
            Kernel(
                short_name(symbol),
                symbol,
                _sum(r"Used (\d+) registers", text),
                threads[symbol],
                _sum(r"(\d+) bytes (?:cumulative )?stack", text),
                _sum(r"(\d+) bytes spill", text),
                _sum(r"(\d+) bytes smem", text),
                _instructions(codes[symbol]),
                hot_loop(codes[symbol]),
            )
        )
    return ResourceUsage(tuple(kernels), tuple(line.strip() for line in log.splitlines() if WARNING.search(line)))


def _sum(pattern: str, text: str) -> int:
    return sum(int(n) for n in re.findall(pattern, text))


def _product(found: re.Match[str] | None) -> int:
    product = 1 if found else 0
    for n in found[1].split(",") if found else ():
        product *= int(n)
    return product


def _instructions(body: str) -> tuple[str, ...]:
    names = {part for _, name, _ in _listing(body) for part in name.split(".")}
    return tuple(name for name in INSTRUCTIONS if name in names)


def _listing(body: str) -> list[tuple[int, str, str]]:
    """Return the address, the name and the operands of each instruction."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);", body)
    return [(int(address, 16), name, operands) for address, name, operands in lines]


def hot_loop(body: str) -> Loop:
    """Return the loop with the largest share of products: a branch back, and the instructions from its target."""
    listing = _listing(body)
    loops = [Loop()]
    for address, name, operands in listing:
        target = re.search(r"0x([0-9a-f]+)\s*$", operands)
        if name.split(".")[0] == "BRA" and target and int(target[1], 16) <= address:
            names = Counter(n for at, n, _ in listing if int(target[1], 16) <= at <= address)
            loops.append(Loop(names.total(), **{kind: _count(names, starts) for kind, starts in KINDS.items()}))
    hot = max(loops, key=lambda loop: loop.products / max(1, loop.all))
    return hot if hot.products else Loop()


def _count(names: Counter[str], starts: tuple[str, ...]) -> int:
    return sum(n for name, n in names.items() if any(name == s or name.startswith(f"{s}.") for s in starts))


def short_name(symbol: str) -> str:
    """Return the last name of a mangled symbol, before template arguments and parameters."""
    name, tail = symbol, re.sub("^_ZN?", "", symbol)
    while symbol.startswith("_Z") and (found := re.match(r"L?(\d+)", tail)):
        name, tail = tail[found.end() :][: int(found[1])], tail[found.end() + int(found[1]) :]
    return name


def demangled(symbol: str) -> str:
    """Return the name with template arguments, without parameters; the symbol itself if c++filt is missing."""
    tool = shutil.which("c++filt")
    text = subprocess.run([tool, symbol], capture_output=True, text=True, check=True).stdout if tool else symbol
    return re.sub(r"^void |\(.*\)$", "", text.strip())


def main() -> None:
    """Print the resource usage of every kernel, for all archs or for those in the arguments."""
    if why := missing():
        sys.exit(why)
    with tempfile.TemporaryDirectory() as cache:
        for arch in sys.argv[1:] or ARCHS:
            for source in sorted(SOURCES.glob("*.cu")):
                if source.stem.endswith("library"):
                    continue
                usage = resource_usage(source, arch, Path(cache))
                for kernel in usage.kernels:
                    if "hopper" in kernel.name and arch != "sm_90a":
                        continue
                    loop = " ".join(f"{n} {kind}" for kind, n in kernel.loop._asdict().items() if n)
                    numbers = f"{kernel.registers:4d} registers {kernel.spilled:5d} spilled"
                    faults = "; ".join([*usage.warnings, *kernel.faults()]) or "clean"
                    print(f"{arch} {demangled(kernel.symbol):<68}{numbers}  {loop}  {faults}", flush=True)


if __name__ == "__main__":
    main()
