"""Compile the kernels of csrc for the installed torch; `fasthyper build` and setup.py share it.

setup.py reads this file by its path, also where there is no torch. So the module imports nothing of fasthyper, and
torch only inside of functions.

TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX and CUDA_HOME are read as for torch's own extensions.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

CSRC = Path(__file__).parent / "csrc"
RECORD = "build.json"
# One library for each instruction set. fasthyper loads the one for the instruction set that torch uses.
CPU = {
    "default": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
SANITIZE = os.environ.get("FASTHYPER_SANITIZE", "")
if SANITIZE:  # one library for each vector width instead, with plain products: every processor runs all of them
    CPU = {"width4": [], "width8": [], "width16": []}
SANITIZER = ["-g1", "-O1", "-fno-omit-frame-pointer", f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"]
# These checks double the compile time, and AddressSanitizer stops at the accesses that they would report.
SANITIZER += ["-fno-sanitize=null,alignment,vptr,object-size"]
NAMES = (*(f"cpu_{name}" for name in CPU), "eager", "cuda_emulated", "cuda")
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
# nvcc is looked for in the CUDA that the environment names, then on PATH, then in CUDA's default folder.
CUDA_HOMES = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
NVCC_FOLDERS = [*(f"{home}/bin" for home in CUDA_HOMES), os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
NVCC = shutil.which("nvcc", path=os.pathsep.join(NVCC_FOLDERS))
ARCHS = "8.0 9.0a 10.0"  # one for each generation of GPUs; PTX of the last also runs on later generations

Report = Callable[[int, int, str], None]
"""What `build` calls before the first step and after each: steps done, all steps, and the name of the last one."""


def sources() -> list[Path]:
    """Return the files of csrc that a compiler reads, in order; an editor may have left others beside them."""
    return sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu") and path.name[0] != ".")


@functools.cache
def digest() -> str:
    """Return a digest of the sources of the libraries, so that no library of other sources is loaded."""
    found = hashlib.sha256(Path(__file__).read_bytes())
    for path in sources():
        found.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def unsupported(name: str) -> str | None:
    """Return why a library cannot exist on this kind of machine, or None."""
    if sys.platform != "linux":
        return f"the compiled kernels are for Linux only, and this is {sys.platform}"
    if not name.startswith("cuda") and platform.machine() not in ("x86_64", "AMD64"):
        return f"the CPU kernels are for x86-64 only, and this is {platform.machine()}"
    return None


def why_nothing() -> str | None:
    """Return why no library can be built here, or None."""
    if why := unsupported("cuda"):
        return why
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return f"the build found no torch ({error}); run `fasthyper build`"
    if not shutil.which(COMPILER[0]):
        return (
            f"there is no C++ compiler {COMPILER[0]}; install one that knows C++20, such as g++ 11 (apt install g++, "
            "dnf install gcc-c++, conda install gxx), or name one in CXX, then run `fasthyper build`"
        )
    return None


def why_not(name: str) -> str | None:
    """Return why a library cannot be built here, or None."""
    import torch

    if name == "cuda":
        if SANITIZE:
            return "FASTHYPER_SANITIZE builds CPU kernels only"
        if torch.version.hip:
            return "the CUDA kernels are for NVIDIA GPUs, and this torch is built for ROCm"
        return None if NVCC else "the build found no nvcc; install the CUDA toolkit or set CUDA_HOME, then build again"
    return unsupported(name)


class Library(NamedTuple):
    """A library: its files, and the commands that compile a file and link all of them, without their paths."""

    name: str
    files: list[Path]
    compile: list[str]
    link: list[str]


def library(name: str, archs: str = "") -> Library:
    """Return the library of this name; `archs` are GPU architectures in the form of TORCH_CUDA_ARCH_LIST."""
    import torch

    root = Path(torch.__file__).parent
    torch_headers = [root / "include", root / "include/torch/csrc/api/include"]
    include = [flag for path in torch_headers for flag in ("-isystem", str(path))]
    if name in ("cuda", "cuda_emulated"):
        files = sorted((CSRC / "cuda").glob("*.cu"))
        compile_, link = _nvcc(len(files), archs) if name == "cuda" else _emulator()
        # Of torch, these kernels use only the stable ABI of 2.11.
        compile_ += ["-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    else:
        files = [CSRC / ("eager.cpp" if name == "eager" else f"cpu/{name.removeprefix('cpu_')}.cpp")]
        compile_, link = _cpp(CPU.get(name.removeprefix("cpu_"), []))
    return Library(name, files, [*compile_, *include], [*link, f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"])


def _cpp(flags: list[str]) -> tuple[list[str], list[str]]:
    """Return the commands for a CPU library."""
    import torch

    # The kernels move pairs of 16-bit numbers as floats, which strict aliasing forbids. Loops that copy a few numbers
    # must stay loops: a call of memcpy or memset takes longer.
    compile_ = [*COMPILER, "-std=c++20", "-O3", "-g0", "-fPIC", "-DNDEBUG", "-fwrapv", "-fopenmp"]
    compile_ += ["-fvisibility=hidden", "-Wall", "-Wno-psabi", *flags]
    compile_ += ["-fno-strict-aliasing", "-fno-tree-loop-distribute-patterns"]
    compile_ += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    link = [*COMPILER, "-shared", "-fopenmp", "-Wl,--no-as-needed"]
    if SANITIZE:
        return [*compile_, *SANITIZER], [*link, f"-fsanitize={SANITIZE}"]
    return compile_, [*link, "-Wl,--no-undefined"]  # a symbol that torch lacks fails the build, not the import


def _nvcc(files: int, archs: str) -> tuple[list[str], list[str]]:
    """Return the commands for the CUDA library.

    Symbols that only a torch for CUDA has are resolved on loading; so the library can be built with any torch.
    """
    assert NVCC is not None
    host = "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-psabi,-Wno-unknown-pragmas"
    threads = -(-jobs() // max(1, files))  # spare cores compile a file for several architectures at once
    flags = ["-O3", "-lineinfo", "--expt-relaxed-constexpr", "-DUSE_CUDA", f"--threads={threads}", host]
    # CUDA 12.8 brought both compute_100 and this flag, which shrinks the library to a seventh.
    flags += ["--compress-mode=size"] if "compute_100" in known_archs() else []
    return [NVCC, *flags, *arch_flags(archs)], [NVCC, "-shared", "-cudart=static", "-Xlinker=--no-as-needed"]


def _emulator() -> tuple[list[str], list[str]]:
    """Return the commands for the CUDA kernels on a CPU that emulates a GPU, which the tests run."""
    flags = ["-O2", "-g0", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
    flags += ["-Wno-unknown-pragmas"]  # "#pragma unroll"
    link = [*COMPILER, "-shared", "-pthread", "-Wl,--no-as-needed"]
    if SANITIZE:
        flags, link = [*flags, *SANITIZER], [*link, f"-fsanitize={SANITIZE}"]
    else:
        link = [*link, "-Wl,--no-undefined"]
    return [*COMPILER, *flags, "-DFASTHYPER_EMULATED", "-x", "c++"], link


def jobs() -> int:
    """Return the number of files to compile at once."""
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


def known_archs() -> list[str]:
    """Return the GPU architectures that nvcc knows, such as compute_90."""
    assert NVCC is not None
    return subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()


def arch_flags(given: str = "") -> list[str]:
    """Return nvcc's flags for the architectures in TORCH_CUDA_ARCH_LIST, "8.0 9.0a;10.0+PTX", or given, or of ARCHS."""
    archs = re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", os.environ.get("TORCH_CUDA_ARCH_LIST") or given)
    if not archs:
        archs = re.findall(r"(\d+)\.(\d)(a?)()", ARCHS)
        archs = [arch for arch in archs if f"compute_{arch[0]}{arch[1]}" in known_archs()]
        archs[-1] = (*archs[-1][:3], "+PTX")
    flags = []
    for major, minor, letter, ptx in archs:
        if int(major) < 8:
            continue  # the lists of containers have older ones, which lack bfloat16 and asynchronous copies
        arch = f"{major}{minor}{'a' if (major, minor) == ('9', '0') else letter}"  # wgmma needs 9.0a
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if ptx:  # without the letter: PTX of 9.0a runs on no later GPU
            flags.append(f"-gencode=arch=compute_{major}{minor},code=compute_{major}{minor}")
    if not flags:
        raise RuntimeError("TORCH_CUDA_ARCH_LIST names no architecture from 8.0 on")
    return flags


