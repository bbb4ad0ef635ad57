// What sm_90a adds: boxes of a tensor brought by one thread, barriers that count their bytes, and products of a
// warpgroup, four warps, that run while it goes on. Under one set of names, as PTX or emulated.
//
// Shared memory holds operands in rows of 128 bytes whose chunks of 16 are swizzled: bits 4 to 6 of an address are
// XORed with bits 7 to 9, so that eight rows at a multiple of 1024 make a pattern. A box is written so, and a product
// reads so, by descriptors (bits 0-13 the address, 16-29 LBO, 32-45 SBO, all in units of 16 bytes; 62-63 = 1: 128-byte
// swizzle). For 16-bit numbers, of an operand with sides mn (m or n) and k, 16 of k to a product:
//
//     k side by side:   (mn, k) at  mn / 8 · SBO + mn % 8 · 128 + k · 2                         LBO unused
//     mn side by side:  (mn, k) at  mn / 64 · LBO + mn % 64 · 2 + k / 8 · SBO + k % 8 · 128     "transposed"
//
// These are CUTLASS's canonical layouts ((8,m),(T,2)):((8T,SBO),(1,T)) and ((T,8,m),(8,k)):((1,T,LBO),(8T,SBO)) with
// T = 8. The sixteen k of the next product are 32 bytes further in the first, 2048 in the second.
#pragma once
#include "tiles.h"

namespace fasthyper {

constexpr int WARPGROUP = 128, PATTERN = 8 * ROW_BYTES;

// Numbers of 16 bits as a tensor of three axes, the first side by side, and the box of them that is brought at a time.
struct Field {
  const void* base;
  int64_t counts[3], strides[2];  // strides of the second and third axis, in numbers
  int box[3];

  INLINE int box_bytes() const { return box[0] * box[1] * box[2] * 2; }

  // What is against it, or null.
  const char* wrong() const {
    if (reinterpret_cast<uintptr_t>(base) % 16) return "a tensor does not begin at a multiple of 16 bytes";
    for (int axis = 0; axis < 3; ++axis) {
      if (counts[axis] < 1 || counts[axis] > int64_t(1) << 32) return "a tensor's side is empty or too long";
      if (box[axis] < 1 || box[axis] > 256) return "a box has a side of more than 256";
    }
    for (const int64_t stride : strides)
      if (stride < 1 || stride * 2 % 16 || stride * 2 >= int64_t(1) << 40)
        return "a tensor's rows do not begin at multiples of 16 bytes";
    if (box[0] * 2 > ROW_BYTES || box[0] * 2 % 16) return "a box's rows are no 16 to 128 bytes";
    return nullptr;
  }
};

// Descriptors; k16 is the step to the sixteen k of the next product.
INLINE uint64_t descriptor(uint32_t address, int lbo, int sbo) {
  return static_cast<uint64_t>(address >> 4) | static_cast<uint64_t>(lbo >> 4) << 16 |
         static_cast<uint64_t>(sbo >> 4) << 32 | uint64_t(1) << 62;
}
INLINE uint64_t k_rows(uint32_t address) { return descriptor(address, 16, PATTERN); }
INLINE uint64_t mn_rows(uint32_t address, int next_64) { return descriptor(address, next_64, PATTERN); }
constexpr uint64_t K16 = 32 >> 4, K16_TRANSPOSED = 2 * PATTERN >> 4;

}  // namespace fasthyper

#ifdef FASTHYPER_EMULATED
#include "hopper_emulated.h"
#else
#include "hopper_instructions.h"
#endif

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
