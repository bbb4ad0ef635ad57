// The three dtypes, and 32-bit words of one or two elements: the registers that mma reads.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#include "device.h"

namespace fasthyper {

using bfloat16 = torch::headeronly::BFloat16;
using float16 = torch::headeronly::Half;

// Elements in a 32-bit word.
template <class T>
constexpr int per_word = 4 / sizeof(T);

// One k-step, an mma instruction, reads 32 bytes of a row: 16 or 8 elements. A row of a tile holds four k-steps.
template <class T>
constexpr int per_step = 8 * per_word<T>;
constexpr int STEPS = 4, ROW_BYTES = 32 * STEPS;
template <class T>
constexpr int per_row = STEPS * per_step<T>;

INLINE int cdiv(int a, int b) { return (a + b - 1) / b; }
INLINE int least(int a, int b) { return a < b ? a : b; }

INLINE uint32_t as_uint(float v) {
  uint32_t word;
  memcpy(&word, &v, 4);
  return word;
}

INLINE float as_float(uint32_t word) {
  float v;
  memcpy(&v, &word, 4);
  return v;
}

// Read the element in the low (0) or high (1) half of a word; pack two elements into a word.
INLINE float unpack(uint32_t word, int high, bfloat16) { return as_float(high ? word & 0xffff0000u : word << 16); }
INLINE float unpack(uint32_t word, int high, float16) {
  return static_cast<float>(float16(static_cast<uint16_t>(high ? word >> 16 : word & 0xffff), float16::from_bits()));
}

template <class T>
INLINE uint32_t pack(T low, T high) {
  static_assert(sizeof(T) == 2);
  return static_cast<uint32_t>(low.x) | static_cast<uint32_t>(high.x) << 16;
}

INLINE uint32_t replicate(bfloat16 v) { return pack(v, v); }
INLINE uint32_t replicate(float16 v) { return pack(v, v); }
INLINE uint32_t replicate(float v) { return as_uint(v); }

}  // namespace fasthyper