def build(
    names: Iterable[str],
    folder: Path,
    objects: Path,
    *,
    archs: str = "",
    report: Report = lambda done, steps, name: None,
) -> dict[str, str]:
    """Compile libraries into a folder; return, for each that failed, the first error.

    Objects that are newer than all that they were made from are kept. A library appears in the folder as a whole, or
    not at all.

    Args:
        names: of `NAMES`.
        folder: of the libraries.
        objects: the folder of the objects.
        archs: the GPU architectures, in the form of TORCH_CUDA_ARCH_LIST, where that has none.
        report: is called before the first step and after each.
    """
    failed: dict[str, str] = {}
    libraries = []
    for name in names:
        try:
            libraries.append(library(name, archs))
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # of nvcc
            failed[name] = _in_one_line(error)
    left = {made.name: len(made.files) for made in libraries}
    steps, done = sum(left.values()) + len(left), 0
    report(done, steps, "")
    with ThreadPoolExecutor(jobs()) as pool:
        pending = {
            pool.submit(_compile, made, file, objects, failed): made for made in libraries for file in made.files
        }
        try:
            for compiled in as_completed(pending):
                made = pending[compiled]
                left[made.name] -= 1
                try:
                    compiled.result()
                    if not left[made.name] and made.name not in failed:
                        _link(made, objects, folder)
                except (OSError, RuntimeError) as error:
                    failed.setdefault(made.name, _in_one_line(error))
                done += 1 if left[made.name] else 2
                report(done, steps, made.name)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def _in_one_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__


