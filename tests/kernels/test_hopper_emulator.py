"""The emulator's clusters, for the CUDA kernels for sm_90a: right kernels run, faulty ones are reported."""

from __future__ import annotations

import pytest
from emulated_toys import NEEDS, run_toy

pytestmark = NEEDS

# The two CTAs of a cluster sum the 12 tiles of a tensor, 16 rows of 64 numbers each. Each CTA loads one half of a tile
# for both. The first warp produces, the second consumes; its lane l sums columns l and l + 32. The faults are bits.
SOURCE = r"""
#include <cstdio>
#include "hopper.h"
#include "hopper_instructions.h"
#include "hopper_layouts.h"

namespace fasthyper {

constexpr int TILES = 12, ROWS = 16, STAGES = 2, TILE_BYTES = ROWS * ROW_BYTES, SMEM_BYTES = STAGES * TILE_BYTES + 1024;
enum Fault {
  none = 0, releases_here_only = 1, expects_here_only = 2, no_first_barrier = 4, no_last_barrier = 8,
  half_the_bytes = 16, loads_here_only = 32, wrong_parity = 64
};

KERNEL(64, 1) sum_tiles(float* out, TensorMap map, int faults) {
  Pipeline<STAGES> pipeline(reinterpret_cast<Mbarrier*>(smem_base() + STAGES * TILE_BYTES));
  const int rank = cluster_rank(), lane = thread() % 32, row = rank * ROWS / 2;
  if (thread() == 0) pipeline.init(1, faults & expects_here_only ? 1 : 2);
  if (faults & no_first_barrier) sync_threads();
  else sync_cluster();
  if (thread() == 0) {
    for (int k = 0; k < TILES; ++k) {
      pipeline.producer_acquire();
      Mbarrier* const full = pipeline.full + pipeline.stage;
      mbarrier_arrive_expect_tx(full, faults & half_the_bytes ? TILE_BYTES / 2 : TILE_BYTES);
      char* const to = smem_base() + pipeline.stage * TILE_BYTES + row * ROW_BYTES;
      tma_load_multicast(to, map, 0, 0, k * ROWS + row, full, faults & loads_here_only ? 1 << rank : 3);
      pipeline.advance();
    }
  } else if (thread() >= 32) {
    float sums[2] = {};
    for (int k = 0; k < TILES; ++k) {
      if (faults & wrong_parity && k == TILES - 1) mbarrier_wait(pipeline.full + pipeline.stage, pipeline.parity ^ 1);
      pipeline.consumer_wait();
      for (int r = 0; r < ROWS; ++r)
        for (int h = 0; h < 2; ++h) {
          const int at = (r * ROW_BYTES + (lane + 32 * h) * 2) ^ (r % 8) << 4;
          sums[h] += static_cast<float>(*reinterpret_cast<bfloat16*>(smem_base() + pipeline.stage * TILE_BYTES + at));
        }
      sync_warp();
      if (!(faults & (releases_here_only | expects_here_only))) pipeline.cluster_release();
      else if (lane == 0) pipeline.consumer_release();
      pipeline.advance();
    }
    for (int h = 0; h < 2; ++h) out[cta_x() * 64 + lane + 32 * h] = sums[h];
  }
  if (!(faults & no_last_barrier)) sync_cluster();
}

static void show(const char* name, int faults) {
  static bfloat16 in[TILES * ROWS * 64 + 8];
  bfloat16* const data = reinterpret_cast<bfloat16*>((reinterpret_cast<uintptr_t>(in) + 15) & ~uintptr_t(15));
  for (int k = 0; k < TILES * ROWS * 64; ++k) data[k] = bfloat16(float(k % 64 % 7 + k / 64 % 5));
  const TensorMap map = tensor_map(tma_tensor(data, 64, 1, 0, TILES * ROWS, 64, ROWS / 2));
  for (int turn = 0; turn < 16; ++turn) try {
      float out[256], worst = 0.f;
      launch_sm90a(&sum_tiles, Grid{4}, 2, 64, SMEM_BYTES, Stream{}, static_cast<float*>(out), map, faults);
      for (int k = 0; k < 256; ++k) {
        float expected = 0.f;
        for (int m = 0; m < TILES * ROWS; ++m) expected += static_cast<float>(data[m * 64 + k % 64]);
        const float error = std::fabs(out[k] - expected);
        if (!(error <= worst)) worst = error;
      }
      std::printf("%s: %g\n", name, worst);
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", name, error.what());
    }
}
#define SHOW(fault) show(#fault, fault)

static void show_all() {
  SHOW(none), SHOW(releases_here_only), SHOW(expects_here_only), SHOW(no_first_barrier), SHOW(no_last_barrier);
  SHOW(half_the_bytes), SHOW(loads_here_only), SHOW(wrong_parity);
}

}  // namespace fasthyper

int main() { fasthyper::show_all(); }
"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> dict[str, set[str]]:
    """Return the lines that the kernel printed with each fault, of 16 runs."""
    return run_toy(tmp_path_factory.mktemp("hopper_emulator"), SOURCE)


def test_a_right_kernel_runs(shown):
    assert shown["none"] == {"0"}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("releases_here_only", "deadlock: a thread waits for an mbarrier's phase"),
        ("expects_here_only", "more bytes arrive than an mbarrier expects"),  # the other CTA writes to a stage in use
        ("no_first_barrier", "an mbarrier that was never initialised"),
        ("no_last_barrier", "an access to the shared memory of a CTA that has ended"),
        ("half_the_bytes", "more bytes arrive than an mbarrier expects"),
        ("loads_here_only", "deadlock: a thread waits for an mbarrier's phase"),
        ("wrong_parity", "deadlock: a thread waits for"),
    ],
)
def test_a_fault_is_an_error(shown, fault, message):
    found = shown[fault] - ({"0"} if fault == "no_first_barrier" else set())  # a lucky order of the threads hides it
    assert found
    assert all(message in text for text in found)
