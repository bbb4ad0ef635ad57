"""The messages and the record of setup.py, on builds that compile nothing."""

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
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the compiled kernels are for Linux only")


def build(folder, **variables):
    """Run build_ext into a folder; return the finished process and the record, or None."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FASTHYPER_")}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", folder, "--build-temp", folder]
    done = subprocess.run(command, cwd=ROOT, env={**kept, **variables}, capture_output=True, text=True, timeout=120)
    record = folder / "fasthyper" / "_compiled" / "build.json"
    return done, json.loads(record.read_text()) if record.exists() else None


def test_libraries_that_are_not_requested_are_missing_silently(tmp_path):
    done, record = build(tmp_path, FASTHYPER_ONLY="cuda_emulated")
    assert done.returncode == 0
    missing = record["missing"]
    assert missing.pop("cuda_emulated").startswith("it is for tests")
    assert missing == dict.fromkeys(LIBRARIES - {"cuda_emulated"}, "FASTHYPER_ONLY does not name it")
    assert [line for line in done.stderr.splitlines() if "does not name it" in line] == []


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_here_means_the_libraries_of_this_machine(tmp_path):
    """With a compiler that always fails, the record shows which libraries were tried."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *" -c "*) echo "error: no"; exit 1;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    done, record = build(tmp_path, FASTHYPER_ONLY="here", CXX=str(compiler), ATEN_CPU_CAPABILITY="default")
    assert done.returncode == 0
    tried = {name for name, why in record["missing"].items() if why != "FASTHYPER_ONLY does not name it"}
    assert tried == {"cpu_default", "eager"}


def test_an_unknown_library(tmp_path):
    done, record = build(tmp_path, FASTHYPER_ONLY="cpu_avx2, cpu_avx3")
    assert done.returncode == 1
    assert "FASTHYPER_ONLY: unknown library cpu_avx3; choose from here, cpu_default" in done.stderr
    assert record is None


def test_the_record_names_a_missing_compiler(tmp_path):
    done, record = build(tmp_path, CXX="nothing-of-the-kind")
    assert done.returncode == 0
    why = "the build found no C++ compiler nothing-of-the-kind; install one, then fasthyper again"
    assert record == {"error": why}


def test_later_builds_and_records_nothing(tmp_path):
    done, record = build(tmp_path, FASTHYPER_BUILD="later")
    assert done.returncode == 0
    assert record is None
