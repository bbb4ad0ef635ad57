"""setup.py and `fasthyper build`: messages, records and incremental builds, with a compiler that compiles nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fasthyper import building, cli, compiled, processor

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


def test_here_means_the_libraries_of_this_machine(tmp_path):
    """With a compiler that always fails, the record shows which libraries were tried."""
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'error: no'; exit 1\n")
    compiler.chmod(0o755)
    done, record = build(tmp_path, FASTHYPER_ONLY="here", CXX=str(compiler), ATEN_CPU_CAPABILITY="default")
    assert done.returncode == 0
    tried = {name for name, why in record["missing"].items() if why != "FASTHYPER_ONLY does not name it"}
    assert tried == {"cpu_default", "eager"}


def test_the_record_names_the_sources(tmp_path):
    _, record = build(tmp_path, FASTHYPER_ONLY="cuda_emulated")
    assert record["sources"] == building.digest()


def test_files_that_are_no_sources_do_not_count(tmp_path, monkeypatch):
    shutil.copytree(building.CSRC, tmp_path / "csrc")
    monkeypatch.setattr(building, "CSRC", tmp_path / "csrc")
    building.digest.cache_clear()
    before = building.digest()
    (tmp_path / "csrc" / "cpu" / ".pack.h").touch()
    (tmp_path / "csrc" / "cpu" / "pack.h.orig").touch()
    building.digest.cache_clear()
    assert building.digest() == before
    (tmp_path / "csrc" / "cpu" / "conv.h").rename(tmp_path / "csrc" / "cuda" / "conv.h")  # to another folder
    building.digest.cache_clear()
    assert building.digest() != before
    building.digest.cache_clear()


def test_a_wheel_has_all_sources():
    """Libraries are loaded only beside the sources that they were built from."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")
    package = ROOT / "fasthyper"
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packed = {path for pattern in tools["package-data"]["fasthyper"] for path in package.glob(pattern)}
    assert set(building.sources()) <= packed
    assert {path.suffix for path in packed if path.is_relative_to(building.CSRC)} <= {".h", ".cpp", ".cu"}


def test_an_unknown_library(tmp_path):
    done, record = build(tmp_path, FASTHYPER_ONLY="cpu_avx2, cpu_avx3")
    assert done.returncode == 1
    assert "FASTHYPER_ONLY: unknown library cpu_avx3; choose from here, cpu_default" in done.stderr
    assert record is None


def test_the_record_names_a_missing_compiler(tmp_path):
    done, record = build(tmp_path, CXX="nothing-of-the-kind")
    assert done.returncode == 0
    assert record["error"].startswith("there is no C++ compiler nothing-of-the-kind; install one that knows C++20")
    assert record["error"].endswith("then run `fasthyper build`")


def test_later_builds_and_records_nothing(tmp_path):
    done, record = build(tmp_path, FASTHYPER_BUILD="later")
    assert done.returncode == 0
    assert record is None


COMPILER = """#!/bin/sh
echo "$*" >> LOG
while [ $# -gt 0 ]; do
  case $1 in -o) out=$2 ;; -c) source=$2 ;; -MF) deps=$2 ;; esac
  shift
done
[ -n "$deps" ] && echo "$out: $source HEADER" > "$deps"
sleep 0.1
echo made > "$out"
"""


@pytest.fixture
def compiler(tmp_path):
    """Return a compiler that makes files without content, and writes its calls to a log beside it."""
    path = tmp_path / "compiler" / "c++"
    path.parent.mkdir()
    (path.parent / "header.h").touch()
    text = COMPILER.replace("LOG", str(path.parent / "log")).replace("HEADER", str(path.parent / "header.h"))
    path.write_text(text)
    path.chmod(0o755)
    return path


def calls(compiler):
    """Return the files that were compiled or linked since the last call."""
    log = compiler.parent / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return [re.search(r"-o (\S+)", line)[1].rpartition("/")[2] for line in lines]


