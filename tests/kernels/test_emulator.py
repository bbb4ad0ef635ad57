"""The emulator, which tests the CUDA kernels without a GPU: it runs correct kernels, and reports faulty ones."""

from __future__ import annotations

import pytest
import torch
from emulated_toys import NEEDS, run_toy

pytestmark = NEEDS

# Each kernel has 64 threads and gets 64 numbers; main prints a weighted sum of its results, or its error.
SOURCE = r"""
#include <cstdio>
#include "instructions.h"

namespace fasthyper {

static float* numbers() { return reinterpret_cast<float*>(smem_base()); }

KERNEL(64, 1) neighbours(float* out, float* in) {
  numbers()[thread()] = in[thread()];
  sync_threads();
  out[thread()] = numbers()[(thread() + 1) % 64];
}
KERNEL(64, 1) without_barrier(float* out, float* in) {
  numbers()[thread()] = in[thread()];
  out[thread()] = numbers()[(thread() + 1) % 64];
}
KERNEL(64, 1) copied(float* out, float* in) {
  cp_async<4>(numbers() + thread(), in + thread(), thread() == 63 ? 0 : 4);
  cp_async_commit_group();
  cp_async_wait_group<0>();
  sync_threads();
  out[thread()] = numbers()[63 - thread()];
}
KERNEL(64, 1) copied_and_not_waited_for(float* out, float* in) {
  cp_async<4>(numbers() + thread(), in + thread(), 4);
  cp_async_commit_group();
  cp_async_wait_group<1>();
  sync_threads();
  out[thread()] = numbers()[63 - thread()];
}
KERNEL(64, 1) misaligned(float*, float* in) { cp_async<16>(numbers() + 4 * thread(), in + thread(), 16); }
KERNEL(64, 1) outside(float*, float* in) { cp_async<4>(numbers() + 4096 + thread(), in + thread(), 4); }
KERNEL(64, 1) deadlock(float* out, float*) {
  if (thread() != 7) sync_threads();
  out[thread()] = 1.f;
}
KERNEL(64, 1) diverged(float* out, float* in) {
  if (thread() % 2)
    out[thread()] = shuffle_xor(in[thread()], 1);
  else
    sync_threads();
}
KERNEL(64, 1) exchanged(float* out, float* in) { out[thread()] = shuffle_xor(in[thread()], 5); }

static void show(const char* name, void (*kernel)(float*, float*)) {
  alignas(16) float in[256], out[64];
  for (int k = 0; k < 256; ++k) in[k] = k;
  try {
    for (int turn = 0; turn < 8; ++turn) {
      for (float& v : out) v = -1.f;
      launch(kernel, Grid{1}, 64, 4096, Stream{}, static_cast<float*>(out), static_cast<float*>(in));
      float sum = 0.f;
      for (int k = 0; k < 64; ++k) sum += out[k] * (k + 1);
      std::printf("%s: %g\n", name, sum);
    }
  } catch (const std::exception& error) {
    std::printf("%s: %s\n", name, error.what());
  }
}
#define SHOW(kernel) show(#kernel, &kernel)

static void show_all() {
  SHOW(neighbours), SHOW(without_barrier), SHOW(copied), SHOW(copied_and_not_waited_for), SHOW(misaligned);
  SHOW(outside), SHOW(deadlock), SHOW(diverged), SHOW(exchanged);
}

}  // namespace fasthyper

int main() { fasthyper::show_all(); }
"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> dict[str, set[str]]:
    """Return the lines that each kernel printed."""
    return run_toy(tmp_path_factory.mktemp("emulator"), SOURCE)


def weighted(numbers) -> set[str]:
    return {f"{(torch.tensor(numbers, dtype=torch.float64) * torch.arange(1, 65)).sum().item():g}"}


def test_what_is_right_runs(shown):
    assert shown["neighbours"] == weighted([(k + 1) % 64 for k in range(64)])
    assert shown["copied"] == weighted([0, *range(62, -1, -1)])
    assert shown["exchanged"] == weighted([k ^ 5 for k in range(64)])


@pytest.mark.parametrize("kernel", ["without_barrier", "copied_and_not_waited_for"])
def test_a_race_gives_no_numbers(shown, kernel):
    assert shown[kernel] <= {"nan", "-nan"}


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("misaligned", "a copy from a misaligned address"),
        ("outside", "an address outside of shared memory"),
        ("deadlock", "deadlock: a thread waits for the CTA's barrier"),
        ("diverged", "deadlock"),
    ],
)
def test_a_fault_is_an_error(shown, kernel, message):
    assert len(shown[kernel]) == 1
    assert message in next(iter(shown[kernel]))
