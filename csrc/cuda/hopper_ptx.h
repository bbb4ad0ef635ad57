// Instructions of sm_90a in PTX. hopper_emulated.h defines the same functions for a CPU. HOPPER_ONLY makes a kernel a
// trap on any other arch.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "device.h"
#include "hopper_layouts.h"
#include "instructions.h"
#include "numbers.h"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER_ONLY(...) __VA_ARGS__
#else
#define HOPPER_ONLY(...) __trap();
#endif

namespace fasthyper {

DEVICE uint32_t mul(uint32_t a, uint32_t b, float16) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

DEVICE uint32_t shuffle(uint32_t v, int from) { return __shfl_sync(~0u, v, from); }

// An mbarrier has phases. A phase completes when all its arrivals and all its bytes have come. mbarrier_wait with
// parity 0 waits for the first phase, with parity 1 for the second, and so on. On a new mbarrier, parity 1 returns at
// once.
DEVICE void mbarrier_init(Mbarrier* mbarrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(mbarrier)), "r"(arrivals) : "memory");
}
// Make initialised mbarriers visible to TMA. Other threads need sync_threads as well.
DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
DEVICE void mbarrier_arrive(Mbarrier* mbarrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(mbarrier)) : "memory");
}
DEVICE void mbarrier_arrive_expect_tx(Mbarrier* mbarrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(mbarrier)), "r"(bytes)
               : "memory");
}
// Arrive at the mbarrier of a CTA of the cluster, at the same address there. It orders no stores: with the scope of the
// cluster it would, by a fence of the whole GPU. It is for a buffer that this thread has read and the other CTA fills.
DEVICE void mbarrier_arrive_at(Mbarrier* mbarrier, int rank) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(smem_address(mbarrier)),
      "r"(rank)
      : "memory");
}
DEVICE void mbarrier_wait(Mbarrier* mbarrier, int parity) {
  asm volatile(
      "{\n.reg .pred over;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@over bra on;\n bra again;\n on:\n}" ::"r"(smem_address(mbarrier)),
      "r"(parity)
      : "memory");
}

DEVICE void sync_warp() { __syncwarp(); }

// The CTAs of a cluster run together, and may use each other's shared memory until they end.
DEVICE int cluster_size() {
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
DEVICE int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// A barrier of all threads of the cluster; it orders their accesses to shared memory.
DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

using TensorMap = CUtensorMap;

inline TensorMap tensor_map(const TmaTensor& tensor) {
  TensorMap map{};
  if (tensor.data == nullptr) return map;
  if (const char* why = tensor.unsupported()) throw std::runtime_error(why);
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("this driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  cuuint64_t dims[3], strides[2];
  cuuint32_t box[3], element_strides[3] = {1, 1, 1};
  for (int axis = 0; axis < 3; ++axis) dims[axis] = tensor.dims[axis], box[axis] = tensor.box[axis];
  for (int axis = 0; axis < 2; ++axis) strides[axis] = tensor.strides[axis] * 2;
  const CUresult result = encode(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(tensor.data), dims, strides, box, element_strides,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(result));
  return map;
}

DEVICE void prefetch_tensormap(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}

// Load the box that begins at (j, k, l); one thread issues it. Elements out of bounds are zeros, and the mbarrier
// counts the bytes of the whole box.
DEVICE void tma_load(void* to, const TensorMap& map, int j, int k, int l, Mbarrier* mbarrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(smem_address(to)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(j), "r"(k), "r"(l), "r"(smem_address(mbarrier))
      : "memory");
}

// Load the box to the same address of several CTAs of the cluster, given as bits. The mbarrier at the same address in
// each of them counts the bytes.
DEVICE void tma_load_multicast(
    void* to, const TensorMap& map, int j, int k, int l, Mbarrier* mbarrier, unsigned ranks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3, %4}], [%5], %6;" ::"r"(smem_address(to)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(j), "r"(k), "r"(l), "r"(smem_address(mbarrier)),
      "h"(static_cast<uint16_t>(ranks))
      : "memory");
}

// Registers per thread of a warpgroup: consumers take the registers that the producer releases.
template <int REGISTERS>
DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// wgmma runs asynchronously, in groups: wgmma_fence, wgmma, wgmma_commit_group. After wgmma_wait_group the accumulators
// are valid, and the operands may be overwritten. fence_accumulator keeps the compiler from moving reads of the
// accumulator before the wait.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int IN_FLIGHT>
DEVICE void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(IN_FLIGHT) : "memory");
}
template <int COUNT>
DEVICE void fence_accumulator(float (&d)[COUNT]) {
#pragma unroll
  for (int k = 0; k < COUNT; ++k) asm volatile("" : "+f"(d[k])::"memory");
}

