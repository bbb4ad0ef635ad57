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

#include "pack.h"
#include "scratch.h"

namespace fasthyper {

// One product of the library's, or in a build for tests its definition: sanitizers see every access of that, it serves
// 16-bit operands on any processor, and vectors of any width.
template <class T>
inline void product(
    int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc,
    bool add) {
#if defined(FASTHYPER_PLAIN_PRODUCTS)
  constexpr int64_t step = K_STEP<T>;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      float sum = 0.f;  // what is there is added at the end, as the library does
      for (int64_t l = 0; l < k; ++l)
        sum += float(a[i * lda + l]) * float(b[l / step * step * ldb + j * step + l % step]);
      c[i * ldc + j] = add ? c[i * ldc + j] + sum : sum;
    }
#else
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, !std::is_same_v<T, float>);
#endif
}

// Rows of numbers of T this far apart that one product reaches: at least one, of which the distance is nothing.
template <class T>
inline int64_t reached(int64_t ld) {
  return std::max<int64_t>(1, (REACH - 1) / int64_t(sizeof(T)) / std::max<int64_t>(1, ld));
}

// C (+)= A B. A product that reaches too far is cut: rows of A and C, or those of B, a piece at a time. A single row
// has no next one, however far that would be.
template <class T>
inline void gemm(
    int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc,
    bool add) {
  constexpr int64_t step = K_STEP<T>;
  k = round_k<T>(k);
  if (m == 1) lda = k, ldc = n;
  if (k == step) ldb = n;
  const int64_t ms = std::min(reached<T>(lda), reached<float>(ldc)), ks = step * reached<float>(ldb);
  if (m <= ms && k <= ks) return product(m, n, k, a, lda, b, ldb, c, ldc, add);
  for (int64_t l = 0; l < k; l += ks)
    for (int64_t i = 0; i < m; i += ms)
      gemm(
          std::min(ms, m - i), n, std::min(ks, k - l), a + i * lda + l, lda, b + l * ldb, ldb, c + i * ldc, ldc,
          add || l > 0);
}

// Gives a thread's matrix unit back, where 16-bit products took it.
template <class T>
inline void release() {
#if !defined(FASTHYPER_PLAIN_PRODUCTS)
  if constexpr (!std::is_same_v<T, float>) at::native::cpublas::brgemm_release();
#endif
}

// Whether products of bfloat16 run here: not without AVX-512, nor where oneDNN is held back.
inline bool try_bfloat16() {
  alignas(64) BFloat16 a[2 * LINE] = {}, b[2 * LINE] = {};
  float c[LINE];
  try {
    product<BFloat16>(1, LINE, 2, a, 2, b, LINE, c, LINE, false);
  } catch (const std::exception&) {
    return false;
  }
  release<BFloat16>();
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
