"""The stage `bench` of `make gpu`: `python -m benchmarks measure` on a GPU, for the workloads of gpu_common.BENCHED."""

from __future__ import annotations

import sys

from gpu_common import BENCHED, SMALL, say

from benchmarks import __main__ as benchmarks
from benchmarks import studies, timing
from benchmarks.devices import GPU


def said(text: str) -> str:
    """Return a line about a comparison, after saying it to the summary."""
    say(text)
    return text


def main() -> None:
    """Measure; the arguments are further ones of `measure`."""
    if SMALL:  # in the dry run, one workload, without a look at the others
        few = [w for w in studies.WORKLOADS if w.name == "tiny batch"]
        studies.select = lambda *args: few
        benchmarks.precompile = lambda problems: None
        GPU.ceilings = lambda device, dtype: {}  # they are graphs
    describe = timing.describe
    timing.describe = lambda group: said(describe(group))
    benchmarks.main(["measure", "--device", "cuda", "--only", BENCHED, *sys.argv[1:]])


if __name__ == "__main__":
    main()
