// Instructions of sm_80 and newer in PTX. emulated.h defines the same functions for a CPU.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "device.h"
#include "numbers.h"

namespace fasthyper {

using Stream = cudaStream_t;

DEVICE int thread() { return threadIdx.x; }
DEVICE int cta_x() { return blockIdx.x; }
DEVICE int cta_y() { return blockIdx.y; }
DEVICE int cta_z() { return blockIdx.z; }
DEVICE int grid_x() { return gridDim.x; }

// Return v, and hide its value from the compiler. Otherwise the compiler would hoist expressions of v out of loops and
// keep them in registers.
DEVICE int opaque(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

DEVICE char* smem_base() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

DEVICE uint32_t smem_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

DEVICE void sync_threads() { __syncthreads(); }

DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(~0u, v, mask); }

// Round to TF32, which has ten bits of mantissa.
DEVICE uint32_t to_tf32(float v) {
  uint32_t word;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(v));
  return word;
}

// Multiply the elements of two words.
DEVICE uint32_t mul(uint32_t a, uint32_t b, bfloat16) {
  uint32_t d;  // sm_80 has no bfloat16 mul; fma of a·b - 0 rounds in the same way
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
  return d;
}
DEVICE uint32_t mul(uint32_t a, uint32_t b, float) { return __float_as_uint(__uint_as_float(a) * __uint_as_float(b)); }

// Copy BYTES (4, 8 or 16, with that alignment) asynchronously from global to shared memory: `valid` bytes, then zeros.
template <int BYTES>
DEVICE void cp_async(void* to, const void* from, int valid) {
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(to)), "l"(from), "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(smem_address(to)), "l"(from), "n"(BYTES),
                 "r"(valid)
                 : "memory");
}
DEVICE void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int IN_FLIGHT>
DEVICE void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(IN_FLIGHT) : "memory");
}

// Load four matrices of 8 rows of 16 bytes. Lane l passes the address of row l % 8 of matrix l / 8, and receives word
// l % 4 of row l / 4 of each matrix; transposed, the 16-bit elements (2·(l % 4), l / 4) and (2·(l % 4) + 1, l / 4).
DEVICE void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(row))
               : "memory");
}
DEVICE void ldmatrix_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(row))
               : "memory");
}

// d += a·b, with a of 16 rows and b of 8 columns, over one k-step. The last argument is the dtype of a and b; float is
// TF32.
DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Set a kernel's shared memory limit to the maximum of a CTA, once per device. A lower limit, set later, could make a
// launch of another thread fail.
inline void allow_max_smem(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> done;
  int device = 0, most = 0;
  check(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  if (done.count({kernel, device})) return;
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  done.insert({kernel, device});
}

// Launch a kernel on a stream of the current device.
template <class... Parameters, class... Arguments>
void launch(
    void (*kernel)(Parameters...), Grid grid, int threads, int smem_bytes, Stream stream, const Arguments&... given) {
  if (smem_bytes > 48 << 10) allow_max_smem(reinterpret_cast<const void*>(kernel));
  std::tuple<Parameters...> arguments{given...};
  std::apply(
      [&](auto&... each) {
        void* pointers[] = {&each...};
        check(cudaLaunchKernel(
            reinterpret_cast<const void*>(kernel), dim3(grid.x, grid.y, grid.z), dim3(threads), pointers, smem_bytes,
            stream));
      },
      arguments);
}

}  // namespace fasthyper
