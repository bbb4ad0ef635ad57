"""Where the compiled libraries are looked for, what makes one unfit, and what a run without them says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch

import fasthyper
from fasthyper import building, compiled
from fasthyper.backends import cpu

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the compiled kernels are for Linux only")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Return the folder of the package and that of the cache, both new and empty."""
    monkeypatch.delenv("FASTHYPER_COMPILED", raising=False)
    monkeypatch.setenv("FASTHYPER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled, "PACKAGED", tmp_path / "package")
    for folder in compiled.folders():
        folder.mkdir(parents=True, mode=0o700)
        folder.parent.chmod(0o700)
    compiled.load.cache_clear()
    yield tuple(compiled.folders())
    compiled.load.cache_clear()


@pytest.fixture
def loaded(monkeypatch):
    """Return the list of the libraries that are loaded; none is."""
    names: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", names.append)
    return names


def record(folder, libraries=(), **content):
    (folder / "build.json").write_text(json.dumps({**building.record(torch.__version__, {}), **content}))
    for name in libraries:
        (folder / f"{name}.so").touch(mode=0o755)
        (folder / f"{name}.so").chmod(0o755)


def test_why_not_without_a_build(folders):
    assert compiled.load("cpu_avx2") == "not built: run `fasthyper build`"
    assert compiled.load("cuda") == "not built: run `fasthyper build cuda`"


def test_why_not_on_another_system(folders, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert compiled.load("eager") == "not built: the compiled kernels are for Linux only, and this is darwin"


def test_why_not_after_a_failure(folders):
    (folders[0] / "build.json").write_text('{"error": "no compiler"}')
    assert compiled.load("cpu_avx2") == "not built: no compiler"


def test_why_not_with_another_torch(folders):
    record(folders[0], torch="1.0")
    this = f"built for torch 1.0, and this is {torch.__version__}: run `fasthyper build`"
    assert compiled.load("cpu_avx2") == this


@pytest.mark.parametrize("sources", ["0123456789ab", None])
def test_why_not_with_other_sources(folders, sources):
    record(folders[0], ["cpu_avx2"], sources=sources)
    assert compiled.load("cpu_avx2") == "built from other sources than those that are here: run `fasthyper build`"


def test_why_not_where_one_library_is_missing(folders):
    record(folders[0], missing={"cuda": "the build found no nvcc"})
    assert compiled.load("cuda") == "not built: the build found no nvcc"


def test_why_not_for_another_processor(folders):
    record(folders[1])
    assert compiled.load("cpu_vsx") == "not built: there is no cpu_vsx; run `fasthyper build`"


def test_why_not_with_a_broken_library(folders):
    record(folders[0], ["cpu_avx2"])
    (folders[0] / "cpu_avx2.so").write_bytes(b"not a library")
    assert "cannot be loaded" in compiled.load("cpu_avx2")


DAMAGED = ["", "{", "[]", "null", "3", '"text"', "{}", '{"torch": 3}', '{"torch": "2", "missing": []}', '{"error": {}}']


@pytest.mark.parametrize("content", [*(text.encode() for text in DAMAGED), b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize("at", [0, 1])
def test_a_damaged_record(folders, content, at):
    path = folders[at] / "build.json"
    path.write_bytes(content)
    why = compiled.load("cpu_avx2")
    assert why.startswith(f"not built: {path} is damaged (")
    assert why.endswith("; run `fasthyper build`")


def test_a_record_that_is_a_folder(folders):
    (folders[0] / "build.json").mkdir()
    assert "build.json cannot be read" in compiled.load("cpu_avx2")


def test_the_package_comes_before_the_cache_where_it_has_the_library(folders, loaded):
    record(folders[0], ["eager"], missing={"cpu_avx2": "FASTHYPER_ONLY does not name it"})
    record(folders[1], ["eager", "cpu_avx2"])
    assert compiled.load("eager") is None
    assert compiled.load("cpu_avx2") is None
    assert loaded == [str(folders[0] / "eager.so"), str(folders[1] / "cpu_avx2.so")]


@pytest.mark.parametrize("content", [{"torch": "1.0"}, {"error": "the build found no torch"}])
def test_the_cache_serves_where_the_package_has_nothing_for_this_torch(folders, loaded, content):
    record(folders[0], ["eager"], **content)
    record(folders[1], ["eager"])
    assert compiled.load("eager") is None
    assert loaded == [str(folders[1] / "eager.so")]


def test_a_named_folder_is_the_only_one(folders, loaded, monkeypatch, tmp_path):
    record(folders[0], ["eager"])
    monkeypatch.setenv("FASTHYPER_COMPILED", str(tmp_path / "other"))
    assert compiled.load("eager") == "not built: run `fasthyper build`"
    assert loaded == []


@pytest.mark.parametrize("mode", [0o775, 0o757])
@pytest.mark.parametrize("what", ["kernels", "folder", "library"])
def test_what_others_may_write_to_is_not_loaded(folders, loaded, what, mode):
    record(folders[1], ["eager"])
    path = {"kernels": folders[1].parent, "folder": folders[1], "library": folders[1] / "eager.so"}[what]
    path.chmod(mode)
    assert compiled.load("eager") == f"built, but not loaded: others may write to {path}; run chmod go-w on it"
    assert loaded == []


def test_what_belongs_to_another_user_is_not_loaded(folders, loaded, monkeypatch):
    record(folders[1], ["eager"])
    owner = os.stat
    other = lambda path: os.stat_result((*owner(path)[:4], 4242, *owner(path)[5:10]))
    monkeypatch.setattr(type(folders[1]), "stat", lambda path, **_: other(path))
    assert f"belongs to user 4242, and this is {os.getuid()}" in compiled.load("eager")
    assert loaded == []


def test_the_folder_of_the_cache_depends_on_versions_and_sources(monkeypatch, tmp_path):
    before = compiled.cached()
    assert torch.__version__ in before.name
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "1.0")
        assert compiled.cached() != before
    (tmp_path / "new.h").touch()
    monkeypatch.setattr(building, "CSRC", tmp_path)
    building.digest.cache_clear()
    assert compiled.cached() != before
    building.digest.cache_clear()


def test_the_cache_follows_the_environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of")
    for given, folder in (
        ({"FASTHYPER_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/fasthyper"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/of/.cache/fasthyper"),
        ({}, "/home/of/.cache/fasthyper"),
    ):
        for name in ("FASTHYPER_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.setenv(name, given.get(name, ""))
        assert str(compiled.cache()) == folder


class TestWarning:
    """A run without kernels says so once."""

    @pytest.fixture(autouse=True)
    def no_kernels(self, monkeypatch):
        monkeypatch.setattr(compiled, "_warned", False)
        monkeypatch.setattr(cpu, "unavailable", lambda: "not built: no compiler")
        monkeypatch.setattr(building, "unsupported", lambda name: None)
        monkeypatch.delenv("FASTHYPER_NO_WARNING", raising=False)

    @staticmethod
    def call(dtype=torch.float32, device="cpu"):
        """Run a call that no library takes before Python sees it; return the warnings."""
        x, z = (torch.randn(2, n, dtype=dtype, device=device) for n in (3, 4))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fasthyper.ops.apply(x[:, None], z, torch.randn(5, 3, 4, dtype=dtype, device=device))
        return [str(warning.message) for warning in caught if warning.category is RuntimeWarning]

    def test_once_with_the_command(self):
        (message,) = self.call()
        assert "`fasthyper build`" in message
        assert "not built: no compiler" in message
        assert "FASTHYPER_NO_WARNING=1" in message
        assert self.call() == []

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_in_16_bits(self, dtype):
        assert len(self.call(dtype)) == 1

    def test_not_where_the_kernels_would_not_run(self):
        assert self.call(torch.float64) == []
        assert self.call(device="meta") == []
        with fasthyper.use_backend("aten"):
            assert self.call() == []
        assert len(self.call()) == 1

    def test_not_on_other_systems(self, monkeypatch):
        monkeypatch.setattr(building, "unsupported", lambda name: "the compiled kernels are for Linux only")
        assert self.call() == []

    def test_not_if_the_variable_is_set(self, monkeypatch):
        monkeypatch.setenv("FASTHYPER_NO_WARNING", "1")
        assert self.call() == []

    def test_as_an_error_it_is_raised_once(self):
        x, z, weight = torch.randn(2, 1, 3), torch.randn(2, 4), torch.randn(5, 3, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(RuntimeWarning, match="fasthyper build"):
                fasthyper.ops.apply(x, z, weight)
            fasthyper.ops.apply(x, z, weight)

    def test_in_compiled_code_without_a_graph_break(self):
        layer = torch.compile(fasthyper.HyperLinear(3, 5, 4), fullgraph=True, backend="aot_eager")
        with pytest.warns(RuntimeWarning, match="fasthyper build"):
            layer(torch.randn(2, 3), torch.randn(2, 4)).sum().backward()


def test_importing_says_nothing(tmp_path):
    env = {**os.environ, "FASTHYPER_COMPILED": str(tmp_path)}
    code = "import warnings; warnings.simplefilter('ignore'); import torch; warnings.simplefilter('error')\n"
    code += "import fasthyper; fasthyper.HyperLinear(3, 5, 4)"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
