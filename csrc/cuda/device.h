// What marks functions and kernels, for a GPU or for the emulator on a CPU, and the size of a grid.
//
// The headers are in layers. Each includes what it uses, only of the lines above its own:
//
//     device.h
//     numbers.h, activation.h                              dtypes and words; activations
//     ptx.h or emulated.h                                  instructions of sm_80 and newer, on a GPU or a CPU
//     instructions.h                                       includes the one of the two
//     views.h, fragments.h, hopper_layouts.h               tensors in global memory; operands of mma and of wgmma
//     tiles.h                                              tiles in shared memory
//     hopper_ptx.h or hopper_emulated.h                    instructions of sm_90a, on a GPU or a CPU
//     hopper_instructions.h                                includes the one of the two
//     hopper.h                                             the pipeline of the kernels for sm_90a
//     fold.h, dx_dz.h, weight_grad.h, reduce.h             kernels
//     hopper_fold.h, hopper_dx_dz.h, hopper_weight_grad.h  the same for sm_90a
//     grads.h                                              dx_dz.h and weight_grad.h in one launch
//     launchers.h, hopper_launchers.h                      functions that launch kernels; the .cu files define them
//     tensors.h                                            what library.cu, the operators of torch, needs of torch
#pragma once

#ifdef FASTHYPER_EMULATED
#define INLINE inline
#define DEVICE inline
#define KERNEL(threads, blocks) void
#define GRID_CONSTANT
#else
#include <cuda_runtime.h>
#define INLINE __host__ __device__ __forceinline__
#define DEVICE __device__ __forceinline__
#define KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define GRID_CONSTANT __grid_constant__
#endif

namespace fasthyper {

struct Grid {
  unsigned x, y = 1, z = 1;
};

}  // namespace fasthyper
