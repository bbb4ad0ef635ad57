"""What setup.py says and leaves where there is nothing to compile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARIES = {"cpu_default", "cpu_avx2", "cpu_avx512", "eager", "cuda_emulated", "cuda"}
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there are kernels for Linux alone")


def build(folder, **variables):
    """Run build_ext to a folder; returns the process and the record that it left."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FASTHYPER_")}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", folder, "--build-temp", folder]
    done = subprocess.run(command, cwd=ROOT, env={**kept, **variables}, capture_output=True, text=True, timeout=120)
    record = folder / "fasthyper" / "_compiled" / "build.json"
    return done, json.loads(record.read_text()) if record.exists() else None


def test_what_was_not_asked_for_is_missing_without_a_word(tmp_path):
    done, record = build(tmp_path, FASTHYPER_ONLY="cuda_emulated")
    assert done.returncode == 0
    missing = record["missing"]
    assert missing.pop("cuda_emulated").startswith("it is for tests")
    assert missing == dict.fromkeys(LIBRARIES - {"cuda_emulated"}, "FASTHYPER_ONLY left it out")
    assert [line for line in done.stderr.splitlines() if "left it out" in line] == []


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_here_is_what_this_machine_loads(tmp_path):
    """A compiler that compiles nothing shows what was tried."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *" -c "*) echo "error: no"; exit 1;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    done, record = build(tmp_path, FASTHYPER_ONLY="here", CXX=str(compiler), ATEN_CPU_CAPABILITY="default")
    assert done.returncode == 0
    tried = {name for name, why in record["missing"].items() if why != "FASTHYPER_ONLY left it out"}
    assert tried == {"cpu_default", "eager"}


def test_a_library_that_there_is_not(tmp_path):
    done, record = build(tmp_path, FASTHYPER_ONLY="cpu_avx2, cpu_avx3")
    assert done.returncode == 1
    assert "FASTHYPER_ONLY: no library is called cpu_avx3; known are here, cpu_default" in done.stderr
    assert record is None


def test_without_a_compiler_the_record_says_so(tmp_path):
    done, record = build(tmp_path, CXX="nothing-of-the-kind")
    assert done.returncode == 0
    assert record == {"error": "there is no C++ compiler nothing-of-the-kind"}


def test_later_leaves_everything_as_it_is(tmp_path):
    done, record = build(tmp_path, FASTHYPER_BUILD="later")
    assert done.returncode == 0
    assert record is None