class TestBuilding:
    """What is compiled, and when."""

    @pytest.fixture(autouse=True)
    def of_this_compiler(self, compiler, monkeypatch):
        monkeypatch.setattr(building, "COMPILER", [str(compiler)])

    @pytest.fixture
    def make(self, tmp_path, compiler):
        def make(*names):
            failed = building.build(names, tmp_path / "out", tmp_path / "objects")
            return failed, sorted(calls(compiler))

        return make

    def test_nothing_is_compiled_again_without_a_change(self, make, compiler):
        failed, made = make("eager", "cpu_avx2")
        assert failed == {}
        assert [name for name in made if name.endswith(".o")] == ["avx2.o", "eager.o"]
        assert [name for name in make("eager")[1] if name.endswith(".o")] == []

    def test_a_newer_header_is_a_change(self, make, compiler):
        make("eager")
        later = time.time() + 5
        os.utime(compiler.parent / "header.h", (later, later))
        assert "eager.o" in make("eager")[1]

    def test_another_command_is_a_change(self, make, monkeypatch):
        make("cpu_avx2")
        monkeypatch.setitem(building.CPU, "avx2", ["-mavx2"])
        assert "avx2.o" in make("cpu_avx2")[1]

    def test_a_library_that_fails_leaves_the_others(self, make, tmp_path, compiler):
        text = compiler.read_text()
        compiler.write_text(
            text.replace("sleep", 'case "$*$out" in *avx2.o*) echo "a.h:1: error: no"; exit 1 ;; esac\nsleep')
        )
        failed, _ = make("cpu_avx2", "eager")
        assert failed == {"cpu_avx2": "a.h:1: error: no"}
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["eager.so"]

    def test_a_library_appears_as_a_whole(self, make, tmp_path, compiler):
        make("eager")
        (tmp_path / "out" / "eager.so").write_text("the old one")
        compiler.write_text("#!/bin/sh\nwhile [ $1 != -o ]; do shift; done\necho half > $2\nexit 1\n")
        failed, _ = make("eager")
        assert "failed" in failed["eager"]
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["eager.so"]
        assert (tmp_path / "out" / "eager.so").read_text() == "the old one"

    def test_others_may_not_write_to_a_library(self, make, tmp_path):
        before = os.umask(0)
        try:
            make("eager")
        finally:
            os.umask(before)
        assert (tmp_path / "out" / "eager.so").stat().st_mode & 0o777 == 0o755


