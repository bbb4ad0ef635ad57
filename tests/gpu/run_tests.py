"""The stages `tests` of `make gpu`: the tests of one backend, which print each failure at once.

python tests/gpu/run_tests.py cuda | triton
"""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from typing import Any

import pytest
from gpu_common import SMALL, available, report, say

CHOSEN = {
    # The tests of all ops would compile 1,300 kernels of Triton.
    "triton": (
        "tests/backends/test_gpu.py",
        "tests/backends/test_kernels.py",
        "tests/backends/test_triton_points.py",
        "tests/backends/test_ahead.py",
        "-k",
        "(gpu and not cuda) or triton or ahead",
    ),
    "cuda": (
        "tests/kernels/test_hopper_fold.py",
        "tests/kernels/test_hopper_grads.py",
        "tests/backends/test_cuda.py",
        "tests/backends/test_gpu.py",
        "tests/backends/test_kernels.py",
        "tests/ops",
        "-k",
        "cuda or hopper",
    ),
}
FEW = ("tests/backends/test_cuda.py", "-k", "test_few_and_many_blocks and bfloat16")
PROCESSES = 8


class Outcomes:
    """A plugin of pytest that counts outcomes, and prints failures when they happen."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.count[report.outcome] += 1
        if report.outcome == "failed":
            message = str(getattr(getattr(report.longrepr, "reprcrash", None), "message", "")).partition("\n")[0]
            print(flush=True)  # after a line of dots
            say(f"{report.nodeid}: {message[:120]}")


def main(backend: str) -> int:
    """Run the tests; the exit status is 0 only if some passed and none failed."""
    if not available(backend):
        return 3
    parallel = not SMALL and importlib.util.find_spec("xdist") is not None
    options = ["-q", "--tb=short", *(("--numprocesses", str(PROCESSES)) if parallel else ())]
    outcomes = Outcomes()
    status = pytest.main([*options, *(FEW if SMALL else CHOSEN[backend])], plugins=[outcomes])
    count = outcomes.count
    report(passed=count["passed"], failed=count["failed"], skipped=count["skipped"])
    return int(status) or (0 if count["passed"] else 4)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
