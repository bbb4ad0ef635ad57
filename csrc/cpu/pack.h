// Copying between layouts and dtypes: `pack` converts and transposes any strided matrix,
//
//   dst[i·ld + j] = src[i·s0 + j·s1]
//
// with `convert` for contiguous rows, `transpose` for floats and `interleave` for pairs of 16-bit numbers.
#pragma once

#include <algorithm>
#include <cstring>

#include "sizes.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace fasthyper {

template <class V>
inline V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
inline void store(float* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

// The sum of n numbers.
inline float sum(const float* p, int64_t n) {
  Vec sums[2] = {};
  int64_t k = 0;
  for (; k + 2 * WIDTH <= n; k += 2 * WIDTH)
    for (int v = 0; v < 2; ++v) sums[v] += load<Vec>(p + k + v * WIDTH);
  const Vec both = sums[0] + sums[1];
  float total = 0;
  for (int v = 0; v < WIDTH; ++v) total += both[v];
  for (; k < n; ++k) total += p[k];
  return total;
}

// Copies n contiguous numbers. Rows are short, so a call of memcpy would take longer than the copy.
template <class V>
inline void copy(const V* src, V* dst, int64_t n) {
  constexpr int64_t each = sizeof(Vec) / sizeof(V);
  int64_t i = 0;
  for (; i + each <= n; i += each) std::memcpy(dst + i, src + i, sizeof(Vec));
  for (; i < n; ++i) dst[i] = src[i];
}

// Converts n contiguous numbers; to 16 bits by rounding to nearest even, as torch does.
inline void convert(const float* src, float* dst, int64_t n) { copy(src, dst, n); }

inline void convert(const BFloat16* src, float* dst, int64_t n) {
  const auto* bits = reinterpret_cast<const uint16_t*>(src);
  auto* out = reinterpret_cast<uint32_t*>(dst);
  for (int64_t i = 0; i < n; ++i) out[i] = uint32_t(bits[i]) << 16;
}

inline void convert(const float* src, BFloat16* dst, int64_t n) {
  auto* out = reinterpret_cast<uint16_t*>(dst);
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, src + i, sizeof bits);
    const uint32_t nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out[i] = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : uint16_t(nearest_even);
  }
}

inline void convert(const Half* src, float* dst, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + SQUARE <= n; i += SQUARE)
    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
#endif
  for (; i < n; ++i) dst[i] = src[i];
}

inline void convert(const float* src, Half* dst, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + SQUARE <= n; i += SQUARE)
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(dst + i),
        _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
  for (; i < n; ++i) dst[i] = src[i];
}

inline void convert(const BFloat16* src, BFloat16* dst, int64_t n) { copy(src, dst, n); }

// Two rows of a right operand in the layout of 16-bit products: out[2l] = a[l], out[2l+1] = b[l], or 0 if b is null.
inline void interleave(const float* a, const float* b, BFloat16* out, int64_t n) {
  const auto rounded = [](const float* p) {
    uint32_t bits;
    std::memcpy(&bits, p, sizeof bits);
    const uint32_t nearest_even = bits + 0x7fff + ((bits >> 16) & 1);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : nearest_even;
  };
  auto* pairs = reinterpret_cast<uint32_t*>(out);
  if (b)
    for (int64_t l = 0; l < n; ++l) pairs[l] = (rounded(a + l) >> 16) | (rounded(b + l) & 0xffff0000);
  else
    for (int64_t l = 0; l < n; ++l) pairs[l] = rounded(a + l) >> 16;
}

// The same for rows of 16-bit numbers.
template <class S>
inline void interleave(const S* a, const S* b, S* out, int64_t n) {
  static_assert(sizeof(S) == sizeof(uint16_t));
  const auto *low = reinterpret_cast<const uint16_t*>(a), *high = reinterpret_cast<const uint16_t*>(b);
  auto* pairs = reinterpret_cast<uint32_t*>(out);
  if (b)
    for (int64_t l = 0; l < n; ++l) pairs[l] = uint32_t(low[l]) | uint32_t(high[l]) << 16;
  else
    for (int64_t l = 0; l < n; ++l) pairs[l] = low[l];
}

