"""Resource usage of the kernels of csrc/cuda: registers, spills, stack and instructions, by ptxas and the disassembly.

This needs nvcc, but no GPU: each file is compiled for one arch after another.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from torch.utils.cpp_extension import include_paths

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
ARCHS = ("sm_80", "sm_90a", "sm_100")
FLAGS = ("-O3", "-std=c++20", "--expt-relaxed-constexpr", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000")
REGISTERS_PER_SM = 1 << 16  # on every arch
WARNING = re.compile(r"\bC75(?:08|1[0-5])\b|Performance Loss|setmaxnreg.* ignored|warning")
"""ptxas ignores setmaxnreg, or serialises wgmma for any of several reasons, or gives another warning."""
INSTRUCTIONS = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS", "LDL", "STL")


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
    """

    name: str
    symbol: str
    registers: int
    threads: int
    stack: int
    spilled: int
    shared: int
    instructions: tuple[str, ...]

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
        return ResourceUsage(tuple(Kernel(*k[:-1], tuple(k[-1])) for k in kernels), tuple(warnings))
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
    instructions = dict(zip(bodies[::2], map(_instructions, bodies[1::2]), strict=True))
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
                instructions[symbol],
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
    names = set(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", body))
    return tuple(name for name in INSTRUCTIONS if name in names)


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
