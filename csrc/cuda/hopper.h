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
struct Ring {
  Barrier *full, *empty;
  int stage = 0, parity = 0;

  DEVICE explicit Ring(Barrier* barriers) : full(barriers), empty(barriers + STAGES) {}
  static constexpr int BYTES = 2 * STAGES * sizeof(Barrier);

  // By one thread, before all of the block go on from a sync.
  DEVICE void init(int producers, int consumers) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(full + s, producers);
      barrier_init(empty + s, consumers);
    }
    barriers_ready();
  }
  DEVICE void wait_empty() const { barrier_wait(empty + stage, parity ^ 1); }
  DEVICE void wait_full() const { barrier_wait(full + stage, parity); }
  // Consumers: what came before the current stage is free.
  DEVICE void release_last() const { barrier_arrive(empty + (stage == 0 ? STAGES : stage) - 1); }
  DEVICE void release() const { barrier_arrive(empty + stage); }
  DEVICE void next() {
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
  *reinterpret_cast<uint32_t*>(to) = pair(static_cast<T>(low), static_cast<T>(high));
}

// The exponent of a power of two that keeps u times it, and products of that with v, in the range of float16: of their
// largest absolute values u comes to 2^14 at most, a product to 2^15.
DEVICE int into_range(float most_u, float most_v) {
  if (!(most_u > 0.f)) return 0;
  const float top_v = ceilf(log2f(most_v)), top_u = ceilf(log2f(most_u));
  return static_cast<int>(fminf(15.f - top_v, 14.f) - top_u);
}
DEVICE float power_of_two(int exponent) { return number(static_cast<uint32_t>(exponent + 127) << 23); }
// The larger of most and |t|, of what is finite: the rest spoils its own results and nobody else's.
DEVICE float larger(float most, float t) {
  const float size = fabsf(t);
  return size < INFINITY && size > most ? size : most;
}

}  // namespace fasthyper
