// Every size that follows from the processor, or from how its instructions want operands laid out, and what is derived
// from them. Buffers, round-ups and tails of this folder are made of these names; none is written as a number
// elsewhere.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

namespace fasthyper {

using c10::BFloat16;
using c10::Half;

// Floats of a vector register. The compiler lowers its vector types to any instruction set, so a build for tests takes
// the width of a processor that is not there.
#if defined(FASTHYPER_WIDTH)
constexpr int64_t WIDTH = FASTHYPER_WIDTH;
#elif defined(__AVX512F__)
constexpr int64_t WIDTH = 16;
#elif defined(__AVX2__)
constexpr int64_t WIDTH = 8;
#else
constexpr int64_t WIDTH = 4;
#endif

constexpr int64_t LANES = 32;  // rows of a block, side by side
constexpr int64_t SQUARE = 8;  // rows and columns that `transpose` turns at a time
constexpr int64_t LINE = 16;   // floats of a cache line

// Bytes from which on a product's operand reaches too far: oneDNN's instructions count them in 32 bits, with a sign. A
// build for tests takes fewer, so that small operands do.
#if defined(FASTHYPER_REACH)
constexpr int64_t REACH = FASTHYPER_REACH;
#else
constexpr int64_t REACH = int64_t(1) << 31;
#endif

// A size of a tile, of which a build for tests takes a part, so that small problems have many tiles; a whole number of
// `step`.
#if !defined(FASTHYPER_TILES)
#define FASTHYPER_TILES 1
#endif
constexpr int64_t tile_of(int64_t numbers, int64_t step = 1) {
  return (numbers / FASTHYPER_TILES + step - 1) / step * step;
}

// Multiplications that are worth a thread.
#if !defined(FASTHYPER_WORTH)
#define FASTHYPER_WORTH (1 << 19)
#endif
constexpr int64_t WORTH = FASTHYPER_WORTH;

static_assert(LANES % WIDTH == 0 && LANES % SQUARE == 0 && (WIDTH & (WIDTH - 1)) == 0);

// A register of floats; the compiler's own vector type, so that the same lines serve every instruction set.
typedef float Vec __attribute__((vector_size(WIDTH * sizeof(float))));
typedef float Vec8 __attribute__((vector_size(SQUARE * sizeof(float))));

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t n, int64_t step) { return ceil_div(n, step) * step; }

constexpr int64_t whole_registers(int64_t n) { return round_up(n, WIDTH); }
constexpr int64_t whole_lanes(int64_t n) { return round_up(n, LANES); }
constexpr int64_t whole_squares(int64_t n) { return round_up(n, SQUARE); }

// k of a product goes in steps of this many: matrix units read 16-bit numbers in pairs.
template <class T>
constexpr int64_t K_STEP = sizeof(float) / sizeof(T);

template <class T>
constexpr int64_t round_k(int64_t k) {
  return round_up(k, K_STEP<T>);
}

// Rows of a right operand (k, n): of n floats, or of n pairs of 16-bit numbers, out[k / 2][n][k % 2].
template <class T>
constexpr int64_t k_rows(int64_t k) {
  return ceil_div(k, K_STEP<T>);
}

// The distance of packed rows of k numbers: an odd number of lines of floats, so that rows do not evict each other from
// the cache.
constexpr int64_t packed_ld(int64_t k) { return round_up(k, LINE) | LINE; }

// Numbers from the first of the first row to the last of the last.
constexpr int64_t extent(int64_t rows, int64_t ld, int64_t columns) { return rows > 0 ? (rows - 1) * ld + columns : 0; }

}  // namespace fasthyper
