"""What `make gpu-carry` packs is found: keys for another wheel, the archive, the libraries that stages load."""

from __future__ import annotations

import hashlib
import tarfile
import zipfile
from pathlib import Path

import carry_triton
import pytest
import stages


def _wheel(path: Path, library: bytes, text: str = "same") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(carry_triton.LIBRARY, library)
        archive.writestr("triton/compiler/compiler.py", text)
    return path


@pytest.fixture
def here(tmp_path):
    with zipfile.ZipFile(_wheel(tmp_path / "here.whl", b"ours")) as archive:
        archive.extractall(tmp_path / "here")
    return tmp_path / "here"


def test_a_key_has_the_library_of_the_wheel(tmp_path, here):
    ours, theirs = (hashlib.sha256(data).hexdigest() for data in (b"ours", b"theirs"))
    wheel = _wheel(tmp_path / "there.whl", b"theirs")
    assert carry_triton.key_of(wheel, here, f"3.6.0a-{ours}-b") == f"3.6.0a-{theirs}-b"
    with pytest.raises(ValueError, match="does not have the hash"):
        carry_triton.key_of(wheel, here, "3.6.0a-b")


def test_other_sources_are_refused(tmp_path, here):
    wheel = _wheel(tmp_path / "there.whl", b"theirs", "other")
    with pytest.raises(ValueError, match=r"triton/compiler/compiler.py differs"):
        carry_triton.key_of(wheel, here, hashlib.sha256(b"ours").hexdigest())


def test_what_is_packed_is_unpacked_and_new_kernels_are_counted(tmp_path, monkeypatch):
    for folder, name in (("A", "fold.cubin"), ("B", "launcher.so")):
        (tmp_path / "made" / folder).mkdir(parents=True)
        (tmp_path / "made" / folder / name).write_text("code")
    monkeypatch.setattr(stages, "CARRIED", tmp_path / "carried")
    monkeypatch.setattr(stages, "WORK", tmp_path / "work")
    assert carry_triton.pack(tmp_path / "made", stages.CARRIED / "triton.tar.xz") == 1
    with tarfile.open(stages.CARRIED / "triton.tar.xz") as archive:
        assert archive.getnames() == ["A", "A/fold.cubin"]  # a launcher is for one version of Python
    assert stages._unpack().startswith("1 kernels")
    code = "import os, pathlib; cache = pathlib.Path(os.environ['TRITON_CACHE_DIR']); (cache / 'C').mkdir(); "
    code += "(cache / 'D').mkdir(); (cache / 'C' / 'x.cubin').touch()"
    done = stages.run_stage(stages.Stage("compiles", 20, "tests.txt", (stages.PYTHON, "-c", code)), 20, tmp_path)
    assert (done.kernels, done.launchers) == (1, 1)
    assert "1 kernels, 1 launchers compiled" in done.describe()


def test_stages_load_what_was_built_there_before_what_was_carried(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTHYPER_COMPILED", raising=False)
    monkeypatch.setattr(stages, "CARRIED", tmp_path / "carried")
    monkeypatch.setattr(stages, "WORK", tmp_path / "work")
    assert "FASTHYPER_COMPILED" not in stages._environment()
    for folder in (stages.CARRIED, stages.WORK):
        (folder / "compiled").mkdir(parents=True)
        (folder / "compiled" / "cuda.so").touch()
        assert stages._environment()["FASTHYPER_COMPILED"] == str(folder / "compiled")
    (stages.CARRIED / "commit.txt").write_text("abc\n")
    assert stages._environment()["FASTHYPER_COMMIT"] == "abc"
