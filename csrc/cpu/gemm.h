// The matrix product of the micro-kernel library, and what it wants of its operands.
//
//   C[m,n] (+)= Σ_k A[m,k] B[k,n]      A, C row-major; accumulated in float32
//
// oneDNN's just-in-time kernels behind at::native::cpublas::brgemm. They run near the machine's peak where B is
// narrow and contiguous, whatever the stride of A: so H, which is large, is read where it lies as A, and what is
// built on the fly is B.
#pragma once

#include <ATen/native/CPUBlas.h>

#include "lanes.h"

namespace fasthyper {

// k goes in steps of this many: matrix units read 16-bit numbers in pairs.
template <class T>
constexpr int64_t K_STEP = std::is_same_v<T, float> ? 1 : 2;

template <class T>
constexpr int64_t round_k(int64_t k) {
  return (k + K_STEP<T> - 1) / K_STEP<T> * K_STEP<T>;
}

// The distance of packed rows: whole registers, so that packing need not stop short.
template <class T>
constexpr int64_t packed_ld(int64_t k) {
  return (k + 7) / 8 * 8;
}

inline int64_t round_up(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}

template <class T>
inline void gemm(
    int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, round_k<T>(k), lda, ldb, ldc, add, a, b, c, !std::is_same_v<T, float>);
}

// Two rows of B in the order in which a 16-bit product wants them: out[2l] = a[l], out[2l+1] = b[l].
inline void interleave(const float* a, const float* b, BFloat16* out, int64_t n) {
  const auto rounded = [](const float* p) {
    uint32_t bits;
    std::memcpy(&bits, p, sizeof bits);
    const uint32_t nearest_even = bits + 0x7fff + ((bits >> 16) & 1);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : nearest_even;
  };
  auto* pairs = reinterpret_cast<uint32_t*>(out);
  for (int64_t l = 0; l < n; ++l) pairs[l] = (rounded(a + l) >> 16) | (rounded(b + l) & 0xffff0000);
}

// Rows (k, n) of floats as a right operand in T; `out` holds round_k(k) rows. Floats are one as they stand.
inline const float* right(const float* rows, float*, int64_t, int64_t) {
  return rows;
}

inline const BFloat16* right(const float* rows, BFloat16* out, int64_t k, int64_t n) {
  alignas(64) static constexpr float zero[512] = {};
  for (int64_t i = 0; i < k; i += 2) interleave(rows + i * n, i + 1 < k ? rows + (i + 1) * n : zero, out + i * n, n);
  return out;
}

}  // namespace fasthyper
