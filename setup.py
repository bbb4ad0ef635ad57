"""Build of the compiled kernels, where that can be; everything else about the package is in pyproject.toml.

FASTHYPER_BUILD=0 leaves them out, =1 insists on them. Left to itself, the build makes them if torch can be seen and
the machine has a compiler, and if not says why, in the console and to `fasthyper info`.
"""

import json
import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
FOLDER = "fasthyper/_compiled"  # the libraries, and a record: the torch they were built for, or why there are none
# One library for each instruction set; the one that torch itself takes on a machine is loaded there.
CPU = {
    "default": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
SANITIZE = os.environ.get("FASTHYPER_SANITIZE", "")  # "address,undefined": for `make sanitize`


def obstacle():
    """Return why nothing can be built here, or None."""
    if os.environ.get("FASTHYPER_BUILD") == "0":
        return "FASTHYPER_BUILD=0 forbade it"
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"there are kernels for x86-64 Linux alone, not for {platform.machine()} {sys.platform}"
    try:
        import torch  # noqa: F401
        from torch.utils import cpp_extension  # noqa: F401
    except ImportError as error:
        return f"the build could not see torch ({error}); pip install --no-build-isolation lets it"
    compiler = os.environ.get("CXX", "c++").split()[0]
    return None if shutil.which(compiler) else f"there is no C++ compiler {compiler}"


def extension(name, source, headers, flags):
    from torch.utils.cpp_extension import CppExtension

    compile_args = ["-O3", "-g0", "-fopenmp", "-Wall", "-Wno-psabi", "-fvisibility=hidden", *flags]
    link_args = ["-fopenmp", "-Wl,--no-undefined"]  # so that a symbol that torch lacks shows now, not on import
    if SANITIZE:
        compile_args += ["-g", "-O1", "-fno-omit-frame-pointer", f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"]
        compile_args += ["-DFASTHYPER_PLAIN_PRODUCTS"]
        link_args = ["-fopenmp", f"-fsanitize={SANITIZE}"]
    return CppExtension(
        f"fasthyper._compiled.{name}",
        [source],
        depends=headers,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )


def extensions():
    headers = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc" / "cpu").glob("*.h"))]
    kernels = [extension(f"cpu_{name}", f"csrc/cpu/{name}.cpp", headers, flags) for name, flags in CPU.items()]
    return [*kernels, extension("eager", "csrc/eager.cpp", [], [])]


def builder():
    """Return build_ext with ninja, and with a failure that costs the kernels only."""
    import torch
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "no_python_abi_suffix": True})

        def run(self):
            try:
                super().run()
                record = {"torch": torch.__version__}
            except BaseException as error:  # SystemExit included: setuptools wraps a compiler's error in it
                if os.environ.get("FASTHYPER_BUILD") == "1" or isinstance(error, KeyboardInterrupt):
                    raise
                record = {"error": str(error).strip().splitlines()[-1] if str(error) else type(error).__name__}
                print(f"fasthyper: built without compiled kernels: {record['error']}", file=sys.stderr)
                self.extensions = []
            write(record, Path(FOLDER if self.inplace else os.path.join(self.build_lib, FOLDER)))

    return Build


class WithoutKernels(build_py):
    """Leaves the reason beside the package."""

    def run(self):
        super().run()
        write({"error": why}, Path(FOLDER if self.editable_mode else os.path.join(self.build_lib, FOLDER)))


def write(record, folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.json").write_text(json.dumps(record) + "\n")


why = obstacle()
if why is None:
    setup(ext_modules=extensions(), cmdclass={"build_ext": builder()})
elif os.environ.get("FASTHYPER_BUILD") == "1":
    sys.exit(f"fasthyper: FASTHYPER_BUILD=1, but {why}")
else:
    print(f"fasthyper: built without compiled kernels: {why}", file=sys.stderr)
    setup(cmdclass={"build_py": WithoutKernels})