// With a in registers: d (64 by N) += a (64 by 16)·b (16 by N). With both operands in shared memory: d = or += a·b.
// Element 4·j + e of a thread's accumulator has row 16·warp + lane/4 + 8·(e/2) and column 8·j + 2·(lane%4) + e%2. A
// warp holds 16 rows of a, as fragments of `mma`.
#define NAMES_10(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define NAMES_24 NAMES_10() NAMES_10(1) "%20,%21,%22,%23"
#define NAMES_32 NAMES_10() NAMES_10(1) NAMES_10(2) "%30,%31"
#define NAMES_48 NAMES_10() NAMES_10(1) NAMES_10(2) NAMES_10(3) "%40,%41,%42,%43,%44,%45,%46,%47"
#define NAMES_64 NAMES_10() NAMES_10(1) NAMES_10(2) NAMES_10(3) NAMES_10(4) NAMES_10(5) "%60,%61,%62,%63"
#define ACC_4(k) "+f"(d[k]), "+f"(d[k + 1]), "+f"(d[k + 2]), "+f"(d[k + 3])
#define ACC_16(k) ACC_4(k), ACC_4(k + 4), ACC_4(k + 8), ACC_4(k + 12)
#define ACC_24 ACC_16(0), ACC_4(16), ACC_4(20)
#define ACC_32 ACC_16(0), ACC_16(16)
#define ACC_48 ACC_32, ACC_16(32)
#define ACC_64 ACC_32, ACC_16(32), ACC_16(48)
#define WGMMA(N, T, TYPE, COUNT, i0, i1, i2, i3, i4, i5)                                                    \
  template <bool B_TRANSPOSED>                                                                              \
  DEVICE void wgmma(float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b, T) {                             \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NAMES_##COUNT         \
                 "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4 ", 1, 1, 1, %" #i5 ";"                \
                 : ACC_##COUNT                                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(B_TRANSPOSED ? 1 : 0));          \
  }                                                                                                         \
  template <bool ADD, bool A_TRANSPOSED, bool B_TRANSPOSED>                                                 \
  DEVICE void wgmma(float (&d)[COUNT], uint64_t a, uint64_t b, T) {                                         \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #i2                                               \
                 ", 0;\n"                                                                                   \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NAMES_##COUNT         \
                 "}, %" #i0 ", %" #i1 ", add, 1, 1, %" #i3 ", %" #i4 ";\n}"                                 \
                 : ACC_##COUNT                                                                              \
                 : "l"(a), "l"(b), "n"(ADD ? 1 : 0), "n"(A_TRANSPOSED ? 1 : 0), "n"(B_TRANSPOSED ? 1 : 0)); \
  }
WGMMA(48, bfloat16, "bf16", 24, 24, 25, 26, 27, 28, 29)
WGMMA(48, float16, "f16", 24, 24, 25, 26, 27, 28, 29)
WGMMA(64, bfloat16, "bf16", 32, 32, 33, 34, 35, 36, 37)
WGMMA(64, float16, "f16", 32, 32, 33, 34, 35, 36, 37)
WGMMA(96, bfloat16, "bf16", 48, 48, 49, 50, 51, 52, 53)
WGMMA(96, float16, "f16", 48, 48, 49, 50, 51, 52, 53)
WGMMA(128, bfloat16, "bf16", 64, 64, 65, 66, 67, 68, 69)
WGMMA(128, float16, "f16", 64, 64, 65, 66, 67, 68, 69)
#undef WGMMA
#undef ACC_64
#undef ACC_48
#undef ACC_32
#undef ACC_24
#undef ACC_16
#undef ACC_4
#undef NAMES_64
#undef NAMES_48
#undef NAMES_32
#undef NAMES_24
#undef NAMES_10

inline int sm_count() {
  int device, count;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Launch a kernel whose CTAs form clusters of `cluster` neighbours in x.
template <class... Parameters, class... Arguments>
void launch_sm90a(
    void (*kernel)(Parameters...), Grid grid, int cluster, int threads, int smem_bytes, Stream stream,
    const Arguments&... given) {
  if (smem_bytes > 48 << 10) allow_max_smem(reinterpret_cast<const void*>(kernel));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.x, grid.y, grid.z), config.blockDim = dim3(threads);
  config.dynamicSmemBytes = smem_bytes, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = cluster > 1;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(given)...));
}

}  // namespace fasthyper
