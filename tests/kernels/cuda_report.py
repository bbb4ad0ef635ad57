"""What nvcc makes of csrc/cuda for parts that need not be here: ptxas's report of each kernel, and its instructions."""

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
PARTS = ("sm_80", "sm_90a", "sm_100")
FLAGS = ("-O3", "-std=c++20", "--expt-relaxed-constexpr", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000")
REGISTERS = 1 << 16  # of a multiprocessor, on every part
TOLD = re.compile(r"\bC75(?:08|1[0-5])\b|Performance Loss|setmaxnreg.* ignored|warning")
"""setmaxnreg ignored, wgmma serialised for one reason or another, and whatever else ptxas warns of."""
INSTRUCTIONS = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS", "LDL", "STL")


def _tool(name: str, *more: str) -> str | None:
    """A tool of CUDA's: on PATH, where CUDA is, or in another package that has one."""
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
    """Why nothing can be compiled and read here, or None."""
    for name, tool in (("nvcc", NVCC), ("cuobjdump", CUOBJDUMP)):
        if tool is None:
            return f"{name} is not installed"
    return None


class Kernel(NamedTuple):
    """What came out for one kernel.

    Args:
        name: its own, without namespace and template arguments.
        symbol: all of it.
        registers: of a thread.
        threads: of a block, as its launch bound says; 0 without one.
        stack: bytes of a thread.
        spilled: bytes that ptxas counts, of stores and loads.
        shared: bytes that are static.
        instructions: those of INSTRUCTIONS that it has.
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
        found = []
        has = set(self.instructions)
        # For sm_100, ptxas may count a few bytes of which nothing is left in the code.
        if self.spilled and has & {"LDL", "STL"}:
            found.append(f"spills {self.spilled} bytes")
        if self.stack:
            found.append(f"has {self.stack} bytes of stack")
        if not self.threads:
            found.append("has no launch bound")
        if self.registers * self.threads > REGISTERS:
            found.append(f"takes {self.registers} registers for each of {self.threads} threads")
        if "hopper" in self.name:
            found += [] if "HGMMA" in has else ["has no HGMMA"]
        elif re.search("fold|grads|primary", self.name) and "HMMA" not in has:
            found.append("has no HMMA")
        return found


class Report(NamedTuple):
    """The kernels of a file, and what ptxas warned of."""

    kernels: tuple[Kernel, ...]
    told: tuple[str, ...]

    def faults(self, part: str) -> list[str]:
        """All that is wrong; kernels for Hopper are empty for other parts."""
        kernels = [k for k in self.kernels if part == "sm_90a" or "hopper" not in k.name]
        return [*self.told, *(f"{demangled(k.symbol)} {fault}" for k in kernels for fault in k.faults())]


def report(source: Path, part: str, cache: Path, *flags: str) -> Report:
    """Compile a file for a part and read what came out; what was read before is kept in a folder, by content."""
    headers = [path for path in sorted(source.parent.glob("*.h")) if not path.stem.endswith("emulated")]
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256(repr((part, flags, FLAGS, include_paths(), version)).encode())
    for path in (source, *headers, Path(__file__)):
        key.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    kept = cache / f"{source.stem}-{part}-{key.hexdigest()[:24]}.json"
    if kept.exists():
        kernels, told = json.loads(kept.read_text())
        return Report(tuple(Kernel(*k[:-1], tuple(k[-1])) for k in kernels), tuple(told))
    made = _compiled(source, part, flags)
    for old in cache.glob(f"{source.stem}-{part}-*.json"):
        old.unlink()
    kept.write_text(json.dumps(made))
    return made


def _compiled(source: Path, part: str, flags: tuple[str, ...]) -> Report:
    includes = [flag for path in include_paths() for flag in ("-isystem", path)]
    with tempfile.TemporaryDirectory() as scratch:
        cubin = Path(scratch) / "kernels.cubin"
        command = [NVCC, *FLAGS, *flags, *includes, f"-arch={part}", "-Xptxas=-v", "-keep", f"-keep-dir={scratch}"]
        done = subprocess.run(
            [*command, "-cubin", str(source), "-o", str(cubin)], capture_output=True, text=True, check=False
        )
        log = done.stdout + done.stderr
        if done.returncode:
            raise RuntimeError(f"nvcc failed on {source.name} for {part}: {log[-2000:]}")
        ptx = (Path(scratch) / f"{source.stem}.ptx").read_text()
        code = subprocess.run([CUOBJDUMP, "--dump-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    return read(log, ptx, code)


def read(log: str, ptx: str, code: str) -> Report:
    """The report from ptxas's log, the PTX and the disassembly."""
    bounds = re.findall(r"\.entry (\w+)\([^)]*\)\s*((?:\.\w+ [\d, ]+\s*)*)", ptx)
    threads = {symbol: _product(re.search(r"\.(?:maxntid|reqntid) ([\d, ]+)", text)) for symbol, text in bounds}
    bodies = re.split(r"^\s*Function : (\S+)$", code, flags=re.MULTILINE)[1:]
    instructions = dict(zip(bodies[::2], map(_instructions, bodies[1::2]), strict=True))
    kernels = []
    texts = re.split(r"Compiling entry function '(\S+)'", log)[1:]
    for symbol, text in zip(texts[::2], texts[1::2], strict=True):
        kernels.append(
            Kernel(
                own_name(symbol),
                symbol,
                _sum(r"Used (\d+) registers", text),
                threads[symbol],
                _sum(r"(\d+) bytes (?:cumulative )?stack", text),
                _sum(r"(\d+) bytes spill", text),
                _sum(r"(\d+) bytes smem", text),
                instructions[symbol],
            )
        )
    return Report(tuple(kernels), tuple(line.strip() for line in log.splitlines() if TOLD.search(line)))


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


def own_name(symbol: str) -> str:
    """The last name of a mangled one, before template arguments and parameters."""
    name, rest = symbol, re.sub("^_ZN?", "", symbol)
    while symbol.startswith("_Z") and (found := re.match(r"L?(\d+)", rest)):
        name, rest = rest[found.end() :][: int(found[1])], rest[found.end() + int(found[1]) :]
    return name


def demangled(symbol: str) -> str:
    """With template arguments, without parameters; as it is where there is nothing to read it with."""
    tool = shutil.which("c++filt")
    text = subprocess.run([tool, symbol], capture_output=True, text=True, check=True).stdout if tool else symbol
    return re.sub(r"^void |\(.*\)$", "", text.strip())
