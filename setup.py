"""Build the compiled kernels that this machine can build; pyproject.toml has everything else about the package.

All kernels need torch at build time; those for CPUs need a C++ compiler; those for CUDA need nvcc, but no GPU. The
package works without a library that cannot be built. pip's output and `fasthyper info` have the reason.

FASTHYPER_BUILD           0 builds no kernels; 1 fails where a library cannot be built; later leaves the libraries and
                          their record as they are, for a `setup.py build_ext --inplace` that follows
FASTHYPER_ONLY            the libraries to build, such as "cuda" or "cpu_avx2,eager"; `here` means those that this
                          machine's CPU loads
FASTHYPER_BUILD_EMULATOR  1 adds cuda_emulated: the CUDA kernels for a CPU that emulates a GPU, which the tests run
FASTHYPER_SANITIZE        sanitizers of the compiler, such as "address,undefined": builds the CPU kernels for tests
TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX, CUDA_HOME    as for torch's own extensions
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
FOLDER = "fasthyper/_compiled"  # of the libraries and their record, build.json
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
INSISTED = os.environ.get("FASTHYPER_BUILD") == "1"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
# nvcc is looked for in the CUDA that the environment names, then on PATH, then in CUDA's default folder.
CUDA_HOMES = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
NVCC_FOLDERS = [*(f"{home}/bin" for home in CUDA_HOMES), os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
NVCC = shutil.which("nvcc", path=os.pathsep.join(NVCC_FOLDERS))
ARCHS = ("8.0", "9.0a", "10.0")  # one for each generation of GPUs; PTX of the last also runs on later generations


def why_no_build():
    """Return why nothing can be built here, or None."""
    if os.environ.get("FASTHYPER_BUILD") == "0":
        return "FASTHYPER_BUILD=0 leaves them out; install fasthyper again without it"
    if sys.platform != "linux":
        return f"the compiled kernels are for Linux only, and this is {sys.platform}"
    try:
        import torch  # noqa: F401
        from torch.utils import cpp_extension  # noqa: F401
    except ImportError as error:
        return f"the build found no torch ({error}); install torch, then fasthyper with pip's --no-build-isolation"
    if not shutil.which(COMPILER[0]):
        return f"the build found no C++ compiler {COMPILER[0]}; install one, then fasthyper again"
    return None


def why_not(library):
    """Return why this library is not to be built here, or None. Even FASTHYPER_BUILD=1 accepts these reasons."""
    import torch

    if library not in requested():
        return "FASTHYPER_ONLY does not name it"
    if library == "cuda_emulated":
        asked = os.environ.get("FASTHYPER_BUILD_EMULATOR") == "1"
        return None if asked else "it is for tests; FASTHYPER_BUILD_EMULATOR=1 builds it"
    if library == "cuda":
        if SANITIZE:
            return "FASTHYPER_SANITIZE builds CPU kernels only"
        if torch.version.hip:
            return "the CUDA kernels are for NVIDIA GPUs, and this torch is built for ROCm"
        return None if NVCC else "the build found no nvcc; install the CUDA toolkit or set CUDA_HOME, then build again"
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the CPU kernels are for x86-64 only, and this is {platform.machine()}"
    return None


def requested():
    """Return the names of the libraries that FASTHYPER_ONLY names, or of all."""
    from torch.backends.cpu import get_cpu_capability

    every = [*(f"cpu_{name}" for name in CPU), "eager", "cuda_emulated", "cuda"]
    names = re.findall(r"[^\s,]+", os.environ.get("FASTHYPER_ONLY", "")) or every
    if unknown := [name for name in names if name not in (*every, "here")]:
        sys.exit(f"fasthyper: FASTHYPER_ONLY: unknown library {unknown[0]}; choose from here, {', '.join(every)}")
    return [*names, *([f"cpu_{get_cpu_capability().lower()}", "eager"] if "here" in names else [])]


def cpp_library(name, source, headers, flags):
    """Return a library of one C++ file, which torch's own BuildExtension compiles."""
    from torch.utils.cpp_extension import CppExtension

    # The kernels move pairs of 16-bit numbers as floats, which strict aliasing forbids. Loops that copy a few numbers
    # must stay loops: a call of memcpy or memset takes longer.
    compile_args = ["-std=c++20", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-psabi", *flags]
    compile_args += ["-fno-strict-aliasing", "-fno-tree-loop-distribute-patterns"]
    link_args = ["-fopenmp", "-Wl,--no-undefined"]  # a symbol that torch lacks fails the build, not the import
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


class CudaLibrary(Extension):
    """A library of csrc/cuda, compiled without torch's BuildExtension.

    BuildExtension would need a torch that is built for CUDA, would run nvcc on every .cu file, the emulator's too, and
    would not compile a file again when a header changes. Of torch, the kernels use only the stable ABI of 2.11.
    """

    COMMON_FLAGS = ("-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000")

    def __init__(self, name):
        files = sorted(path.relative_to(ROOT) for path in (ROOT / "csrc" / "cuda").iterdir())
        super().__init__(f"fasthyper._compiled.{name}", [], depends=[str(path) for path in files])
        self.files = [ROOT / path for path in files if path.suffix == ".cu"]
        self.commands = {"cuda": self.nvcc, "cuda_emulated": self.emulator}[name]

    def nvcc(self):
        """Return nvcc's commands to compile and to link.

        Symbols that only a torch for CUDA has are resolved on loading; so the library can be built with any torch.
        """
        host = "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-psabi,-Wno-unknown-pragmas"
        threads = -(-jobs() // max(1, len(self.files)))  # spare cores compile a file for several architectures at once
        flags = ["-O3", "-lineinfo", "--expt-relaxed-constexpr", "-DUSE_CUDA", f"--threads={threads}", host]
        # CUDA 12.8 brought both compute_100 and this flag, which shrinks the library to a seventh.
        flags += ["--compress-mode=size"] if "compute_100" in known_archs() else []
        link = [NVCC, "-shared", "-cudart=static", "-Xlinker=--no-as-needed"]
        return [NVCC, *self.COMMON_FLAGS, *flags, *arch_flags()], link

    def emulator(self):
        """Return the C++ compiler's commands to compile and to link."""
        flags = ["-O2", "-g0", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
        flags += ["-Wno-unknown-pragmas"]  # "#pragma unroll"
        flags += SANITIZER if SANITIZE else []
        link = [*COMPILER, "-shared", "-pthread", "-Wl,--no-as-needed", "-Wl,--no-undefined"]
        if SANITIZE:
            link = [*COMPILER, "-shared", "-pthread", f"-fsanitize={SANITIZE}"]
        return [*COMPILER, *self.COMMON_FLAGS, *flags, "-DFASTHYPER_EMULATED", "-x", "c++"], link

    def build(self, library, folder):
        """Compile all files into a folder and link them to the library."""
        from torch.utils.cpp_extension import include_paths, library_paths

        compile_command, link_command = self.commands()
        compile_command += [flag for path in include_paths() for flag in ("-isystem", path)]
        torch_libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
        compile_and_link(library, folder, self.files, compile_command, link_command, torch_libraries)


def jobs():
    """Return the number of files to compile at once."""
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


def known_archs():
    """Return the GPU architectures that nvcc knows, such as compute_90."""
    return subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()


def arch_flags():
    """Return nvcc's flags for the architectures in TORCH_CUDA_ARCH_LIST, "8.0 9.0a;10.0+PTX", or for those of ARCHS."""
    archs = re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    if not archs:
        archs = re.findall(r"(\d+)\.(\d)(a?)()", " ".join(ARCHS))
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


def compile_and_link(library, folder, files, compile_command, link_command, libraries):
    """Build a library: with ninja in parallel and only what has changed, else all files one after the other."""
    objects = [folder / f"{path.stem}.o" for path in files]
    folder.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    ninja = shutil.which("ninja", path=os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)]))
    if ninja is None:
        for source, made in zip(files, objects, strict=True):
            run([*compile_command, "-c", str(source), "-o", str(made)])
        return run([*link_command, *map(str, objects), "-o", str(library), *libraries])
    quoted = lambda words: shlex.join(words).replace("$", "$$")
    escaped = lambda path: re.sub(r"([$ :])", r"$\1", str(path.absolute()))
    rules = [
        "rule compile",
        f"  command = {quoted(compile_command)} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {quoted(link_command)} $in -o $out {quoted(libraries)}",
        *(f"build {escaped(made)}: compile {escaped(source)}" for source, made in zip(files, objects, strict=True)),
        f"build {escaped(library)}: link {' '.join(map(escaped, objects))}",
    ]
    (folder / "build.ninja").write_text("\n".join([*rules, ""]))
    return run([ninja, "-C", str(folder), "-j", str(jobs())])


