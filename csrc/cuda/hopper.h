// Shared by the kernels for sm_90a: the pipeline, paired stores, and scales that keep float16 in range.
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "hopper_instructions.h"
#include "numbers.h"

namespace fasthyper {

// Return the columns of a tile of a matrix with n columns: the fewest of 48, 64, 96 and 128 with the fewest tiles.
inline int columns_for(int n) {
  if (n <= 64) return n <= 48 ? 48 : 64;
  return cdiv(n, 96) == cdiv(n, 128) ? 96 : 128;
}

// CTAs whose operands are the same form clusters of two: each loads one half of an operand for both, so that it passes
// from the L2 cache only once. A CTA without tile fills up the last cluster; at most one in eight may be such.
inline int cluster_for(int tiles) { return tiles % 2 == 0 || tiles >= 7 ? 2 : 1; }

// A circular buffer of stages: a producer fills them, consumer warps read them. Each consumer warp releases a stage by
// itself, because it may be ahead of the other warps of its warpgroup, or behind them.
template <int STAGES>
struct Pipeline {
  Mbarrier *full, *empty;
  int stage = 0, parity = 0;

  DEVICE explicit Pipeline(Mbarrier* mbarriers) : full(mbarriers), empty(mbarriers + STAGES) {}
  static constexpr int BYTES = 2 * STAGES * sizeof(Mbarrier);

  // Called by one thread, before a sync_threads of the CTA.
  DEVICE void init(int producers, int consumers) {
    for (int s = 0; s < STAGES; ++s) {
      mbarrier_init(full + s, producers);
      mbarrier_init(empty + s, consumers);
    }
    fence_mbarrier_init();
  }
  DEVICE void producer_acquire() const { mbarrier_wait(empty + stage, parity ^ 1); }
  DEVICE void consumer_wait() const { mbarrier_wait(full + stage, parity); }
  // Release the stage before the current one.
  DEVICE void consumer_release_previous() const { mbarrier_arrive(empty + (stage == 0 ? STAGES : stage) - 1); }
  DEVICE void consumer_release() const { mbarrier_arrive(empty + stage); }
  // For stages that the producers of a cluster fill: called by all lanes of a warp; one releases a stage at each CTA.
  DEVICE void cluster_release_previous() const { cluster_release((stage == 0 ? STAGES : stage) - 1); }
  DEVICE void cluster_release() const { cluster_release(stage); }
  DEVICE void cluster_release(int s) const {
    if (thread() % 32 < cluster_size()) mbarrier_arrive_at(empty + s, thread() % 32);
  }
  DEVICE void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// Load a box to all CTAs of the cluster.
DEVICE void cluster_load(void* to, const TensorMap& map, int j, int k, int l, Mbarrier* mbarrier) {
  if (cluster_size() == 1) tma_load(to, map, j, k, l, mbarrier);
  else tma_load_multicast(to, map, j, k, l, mbarrier, (1u << cluster_size()) - 1);
}

// Store two adjacent elements, at an address aligned for both.
DEVICE void store_pair(float* to, float low, float high) {
  struct alignas(8) Pair {
    float low, high;
  };
  *reinterpret_cast<Pair*>(to) = {low, high};
}
template <class T>
DEVICE void store_pair(T* to, float low, float high) {
  *reinterpret_cast<uint32_t*>(to) = pack(static_cast<T>(low), static_cast<T>(high));
}

// Return the exponent of a scale of u, given the largest |u| and |v|. It keeps scaled u, at most 2^14, and its products
// with v, at most 2^15, in the range of float16.
DEVICE int range_exponent(float max_u, float max_v) {
  if (!(max_u > 0.f)) return 0;
  const float top_v = ceilf(log2f(max_v)), top_u = ceilf(log2f(max_u));
  return static_cast<int>(fminf(15.f - top_v, 14.f) - top_u);
}
DEVICE float power_of_two(int exponent) { return as_float(static_cast<uint32_t>(exponent + 127) << 23); }
// Return the larger of max and |t|, or max if t is not finite: t then affects only its own results, not the scale.
DEVICE float finite_max(float max, float t) {
  const float magnitude = fabsf(t);
  return magnitude < INFINITY && magnitude > max ? magnitude : max;
}
// Return the largest of a number of each of LANES adjacent lanes.
template <int LANES>
DEVICE float max_of_lanes(float max) {
#pragma unroll
  for (int by = LANES / 2; by > 0; by /= 2) max = fmaxf(max, shuffle_xor(max, by));
  return max;
}
// Whether one factor of generated operands is scaled; by the exponent of its scale.
template <class T>
constexpr bool is_scaled = std::is_same_v<T, float16>;
template <class T>
DEVICE T scaled(T u, int exponent) {
  if constexpr (!is_scaled<T>) return u;
  return static_cast<T>(static_cast<float>(u) * power_of_two(exponent));
}

}  // namespace fasthyper
