"""Repeated launches through Triton's own launcher: the installed Triton's, whose interface is not a public one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_the_driver_gets_the_launches_that_triton_makes():
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("launcher.py"))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    described = 0
    for call in found["calls"]:
        assert call["in Python"] == 0
        assert call["repeated"] == call["by Triton"]
        for _, _, stream, values in call["repeated"]:
            assert stream == found["stream"]
            described += sum(len(value) == 3 and len(value[2]) > 0 for value in values)
    assert described > len(found["calls"])  # tensor descriptors are among the arguments