// dst[j][i] = src[i][j] for SQUARE columns j and `rows` ≤ SQUARE rows i. It writes SQUARE floats of each dst[j].
[[gnu::always_inline]] inline void transpose_square(
    const float* src, int64_t ld_src, float* dst, int64_t ld_dst, int64_t rows) {
  static_assert(SQUARE == 8);  // the shuffles below
  Vec8 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = i < rows ? load<Vec8>(src + i * ld_src) : Vec8{};
  for (int i = 0; i < 8; i += 2) {
    b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int k = 0; k < 2; ++k) {
      a[i + k] = __builtin_shufflevector(b[i + k], b[i + k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      a[i + k + 2] = __builtin_shufflevector(b[i + k], b[i + k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int k = 0; k < 4; ++k) {
    store(dst + k * ld_dst, __builtin_shufflevector(a[k], a[k + 4], 0, 1, 2, 3, 8, 9, 10, 11));
    store(dst + (k + 4) * ld_dst, __builtin_shufflevector(a[k], a[k + 4], 4, 5, 6, 7, 12, 13, 14, 15));
  }
}

// dst[j][i] = src[i][j]. Each row of dst has room for `room` numbers; those beyond `rows` may be overwritten.
inline void transpose(
    const float* src, int64_t ld_src, float* dst, int64_t ld_dst, int64_t rows, int64_t cols, int64_t room) {
  constexpr int64_t AHEAD = 2 * SQUARE;  // rows; processors do not prefetch eight rows at a time by themselves
  for (int64_t i = 0; i < rows; i += SQUARE) {
    const int64_t count = std::min(SQUARE, rows - i);
    int64_t j = 0;
    if (count == SQUARE)
      for (; j + SQUARE <= cols; j += SQUARE) {
        if (j % LINE == 0)
          for (int64_t k = i + AHEAD; k < std::min(rows, i + AHEAD + SQUARE); ++k)
            __builtin_prefetch(src + k * ld_src + j);
        transpose_square(src + i * ld_src + j, ld_src, dst + j * ld_dst + i, ld_dst, SQUARE);
      }
    else if (i + SQUARE <= room)
      for (; j + SQUARE <= cols; j += SQUARE)
        transpose_square(src + i * ld_src + j, ld_src, dst + j * ld_dst + i, ld_dst, count);
    for (; j < cols; ++j)
      for (int64_t k = i; k < i + count; ++k) dst[j * ld_dst + k] = src[k * ld_src + j];
  }
}

// dst[i·ld + j] = src[i·s0 + j·s1] for i < n0 and j < n1, converted. `room` is that of `transpose`; n1 if smaller.
template <class Src, class Dst>
void pack(const Src* src, int64_t s0, int64_t s1, Dst* dst, int64_t ld, int64_t n0, int64_t n1, int64_t room = 0) {
  if (s1 == 1 || n1 == 1) {
    for (int64_t i = 0; i < n0; ++i) convert(src + i * s0, dst + i * ld, n1);
  } else if (s0 == 1 || n0 == 1) {
    if constexpr (std::is_same_v<Src, float> && std::is_same_v<Dst, float>) {
      transpose(src, s1, dst, ld, n1, n0, std::max(room, n1));
    } else if constexpr (std::is_same_v<Src, Dst> || std::is_same_v<Dst, BFloat16>) {
      // Tiles of pairs, transposed like floats: directly into dst if its rows have room for the last pair.
      constexpr int64_t T = LANES;
      float in[T * T], out[T * T];
      const bool direct = ld % 2 == 0 && round_up(n1, 2) <= room;
      for (int64_t j = 0; j < n1; j += 2 * T)
        for (int64_t i = 0; i < n0; i += T) {
          const int64_t rows = std::min(2 * T, n1 - j), cols = std::min(T, n0 - i);
          for (int64_t k = 0; k < rows; k += 2) {
            const Src* const from = src + (j + k) * s1 + i;
            interleave(from, k + 1 < rows ? from + s1 : nullptr, reinterpret_cast<Dst*>(in + k / 2 * T), cols);
          }
          const int64_t pairs = ceil_div(rows, 2);
          if (direct) {
            transpose(in, T, reinterpret_cast<float*>(dst + i * ld + j), ld / 2, pairs, cols, (room - j) / 2);
          } else {
            transpose(in, T, out, T, pairs, cols, T);
            for (int64_t k = 0; k < cols; ++k)
              copy(reinterpret_cast<const Dst*>(out + k * T), dst + (i + k) * ld + j, rows);
          }
        }
    } else {  // tiles of floats
      constexpr int64_t T = LANES;
      float in[T * T], out[T * T];
      for (int64_t j = 0; j < n1; j += T)
        for (int64_t i = 0; i < n0; i += T) {
          const int64_t rows = std::min(T, n1 - j), cols = std::min(T, n0 - i);
          for (int64_t k = 0; k < rows; ++k) convert(src + (j + k) * s1 + i, in + k * T, cols);
          transpose(in, T, out, T, rows, cols, T);
          for (int64_t k = 0; k < cols; ++k) convert(out + k * T, dst + (i + k) * ld + j, rows);
        }
    }
  } else {
    for (int64_t i = 0; i < n0; ++i)
      for (int64_t j = 0; j < n1; ++j) {
        if constexpr (std::is_same_v<Src, Dst>) dst[i * ld + j] = src[i * s0 + j * s1];
        else dst[i * ld + j] = static_cast<Dst>(static_cast<float>(src[i * s0 + j * s1]));
      }
  }
}

}  // namespace fasthyper
