"""Choices that depend on the processor, and the environment variables that override them."""

from __future__ import annotations

import pytest
import torch

from fasthyper import info, planner, processor


@pytest.fixture
def setenv(monkeypatch):
    """Return a function that sets an environment variable, and clear the caches that depend on such variables."""
    monkeypatch.delenv("FASTHYPER_CPU", raising=False)
    monkeypatch.delenv("FASTHYPER_BFLOAT16", raising=False)
    clear_caches = (processor.kernels_multiply.cache_clear, planner.forget)
    for clear in clear_caches:
        clear()
    yield monkeypatch.setenv
    monkeypatch.undo()
    for clear in clear_caches:
        clear()


def test_the_kernels_are_for_the_instruction_set_of_torch(setenv):
    assert processor.kernels() == torch.backends.cpu.get_cpu_capability().lower()


def test_kernels_can_be_forced(setenv):
    setenv("FASTHYPER_CPU", "width4")
    assert processor.kernels() == "width4"
    assert "with the kernels for width4" in info.describe()


def test_unknown_kernels_raise(setenv):
    setenv("FASTHYPER_CPU", "avx9")
    with pytest.raises(ValueError, match=r"FASTHYPER_CPU must be one of default, avx2, avx512.*got 'avx9'"):
        processor.kernels()


@pytest.mark.parametrize(("forced", "work"), [("1", torch.bfloat16), ("0", torch.float32)])
def test_products_of_bfloat16_can_be_forced(setenv, forced, work):
    setenv("FASTHYPER_BFLOAT16", forced)
    assert planner.machine("cpu", torch.bfloat16, backend="cpu").work_dtype == work
    assert planner.machine("cpu", torch.float16, backend="cpu").work_dtype == torch.float32


def test_a_wrong_value_for_bfloat16_raises(setenv):
    setenv("FASTHYPER_BFLOAT16", "yes")
    with pytest.raises(ValueError, match="FASTHYPER_BFLOAT16 must be 0 or 1, got 'yes'"):
        processor.kernels_multiply(torch.bfloat16)


def test_no_bfloat16_without_avx512(setenv, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not processor.kernels_multiply(torch.bfloat16)


@pytest.mark.parametrize(
    ("fast", "instructions", "amx"),
    [(True, True, False), (True, False, True), (True, False, False), (False, True, True)],
)
def test_bfloat16_needs_instructions_and_onednn(setenv, monkeypatch, fast, instructions, amx):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(processor, "has_fast", lambda dtype: fast)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert processor.kernels_multiply(torch.bfloat16) == (fast and (instructions or amx))