def run(command):
    """Run a command. Print its output if it fails or warns; if it fails, raise the first error in the output."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode or "warning" in result.stdout:
        print(result.stdout, file=sys.stderr)
    if result.returncode:
        errors = re.findall(r".*(?:(?:error|fatal) *:|undefined reference).*", result.stdout)
        raise RuntimeError(errors[0].strip() if errors else f"{command[0]} failed")


def extensions():
    headers = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc" / "cpu").glob("*.h"))]
    kernels = [cpp_library(f"cpu_{name}", f"csrc/cpu/{name}.cpp", headers, flags) for name, flags in CPU.items()]
    eager = cpp_library("eager", "csrc/eager.cpp", [], [])
    return [*kernels, eager, CudaLibrary("cuda_emulated"), CudaLibrary("cuda")]


def build_kernels():
    """Return a build_ext command that leaves out a library that fails, and records why."""
    import torch
    from torch.utils.cpp_extension import BuildExtension

    class BuildKernels(BuildExtension):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "no_python_abi_suffix": True})
            self.missing = {}
            self.all_cores = threading.Lock()  # held by a library whose build uses all cores

        def finalize_options(self):
            super().finalize_options()
            if self.use_ninja:  # without ninja, torch modifies a compiler that all libraries share
                self.parallel = self.parallel or jobs()

        def _build_extensions_parallel(self):
            """Build the libraries in threads; distutils would start the waiting ones even after a failure or Ctrl-C."""
            with ThreadPoolExecutor(self.parallel) as pool:
                builds = [pool.submit(self.build_extension, ext) for ext in self.extensions]
                try:
                    for build in builds:
                        build.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise

        def run(self):
            try:
                super().run()
                record = {"torch": torch.__version__, "missing": self.missing}
            except BaseException as error:
                record = {"error": accept(error)}
                self.extensions = []
            self.extensions = [ext for ext in self.extensions if short_name(ext) not in self.missing]
            write_record(self, self.inplace, record)

        def build_extension(self, ext):
            name = short_name(ext)
            library = Path(self.get_ext_fullpath(ext.name))
            why = why_not(name)
            try:
                if why is None and isinstance(ext, CudaLibrary):
                    with self.all_cores:
                        ext.build(library, Path(self.build_temp, name))
                elif why is None:
                    own = copy.copy(self)  # each library has its own folder, with its own build.ninja
                    own.build_temp = os.path.join(self.build_temp, name)
                    super(BuildKernels, own).build_extension(ext)
            except BaseException as error:
                why = accept(error)
            if why is not None:
                if name in requested():
                    print(f"fasthyper: built without {name}: {why}", file=sys.stderr)
                self.missing[name] = why
                library.unlink(missing_ok=True)  # of an earlier build
                ext.optional = True  # setuptools does not look for the library of an optional extension

    return BuildKernels


def short_name(ext):
    return ext.name.rpartition(".")[2]


def accept(error):
    """Return an error's message, for the record; raise it again if it must stop the build."""
    if INSISTED or isinstance(error, KeyboardInterrupt):  # setuptools turns a compiler's failure into SystemExit
        raise error
    return str(error).strip().splitlines()[-1] if str(error) else type(error).__name__


class PackageWithoutKernels(build_py):
    """Build the package, with the reason why it has no kernels."""

    def run(self):
        super().run()
        write_record(self, self.editable_mode, {"error": why_no_build()})


class RecordWithoutKernels(build_ext):
    """Record the reason why there are no kernels, where build_ext runs by itself."""

    def run(self):
        write_record(self, self.inplace, {"error": why_no_build()})


def write_record(command, in_place, record):
    """Write build.json, which fasthyper/compiled.py reads."""
    folder = Path(FOLDER if in_place else os.path.join(command.build_lib, FOLDER))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.json").write_text(json.dumps(record) + "\n")


if os.environ.get("FASTHYPER_BUILD") == "later":
    setup()
elif (why := why_no_build()) is None:
    requested()  # an unknown name in FASTHYPER_ONLY stops the build here
    setup(ext_modules=extensions(), cmdclass={"build_ext": build_kernels()})
elif INSISTED:
    sys.exit(f"fasthyper: FASTHYPER_BUILD=1, but {why}")
else:
    print(f"fasthyper: built without compiled kernels: {why}", file=sys.stderr)
    setup(cmdclass={"build_py": PackageWithoutKernels, "build_ext": RecordWithoutKernels})
