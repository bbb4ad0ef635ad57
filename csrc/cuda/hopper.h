// What the kernels for sm_90a share: their pipeline, stores of pairs, and the range of float16.
#pragma once
#include <cmath>
#include <cstdint>

#include "hopper_instructions.h"
#include "numbers.h"

namespace fasthyper {

// Stages that a producer fills and consumers empty, round and round. A warp of consumers releases a stage for itself:
// it may read ahead of, or behind, the others of its warpgroup.
template <int STAGES>
struct Pipeline {
  Mbarrier *full, *empty;
  int stage = 0, parity = 0;

  DEVICE explicit Pipeline(Mbarrier* mbarriers) : full(mbarriers), empty(mbarriers + STAGES) {}
  static constexpr int BYTES = 2 * STAGES * sizeof(Mbarrier);

  // By one thread, before all of the block go on from a sync.
  DEVICE void init(int producers, int consumers) {
    for (int s = 0; s < STAGES; ++s) {
      mbarrier_init(full + s, producers);
      mbarrier_init(empty + s, consumers);
    }
    fence_mbarrier_init();
  }
  DEVICE void producer_acquire() const { mbarrier_wait(empty + stage, parity ^ 1); }
  DEVICE void consumer_wait() const { mbarrier_wait(full + stage, parity); }
  // Consumers: what came before the current stage is free.
  DEVICE void consumer_release_previous() const { mbarrier_arrive(empty + (stage == 0 ? STAGES : stage) - 1); }
  DEVICE void consumer_release() const { mbarrier_arrive(empty + stage); }
  DEVICE void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// Two numbers side by side, at an address that allows it.
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

// The exponent of a power of two that keeps u times it, and products of that with v, in the range of float16: of their
// largest absolute values u comes to 2^14 at most, a product to 2^15.
DEVICE int range_exponent(float max_u, float max_v) {
  if (!(max_u > 0.f)) return 0;
  const float top_v = ceilf(log2f(max_v)), top_u = ceilf(log2f(max_u));
  return static_cast<int>(fminf(15.f - top_v, 14.f) - top_u);
}
DEVICE float power_of_two(int exponent) { return as_float(static_cast<uint32_t>(exponent + 127) << 23); }
// The larger of most and |t|, of what is finite: the rest spoils its own results and nobody else's.
DEVICE float finite_max(float max, float t) {
  const float magnitude = fabsf(t);
  return magnitude < INFINITY && magnitude > max ? magnitude : max;
}

}  // namespace fasthyper
