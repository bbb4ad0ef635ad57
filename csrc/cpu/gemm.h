// The matrix product of the micro-kernel library, and what it wants of its operands.
//
//   C[m,n] (+)= Σ_k A[m,k] B[k,n]      A, C row-major; accumulated in float32
//
// oneDNN's just-in-time kernels behind at::native::cpublas::brgemm. They run near the machine's peak where B is
// narrow and contiguous, whatever the stride of A: so H, which is large, is read where it lies as A, and what is
// built on the fly is B.
#pragma once

#include <ATen/Context.h>
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

// The distance of packed rows: an odd number of 16s, so that rows do not evict each other from the cache.
template <class T>
constexpr int64_t packed_ld(int64_t k) {
  return (k + 15) / 16 * 16 | 16;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t round_up(int64_t n, int64_t step) { return ceil_div(n, step) * step; }

#if defined(FASTHYPER_PLAIN_PRODUCTS)

// The definition, for tests: sanitizers see every access, and 16-bit operands work on any machine.
template <class T>
inline void gemm(
    int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc,
    bool add) {
  constexpr int64_t step = K_STEP<T>;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      float sum = add ? c[i * ldc + j] : 0.f;
      for (int64_t l = 0; l < round_k<T>(k); ++l)
        sum += float(a[i * lda + l]) * float(b[l / step * step * ldb + j * step + l % step]);
      c[i * ldc + j] = sum;
    }
}

template <class T>
inline void release() {}

inline bool multiplies_bfloat16() { return true; }

#else

template <class T>
inline void gemm(
    int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc,
    bool add) {
  at::native::cpublas::brgemm(m, n, round_k<T>(k), lda, ldb, ldc, add, a, b, c, !std::is_same_v<T, float>);
}

// Gives a thread's matrix unit back, where 16-bit products took it.
template <class T>
inline void release() {
  if constexpr (!std::is_same_v<T, float>) at::native::cpublas::brgemm_release();
}

// Whether products of bfloat16 run here: not without AVX-512, nor where oneDNN is held back.
inline bool try_bfloat16() {
  alignas(64) BFloat16 a[2 * 16] = {}, b[2 * 16] = {};
  float c[16];
  try {
    gemm<BFloat16>(1, 16, 2, a, 2, b, 16, c, 16, false);
  } catch (const std::exception&) {
    return false;
  }
  release<BFloat16>();
  return true;
}

inline bool multiplies_bfloat16() {
  if (!at::globalContext().userEnabledMkldnn()) return false;
  static const bool can = try_bfloat16();
  return can;
}

#endif

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
inline const float* right(const float* rows, float*, int64_t, int64_t) { return rows; }

inline const BFloat16* right(const float* rows, BFloat16* out, int64_t k, int64_t n) {
  alignas(64) static constexpr float zero[512] = {};
  for (int64_t i = 0; i < k; i += 2) interleave(rows + i * n, i + 1 < k ? rows + (i + 1) * n : zero, out + i * n, n);
  return out;
}

}  // namespace fasthyper
