// All sizes that depend on the processor or on the layouts of its instructions, and functions that round up to them.
// Buffers and tails in this folder are computed from these names, never from literal numbers.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

namespace fasthyper {

using c10::BFloat16;
using c10::Half;

// Floats in a vector register. The compiler lowers its vector types to any instruction set, so a build for tests may
// take a width that the processor does not have.
#if defined(FASTHYPER_WIDTH)
constexpr int64_t WIDTH = FASTHYPER_WIDTH;
#elif defined(__AVX512F__)
constexpr int64_t WIDTH = 16;
#elif defined(__AVX2__)
constexpr int64_t WIDTH = 8;
#else
constexpr int64_t WIDTH = 4;
#endif

constexpr int64_t LANES = 32;  // rows (b, n) in a block, side by side
constexpr int64_t SQUARE = 8;  // rows and columns that `transpose` moves at a time
constexpr int64_t LINE = 16;   // floats in a cache line

static_assert(LANES % WIDTH == 0 && LANES % SQUARE == 0 && (WIDTH & (WIDTH - 1)) == 0);

// A register of floats, of the compiler's own vector type: one source compiles for every instruction set.
typedef float Vec __attribute__((vector_size(WIDTH * sizeof(float))));
typedef float Vec8 __attribute__((vector_size(SQUARE * sizeof(float))));

// An operand of one product must span fewer bytes: oneDNN's instructions address them with signed 32-bit offsets. A
// build for tests sets a smaller limit, which small operands exceed.
#if defined(FASTHYPER_REACH)
constexpr int64_t REACH = FASTHYPER_REACH;
#else
constexpr int64_t REACH = int64_t(1) << 31;
#endif

// The least number of multiplications for which a thread is started.
#if !defined(FASTHYPER_THREAD_WORK)
#define FASTHYPER_THREAD_WORK (1 << 19)
#endif
constexpr int64_t THREAD_WORK = FASTHYPER_THREAD_WORK;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t n, int64_t step) { return ceil_div(n, step) * step; }

constexpr int64_t whole_registers(int64_t n) { return round_up(n, WIDTH); }
constexpr int64_t whole_lanes(int64_t n) { return round_up(n, LANES); }
constexpr int64_t whole_squares(int64_t n) { return round_up(n, SQUARE); }

// A tile size, a multiple of `step`. A build for tests divides all tile sizes, so that small problems have many tiles.
#if !defined(FASTHYPER_TILE_DIVISOR)
#define FASTHYPER_TILE_DIVISOR 1
#endif
constexpr int64_t tile_size(int64_t size, int64_t step = 1) { return round_up(size / FASTHYPER_TILE_DIVISOR, step); }

// k of a product advances in steps of this many numbers: matrix units read 16-bit numbers in pairs.
template <class T>
constexpr int64_t K_STEP = sizeof(float) / sizeof(T);

template <class T>
constexpr int64_t round_k(int64_t k) {
  return round_up(k, K_STEP<T>);
}

// The number of floats that take as much memory as `numbers` numbers of T, rounded up.
template <class T>
constexpr int64_t floats_for(int64_t numbers) {
  return ceil_div(numbers, K_STEP<T>);
}

// The distance between packed rows of k numbers: an odd number of cache lines of floats, so that rows do not evict each
// other from the cache.
constexpr int64_t packed_ld(int64_t k) { return round_up(k, LINE) | LINE; }

// Numbers from the first of the first row to the last of the last row.
constexpr int64_t extent(int64_t rows, int64_t ld, int64_t columns) { return rows > 0 ? (rows - 1) * ld + columns : 0; }

}  // namespace fasthyper