def _compile(made: Library, file: Path, objects: Path, failed: dict[str, str]) -> None:
    """Compile a file of a library, unless another one has failed or nothing has changed."""
    to = objects / made.name / f"{file.stem}.o"
    if made.name in failed:
        return
    command = [*made.compile, "-MD", "-MF", str(to.with_suffix(".d")), "-c", str(file), "-o", str(to)]
    if _is_current(to, command):
        return
    to.parent.mkdir(parents=True, exist_ok=True)
    to.with_suffix(".cmd").unlink(missing_ok=True)
    _run(command)
    to.with_suffix(".cmd").write_text(shlex.join(command))  # after the object: without it, the object is made again


def _is_current(made: Path, command: list[str]) -> bool:
    """Return whether an object was made by this command from files that have not changed since."""
    try:
        if made.with_suffix(".cmd").read_text() != shlex.join(command):
            return False
        _, _, sources = made.with_suffix(".d").read_text().replace("\\\n", " ").partition(": ")
        paths = re.findall(r"(?:\\.|\S)+", sources)
        time = made.stat().st_mtime_ns
        return all(os.stat(path.replace("\\ ", " ")).st_mtime_ns <= time for path in paths)
    except OSError:  # one of them does not exist
        return False


def _link(made: Library, objects: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{made.name}.{os.getpid()}.so"
    paths = [str(objects / made.name / f"{file.stem}.o") for file in made.files]
    at = made.link.index("-shared") + 1
    try:
        _run([*made.link[:at], *paths, "-o", str(part), *made.link[at:]])
        part.chmod(0o755)  # whatever the umask: a library that others may write to is not loaded
        part.replace(folder / f"{made.name}.so")
    finally:
        part.unlink(missing_ok=True)


def _run(command: list[str]) -> None:
    """Run a command. Print its output if it fails or warns; if it fails, raise the first error in the output."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode or "warning" in result.stdout:
        print(result.stdout, file=sys.stderr)
    if result.returncode:
        errors = re.findall(r".*(?:(?:error|fatal) *:|undefined reference).*", result.stdout)
        raise RuntimeError(errors[0].strip() if errors else f"{command[0]} failed")


def record(torch: str, missing: dict[str, str]) -> dict[str, Any]:
    """Return the record of a build for a version of torch, with the reasons for the libraries that it lacks."""
    return {"torch": torch, "sources": digest(), "missing": missing}


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record of a build, which `compiled.read_record` reads, in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{RECORD}.{os.getpid()}"
    part.write_text(json.dumps(record) + "\n")
    part.replace(folder / RECORD)
