"""Build the compiled kernels that this machine can build; pyproject.toml has everything else about the package.

All kernels need torch at build time; those for CPUs need a C++ compiler; those for CUDA need nvcc, but no GPU. The
package works without a library that cannot be built, and `fasthyper build` makes it later. pip's output and `fasthyper
info` have the reason.

FASTHYPER_BUILD           0 builds no kernels; 1 fails where a library cannot be built; later leaves the libraries and
                          their record as they are, for a `setup.py build_ext --inplace` that follows
FASTHYPER_ONLY            the libraries to build, such as "cuda" or "cpu_avx2,eager"; `here` means those that this
                          machine's CPU loads
FASTHYPER_BUILD_EMULATOR  1 adds cuda_emulated: the CUDA kernels for a CPU that emulates a GPU, which the tests run
FASTHYPER_SANITIZE        sanitizers of the compiler, such as "address,undefined": builds the CPU kernels for tests
"""

import importlib.util
import os
import re
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
FOLDER = "fasthyper/_compiled"  # of the libraries and their record, build.json


def load_building():
    """Return fasthyper/building.py as a module of its own: `import fasthyper` would need torch."""
    spec = importlib.util.spec_from_file_location("building", ROOT / "fasthyper" / "building.py")
    module = sys.modules["building"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


building = load_building()
CHOICE = os.environ.get("FASTHYPER_BUILD")
INSISTED = CHOICE == "1"


def requested():
    """Return the names of the libraries that FASTHYPER_ONLY names, or of all."""
    from torch.backends.cpu import get_cpu_capability

    names = re.findall(r"[^\s,]+", os.environ.get("FASTHYPER_ONLY", "")) or building.NAMES
    if unknown := [name for name in names if name not in (*building.NAMES, "here")]:
        known = ", ".join(building.NAMES)
        sys.exit(f"fasthyper: FASTHYPER_ONLY: unknown library {unknown[0]}; choose from here, {known}")
    return [*names, *([f"cpu_{get_cpu_capability().lower()}", "eager"] if "here" in names else [])]


def why_left_out(name):
    """Return why a library is not to be built here, or None. Even FASTHYPER_BUILD=1 accepts these reasons."""
    if name not in requested():
        return "FASTHYPER_ONLY does not name it"
    if name == "cuda_emulated" and os.environ.get("FASTHYPER_BUILD_EMULATOR") != "1":
        return "it is for tests; FASTHYPER_BUILD_EMULATOR=1 builds it"
    return building.why_not(name)


class BuildKernels(build_ext):
    """Compile the libraries, without setuptools' compiler, and record what is missing and why."""

    def run(self):
        in_place = self.inplace or self.editable_mode
        folder = Path(FOLDER if in_place else os.path.join(self.build_lib, FOLDER))
        folder.mkdir(parents=True, exist_ok=True)
        building.write_record(folder, {"error": WHY} if WHY else self.build(folder))

    def build(self, folder):
        import torch

        missing = {name: why for name in building.NAMES if (why := why_left_out(name)) is not None}
        record = building.record(torch.__version__, missing)  # of the sources as they are before the build
        names = [name for name in building.NAMES if name not in missing]
        failed = building.build(names, folder, Path(self.build_temp).absolute())
        missing.update(failed)
        for name, why in missing.items():
            if name in requested():
                print(f"fasthyper: built without {name}: {why}", file=sys.stderr)
            (folder / f"{name}.so").unlink(missing_ok=True)  # of an earlier build
        if failed and INSISTED:
            sys.exit(f"fasthyper: FASTHYPER_BUILD=1, but {', '.join(failed)} cannot be built")
        return record

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


WHY = "FASTHYPER_BUILD=0 left them out; run `fasthyper build`" if CHOICE == "0" else building.why_nothing()
if CHOICE == "later":
    setup()
elif WHY is None:
    requested()  # an unknown name in FASTHYPER_ONLY stops the build here
    # The one extension stands for all libraries: with it, setuptools runs build_ext and makes a wheel for this system.
    setup(ext_modules=[Extension("fasthyper._compiled.kernels", [])], cmdclass={"build_ext": BuildKernels})
elif INSISTED:
    sys.exit(f"fasthyper: FASTHYPER_BUILD=1, but {WHY}")
else:
    print(f"fasthyper: built without compiled kernels: {WHY}", file=sys.stderr)
    setup(cmdclass={"build_ext": BuildKernels})
