// Qualifiers of functions and kernels, for a GPU or for the emulator on a CPU, the size of a grid, and shared memory.
//
// The headers form layers. Each header includes what it uses, and only from the lines above its own:
//
//     device.h                                             qualifiers
//     numbers.h, activation.h                              dtypes and 32-bit words; activations
//     ptx.h or emulated.h                                  instructions of sm_80 and newer: on a GPU, or emulated
//     instructions.h                                       selects one of the two
//     views.h, fragments.h, hopper_layouts.h               global memory; operands of mma; operands of wgmma
//     tiles.h                                              tiles in shared memory
//     hopper_ptx.h or hopper_emulated.h                    instructions of sm_90a: on a GPU, or emulated, with
//                                                          hopper_memory_emulated.h
//     hopper_instructions.h                                selects one of the two
//     hopper.h                                             the pipeline of the sm_90a kernels
//     fold.h, dx_dz.h, weight_grad.h, reduce.h             kernels
//     hopper_fold.h, hopper_dx_dz.h, hopper_weight_grad.h  kernels for sm_90a
//     grads.h                                              dx_dz.h and weight_grad.h in one launch
//     launchers.h, hopper_launchers.h                      functions that launch kernels, defined in the .cu files
//     limits.h, division.h                                 what a device has; how a call is divided
//     tensors.h, arguments.h, checks.h                     conversions from torch, for the operators in library.cu
#pragma once

#ifdef FASTHYPER_EMULATED
#define INLINE inline
#define DEVICE inline
#define KERNEL(threads, min_ctas) void
#define GRID_CONSTANT
#else
#include <cuda_runtime.h>
#define INLINE __host__ __device__ __forceinline__
#define DEVICE __device__ __forceinline__
#define KERNEL(threads, min_ctas) __global__ void __launch_bounds__(threads, min_ctas)
#define GRID_CONSTANT __grid_constant__
#endif

namespace fasthyper {

constexpr int MOST_SHARED_MEMORY = 227 << 10;  // bytes of a CTA, on sm_90

struct Grid {
  unsigned x, y = 1, z = 1;
};

}  // namespace fasthyper
