"""Build of the compiled kernels, where that can be; everything else about the package is in pyproject.toml.

FASTHYPER_BUILD=0 leaves them out, =1 insists on them, =later leaves them and the record of them as they are, for a
`setup.py build_ext --inplace` to make. Left to itself, the build makes what it can: all of them need
torch to be seen, those for CPUs a C++ compiler, those for CUDA nvcc but no GPU. What it cannot make costs nothing
else; why not, it says in the console and to `fasthyper info`.

FASTHYPER_ONLY names the libraries to build, as "cuda" or "cpu_avx2,eager"; `here` stands for those that this machine's
CPU takes. TORCH_CUDA_ARCH_LIST and MAX_JOBS are understood as torch does.
FASTHYPER_BUILD_EMULATOR=1 adds cuda_emulated: the CUDA kernels for a CPU that emulates a GPU, which the tests run.
"""

import copy
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
FOLDER = "fasthyper/_compiled"  # the libraries, and a record: the torch they were built for, or why there are none
# One library for each instruction set; the one that torch itself takes on a machine is loaded there.
CPU = {
    "default": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
SANITIZE = os.environ.get("FASTHYPER_SANITIZE", "")  # "address,undefined"
if SANITIZE:  # one for each width of a vector instead, with plain products: any processor runs all of them
    CPU = {"width4": [], "width8": [], "width16": []}
SANITIZER = ["-g1", "-O1", "-fno-omit-frame-pointer", f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"]
# These take as long to compile as all else, and what they would find, AddressSanitizer sees where it is touched.
SANITIZER += ["-fno-sanitize=null,alignment,vptr,object-size"]
INSISTED = os.environ.get("FASTHYPER_BUILD") == "1"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
# nvcc, where these say that CUDA is, on PATH, or where CUDA is by default.
HOMES = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
PLACES = [*(f"{home}/bin" for home in HOMES), os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
NVCC = shutil.which("nvcc", path=os.pathsep.join(PLACES))
CAPABILITIES = ("8.0", "9.0a", "10.0")  # each for the parts of its generation, and PTX of the last for those to come


def obstacle():
    """Return why nothing can be built here, or None."""
    if os.environ.get("FASTHYPER_BUILD") == "0":
        return "FASTHYPER_BUILD=0 forbade it"
    if sys.platform != "linux":
        return f"there are kernels for Linux alone, not for {sys.platform}"
    try:
        import torch  # noqa: F401
        from torch.utils import cpp_extension  # noqa: F401
    except ImportError as error:
        return f"the build could not see torch ({error}); pip install --no-build-isolation lets it"
    return None if shutil.which(COMPILER[0]) else f"there is no C++ compiler {COMPILER[0]}"


def obstacle_to(name):
    """Return why there is to be no such library here, or None: what is not to be insisted on."""
    import torch

    if name not in only():
        return "FASTHYPER_ONLY left it out"
    if name == "cuda_emulated":
        asked = os.environ.get("FASTHYPER_BUILD_EMULATOR") == "1"
        return None if asked else "it is for tests; FASTHYPER_BUILD_EMULATOR=1 builds it"
    if name == "cuda":
        if SANITIZE:
            return "there is a sanitizer for CPUs alone"
        if torch.version.hip:
            return "this torch is built for ROCm"
        return None if NVCC else "there is no nvcc"
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"there are kernels for x86-64 CPUs alone, not for {platform.machine()}"
    return None


def only():
    """Return the names of the libraries that FASTHYPER_ONLY lets be, all of them without it."""
    from torch.backends.cpu import get_cpu_capability

    known = [*(f"cpu_{name}" for name in CPU), "eager", "cuda_emulated", "cuda"]
    named = re.findall(r"[^\s,]+", os.environ.get("FASTHYPER_ONLY", "")) or known
    if unknown := [name for name in named if name not in (*known, "here")]:
        sys.exit(f"fasthyper: FASTHYPER_ONLY: no library is called {unknown[0]}; known are here, {', '.join(known)}")
    return [*named, *([f"cpu_{get_cpu_capability().lower()}", "eager"] if "here" in named else [])]


def extension(name, source, headers, flags):
    from torch.utils.cpp_extension import CppExtension

    # Pairs of 16-bit numbers are moved as floats, which no compiler may take for something else; loops that copy a few
    # numbers stay what they are, and no calls.
    compile_args = ["-std=c++20", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-psabi", *flags]
    compile_args += ["-fno-strict-aliasing", "-fno-tree-loop-distribute-patterns"]
    link_args = ["-fopenmp", "-Wl,--no-undefined"]  # so that a symbol that torch lacks shows now, not on import
    if SANITIZE:
        compile_args += SANITIZER
        link_args = ["-fopenmp", f"-fsanitize={SANITIZE}"]
    return CppExtension(
        f"fasthyper._compiled.{name}",
        [source],
        depends=headers,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )


class Kernels(Extension):
    """A library of all of csrc/cuda, made by commands of our own.

    torch's would take a torch that is built for CUDA itself, nvcc for whatever is called .cu, and one file of it
    again for no change of a header. Of torch, only the stable ABI is used, as it was in 2.11.
    """

    COMMON = ("-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000")

    def __init__(self, name):
        files = sorted(path.relative_to(ROOT) for path in (ROOT / "csrc" / "cuda").iterdir())
        super().__init__(f"fasthyper._compiled.{name}", [], depends=[str(path) for path in files])
        self.files = [ROOT / path for path in files if path.suffix == ".cu"]
        self.commands = {"cuda": self.cuda, "cuda_emulated": self.emulated}[name]

    def cuda(self):
        """Return nvcc's commands to compile and to link.

        What torch for CUDA alone has is left to be found on loading; so the library is built beside any torch.
        """
        host = "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-psabi,-Wno-unknown-pragmas"
        threads = -(-jobs() // max(1, len(self.files)))  # of a file, the parts: where there are cores to spare
        flags = ["-O3", "-lineinfo", "--expt-relaxed-constexpr", "-DUSE_CUDA", f"--threads={threads}", host]
        flags += ["--compress-mode=size"] if "compute_100" in known() else []  # since 12.8, as 10.0 is; a seventh
        return [NVCC, *self.COMMON, *flags, *parts()], [NVCC, "-shared", "-cudart=static", "-Xlinker=--no-as-needed"]

    def emulated(self):
        flags = ["-O2", "-g0", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
        flags += ["-Wno-unknown-pragmas"]  # those that unroll
        flags += SANITIZER if SANITIZE else []
        link = [*COMPILER, "-shared", "-pthread", "-Wl,--no-as-needed", "-Wl,--no-undefined"]
        if SANITIZE:
            link = [*COMPILER, "-shared", "-pthread", f"-fsanitize={SANITIZE}"]
        return [*COMPILER, *self.COMMON, *flags, "-DFASTHYPER_EMULATED", "-x", "c++"], link

    def build(self, library, folder):
        from torch.utils.cpp_extension import include_paths, library_paths

        compile_one, link = self.commands()
        compile_one += [flag for path in include_paths() for flag in ("-isystem", path)]
        after = [*(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
        make(library, folder, self.files, compile_one, link, after)


def jobs():
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


def known():
    return subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()


def parts():
    """Return nvcc's flags for the parts that TORCH_CUDA_ARCH_LIST names, "8.0 9.0a;10.0+PTX", or for all it knows."""
    named = re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    if not named:
        named = re.findall(r"(\d+)\.(\d)(a?)()", " ".join(CAPABILITIES))
        named = [part for part in named if f"compute_{part[0]}{part[1]}" in known()]
        named[-1] = (*named[-1][:3], "+PTX")
    flags = []
    for major, minor, letter, ptx in named:
        if int(major) < 8:
            continue  # no bfloat16, no asynchronous copies: the lists of containers have these too
        part = f"{major}{minor}{'a' if (major, minor) == ('9', '0') else letter}"  # 9.0 is 9.0a, for its wgmma
        flags.append(f"-gencode=arch=compute_{part},code=sm_{part}")
        if ptx:  # of a letter, it would serve that part alone
            flags.append(f"-gencode=arch=compute_{major}{minor},code=compute_{major}{minor}")
    if not flags:
        raise RuntimeError("TORCH_CUDA_ARCH_LIST names no part from 8.0 on")
    return flags


def make(library, folder, files, compile_one, link, after):
    """Compile each file and link: by ninja, what has changed in parallel, or without ninja one after another."""
    objects = [folder / f"{path.stem}.o" for path in files]
    folder.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    ninja = shutil.which("ninja", path=os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)]))
    if ninja is None:
        for path, made in zip(files, objects, strict=True):
            command([*compile_one, "-c", str(path), "-o", str(made)])
        return command([*link, *map(str, objects), "-o", str(library), *after])
    quoted = lambda words: shlex.join(words).replace("$", "$$")
    escaped = lambda path: re.sub(r"([$ :])", r"$\1", str(path.absolute()))
    rules = [
        "rule compile",
        f"  command = {quoted(compile_one)} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {quoted(link)} $in -o $out {quoted(after)}",
        *(f"build {escaped(made)}: compile {escaped(path)}" for path, made in zip(files, objects, strict=True)),
        f"build {escaped(library)}: link {' '.join(map(escaped, objects))}",
    ]
    (folder / "build.ninja").write_text("\n".join([*rules, ""]))
    return command([ninja, "-C", str(folder), "-j", str(jobs())])


def command(words):
    """Run it; what it has to say if it fails, or if it warns, is shown, and the first error is why it failed."""
    result = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode or "warning" in result.stdout:
        print(result.stdout, file=sys.stderr)
    if result.returncode:
        said = re.findall(r".*(?:(?:error|fatal) *:|undefined reference).*", result.stdout)
        raise RuntimeError(said[0].strip() if said else f"{words[0]} failed")


def extensions():
    headers = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc" / "cpu").glob("*.h"))]
    kernels = [extension(f"cpu_{name}", f"csrc/cpu/{name}.cpp", headers, flags) for name, flags in CPU.items()]
    return [*kernels, extension("eager", "csrc/eager.cpp", [], []), Kernels("cuda_emulated"), Kernels("cuda")]


def builder():
    """Return build_ext with ninja, and with a failure that costs the library only."""
    import torch
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "no_python_abi_suffix": True})
            self.missing = {}
            self.whole = threading.Lock()  # of what takes all cores itself, one at a time

        def finalize_options(self):
            super().finalize_options()
            if self.use_ninja:  # without it, torch changes the one compiler as it goes
                self.parallel = self.parallel or jobs()

        def _build_extensions_parallel(self):
            """distutils' own would begin what waits although one has failed, or Ctrl-C was pressed."""
            with ThreadPoolExecutor(self.parallel) as pool:
                built = [pool.submit(self.build_extension, ext) for ext in self.extensions]
                try:
                    for one in built:
                        one.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise

        def run(self):
            try:
                super().run()
                record = {"torch": torch.__version__, "missing": self.missing}
            except BaseException as error:
                record = {"error": reason(error)}
                self.extensions = []
            self.extensions = [ext for ext in self.extensions if last(ext.name) not in self.missing]
            write(record, Path(FOLDER if self.inplace else os.path.join(self.build_lib, FOLDER)))

        def build_extension(self, ext):
            name = last(ext.name)
            library = Path(self.get_ext_fullpath(ext.name))
            why = obstacle_to(name)
            try:
                if why is None and isinstance(ext, Kernels):
                    with self.whole:
                        ext.build(library, Path(self.build_temp, name))
                elif why is None:
                    alone = copy.copy(self)  # side by side, each has a build.ninja of its own
                    alone.build_temp = os.path.join(self.build_temp, name)
                    super(Build, alone).build_extension(ext)
            except BaseException as error:
                why = reason(error)
            if why is not None:
                if name in only():
                    print(f"fasthyper: built without {name}: {why}", file=sys.stderr)
                self.missing[name] = why
                library.unlink(missing_ok=True)  # an older one
                ext.optional = True  # so setuptools does not look for it

    return Build


def last(name):
    return name.rpartition(".")[2]


def reason(error):
    """Return what an error says; raises it where nothing is to be let pass."""
    if INSISTED or isinstance(error, KeyboardInterrupt):  # SystemExit is not: setuptools wraps a compiler's in it
        raise error
    return str(error).strip().splitlines()[-1] if str(error) else type(error).__name__


class WithoutKernels(build_py):
    """Leaves the reason beside the package."""

    def run(self):
        super().run()
        write({"error": why}, Path(FOLDER if self.editable_mode else os.path.join(self.build_lib, FOLDER)))


class NoKernels(build_ext):
    """The same, where the kernels are asked for by themselves."""

    def run(self):
        write({"error": why}, Path(FOLDER if self.inplace else os.path.join(self.build_lib, FOLDER)))


def write(record, folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.json").write_text(json.dumps(record) + "\n")


if os.environ.get("FASTHYPER_BUILD") == "later":
    setup()
elif (why := obstacle()) is None:
    only()  # is told now if it makes no sense
    setup(ext_modules=extensions(), cmdclass={"build_ext": builder()})
elif INSISTED:
    sys.exit(f"fasthyper: FASTHYPER_BUILD=1, but {why}")
else:
    print(f"fasthyper: built without compiled kernels: {why}", file=sys.stderr)
    setup(cmdclass={"build_py": WithoutKernels, "build_ext": NoKernels})