@pytest.mark.skipif(building.unsupported("eager") is not None, reason="the CPU kernels are for x86-64 Linux only")
class TestCommand:
    """`fasthyper build`."""

    @pytest.fixture(autouse=True)
    def into_this_cache(self, tmp_path, compiler, monkeypatch):
        monkeypatch.setattr(building, "COMPILER", [str(compiler)])
        monkeypatch.setattr(compiled, "PACKAGED", tmp_path / "package")
        monkeypatch.setenv("FASTHYPER_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("FASTHYPER_COMPILED", raising=False)

    @staticmethod
    def run(capsys, *arguments):
        """Return the exit status and the lines of the command."""
        code = 0
        try:
            cli.main(["build", *arguments])
        except SystemExit as stop:
            code = stop.code
        return code, "\n".join(capsys.readouterr())

    def test_it_builds_what_this_machine_loads(self, capsys, compiler):
        code, text = self.run(capsys)
        assert code == 0
        names = {f"cpu_{processor.kernels()}", "eager", *(["cuda"] if torch.cuda.is_available() else [])}
        assert {path.stem for path in compiled.cached().glob("*.so")} == names
        for name in names:
            assert compiled.look(compiled.cached(), name) == compiled.cached() / f"{name}.so"
        assert re.search(rf"^built cpu_.* in \d+ s: {re.escape(str(compiled.cached()))}$", text, re.M)
        assert re.search(r"^2/[4-9] (cpu|eager)", text, re.M)

    def test_what_is_built_already_is_left(self, capsys, compiler):
        self.run(capsys, "eager")
        calls(compiler)
        code, text = self.run(capsys, "eager")
        assert code == 0
        assert "eager: built already" in text
        assert calls(compiler) == []
        assert self.run(capsys, "eager", "--force")[0] == 0
        assert "eager.o" in calls(compiler)

    def test_the_cache_is_for_one_user(self, capsys):
        before = os.umask(0)
        try:
            self.run(capsys, "eager")
        finally:
            os.umask(before)
        for path in (compiled.cached().parent, compiled.cached()):
            assert path.stat().st_mode & 0o777 == 0o700

    def test_a_cache_that_others_may_write_to_is_refused(self, capsys, compiler):
        compiled.cached().parent.mkdir(parents=True)
        compiled.cached().parent.chmod(0o777)
        code, text = self.run(capsys, "eager")
        assert code == 1
        assert "error: others may write to " in text
        assert calls(compiler) == []

    def test_a_failure_is_one_line_an_exit_status_and_a_record(self, capsys, compiler):
        self.run(capsys, "cpu_avx2")
        compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such thing'\nexit 1\n")
        code, text = self.run(capsys, "eager")
        assert code == 1
        assert "error: eager cannot be built: x.cpp:1: error: no such thing" in text
        assert compiled.look(compiled.cached(), "eager") == "not built: x.cpp:1: error: no such thing"
        assert compiled.look(compiled.cached(), "cpu_avx2") == compiled.cached() / "cpu_avx2.so"

    def test_a_missing_compiler(self, capsys, monkeypatch):
        monkeypatch.setattr(building, "COMPILER", ["nothing-of-the-kind"])
        code, text = self.run(capsys)
        assert code == 1
        assert "error: there is no C++ compiler nothing-of-the-kind; install one that knows C++20, such as g++" in text
        assert not compiled.cache().exists()

    def test_an_unknown_library(self, capsys):
        code, text = self.run(capsys, "cpu_vsx")
        assert code == 1
        assert "error: names: unknown library 'cpu_vsx'; choose from cpu_default, " in text

    def test_a_folder_that_cannot_be_written(self, capsys, monkeypatch, tmp_path):
        (tmp_path / "file").touch()
        monkeypatch.setenv("FASTHYPER_CACHE", str(tmp_path / "file"))
        code, text = self.run(capsys, "eager")
        assert code == 1
        assert "error: cannot write to " in text

    def test_a_damaged_record_is_made_again(self, capsys):
        self.run(capsys, "eager")
        (compiled.cached() / "build.json").write_text("{")
        assert self.run(capsys, "eager")[0] == 0
        assert compiled.look(compiled.cached(), "eager") == compiled.cached() / "eager.so"

    def test_remove(self, capsys):
        self.run(capsys, "eager")
        other = compiled.cached().parent / "mine"
        other.mkdir()
        assert self.run(capsys, "--remove")[0] == 0
        assert not compiled.cached().exists()
        assert other.exists()

    def test_a_second_build_waits_for_the_first(self, compiler, tmp_path, capsys):
        import fcntl

        self.run(capsys, "cpu_avx2")
        calls(compiler)
        code = (
            "import sys, pathlib; from fasthyper import cli, compiled; compiled.PACKAGED = pathlib.Path(sys.argv[1])\n"
        )
        command = [sys.executable, "-W", "ignore", "-c", code + "cli.main(['build', 'eager'])", str(tmp_path)]
        env = {**os.environ, "CXX": str(compiler)}
        with (compiled.cached().parent / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            second = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            assert second.stderr.readline() == "waiting for another `fasthyper build`\n"
            (compiled.cached() / "cpu_avx2.so").rename(compiled.cached() / "eager.so")
        assert second.communicate(timeout=120)[0].startswith("eager: built already")
        assert second.returncode == 0
        assert calls(compiler) == []
