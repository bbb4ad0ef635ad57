// The matrix product of oneDNN's just-in-time kernels, behind at::native::cpublas::brgemm:
//
//   C[m,n] (+)= Σ_k A[m,k] B[k,n]      A, C row-major; accumulated in float32
//
// It runs near the machine's peak if B is narrow and contiguous, whatever the row stride of A. So H, which is large, is
// the left operand A and is read in place; the right operand B is built on the fly.
#pragma once

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>

#include "pack.h"
#include "scratch.h"

namespace fasthyper {

// One product of oneDNN. A build for tests has plain loops instead: sanitizers see all of their accesses, and
// they multiply 16-bit operands on any processor.
template <class T>
inline void product(
    int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc,
    bool add) {
#if defined(FASTHYPER_PLAIN_PRODUCTS)
  constexpr int64_t step = K_STEP<T>;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      float sum = 0.f;  // C is added at the end, as oneDNN does
      for (int64_t l = 0; l < k; ++l)
        sum += float(a[i * lda + l]) * float(b[l / step * step * ldb + j * step + l % step]);
      c[i * ldc + j] = add ? c[i * ldc + j] + sum : sum;
    }
#else
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, !std::is_same_v<T, float>);
#endif
}

// The number of rows of T, `ld` apart, that one product can address; at least one.
template <class T>
inline int64_t rows_in_reach(int64_t ld) {
  return std::max<int64_t>(1, (REACH - 1) / int64_t(sizeof(T)) / std::max<int64_t>(1, ld));
}

// C (+)= A B. A product whose operands span too many bytes is split into groups of rows of A and C, and of rows of B.
// The row stride of an operand with one row does not matter.
template <class T>
inline void gemm(
    int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc,
    bool add) {
  constexpr int64_t step = K_STEP<T>;
  k = round_k<T>(k);
  if (m == 1) lda = k, ldc = n;
  if (k == step) ldb = n;
  const int64_t ms = std::min(rows_in_reach<T>(lda), rows_in_reach<float>(ldc)), ks = step * rows_in_reach<float>(ldb);
  if (m <= ms && k <= ks) return product(m, n, k, a, lda, b, ldb, c, ldc, add);
  for (int64_t l = 0; l < k; l += ks)
    for (int64_t i = 0; i < m; i += ms)
      gemm(
          std::min(ms, m - i), n, std::min(ks, k - l), a + i * lda + l, lda, b + l * ldb, ldb, c + i * ldc, ldc,
          add || l > 0);
}

// Releases the thread's matrix unit (AMX tiles), which 16-bit products occupy.
template <class T>
inline void release_matrix_unit() {
#if !defined(FASTHYPER_PLAIN_PRODUCTS)
  if constexpr (!std::is_same_v<T, float>) at::native::cpublas::brgemm_release();
#endif
}

// Whether oneDNN multiplies bfloat16 here: it needs AVX-512, and an environment variable may limit it.
inline bool try_bfloat16() {
  alignas(64) BFloat16 a[2 * LINE] = {}, b[2 * LINE] = {};
  float c[LINE];
  try {
    product<BFloat16>(1, LINE, 2, a, 2, b, LINE, c, LINE, false);
  } catch (const std::exception&) {
    return false;
  }
  release_matrix_unit<BFloat16>();
  return true;
}

inline bool multiplies_bfloat16() {
#if defined(FASTHYPER_PLAIN_PRODUCTS)
  return true;
#endif
  if (!at::globalContext().userEnabledMkldnn()) return false;
  static const bool can = try_bfloat16();
  return can;
}

}  // namespace fasthyper
