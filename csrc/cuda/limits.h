// What a call has to keep to: the multiprocessors and the shared memory of its device, and the workspace.
#pragma once
#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>

#include "device.h"
#include "instructions.h"
#include "reduce.h"

namespace fasthyper {

// The device of a call, and the bytes of the workspace.
struct Limits {
  int64_t processors, shared_memory, workspace;
  bool hopper;  // whether the kernels for sm_90a run here

  int64_t partial_sums() const { return workspace / 4; }  // bytes of those of a launch
};

constexpr int64_t MOST_ROWS = (int64_t(1) << 31) - (1 << 10);  // an int also counts the rows of the last block
constexpr int64_t MOST_BLOCKS = 65535;                         // of a grid, along its second axis

// Numbers that no GPU has confirmed. Tests change them, so that small problems are divided as large ones are.
struct Thresholds {
  std::atomic<int64_t> hopper_work{int64_t(1) << 31};  // the kernels for sm_90a are faster from this many flops on
  std::atomic<int64_t> least_work{256};                // rows of the batch, or numbers of K, of a block of its own
  std::atomic<int64_t> processors{0};                  // of the device; 0 for its own
};
inline Thresholds thresholds;

// Return the compute capability that the code for the current device was compiled for: 90 for 9.0. It is lower than the
// device's own if the code is PTX of an older arch. Throw if there is no code for the device.
inline int64_t generation() {
#ifdef FASTHYPER_EMULATED
  return 90;
#else
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, reduce<float>));
  return least(attributes.binaryVersion, attributes.ptxVersion);
#endif
}

// Return the limits of a call on the current device.
inline Limits limits_of(int device, int64_t workspace) {
  // Few multiprocessors, so that sums of small problems are split, too.
  Limits limits{4, MOST_SHARED_MEMORY, workspace, true};
#ifndef FASTHYPER_EMULATED
  static std::array<Limits, 64> known;
  static std::array<std::once_flag, 64> once;
  std::call_once(once.at(device), [&] {
    const auto property = [&](cudaDeviceAttr which) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, which, device));
      return value;
    };
    const bool sm_90 =
        property(cudaDevAttrComputeCapabilityMajor) == 9 && property(cudaDevAttrComputeCapabilityMinor) == 0;
    known[device] = {
        property(cudaDevAttrMultiProcessorCount), property(cudaDevAttrMaxSharedMemoryPerBlockOptin), 0,
        sm_90 && generation() == 90};
  });
  limits = known[device];
  limits.workspace = workspace;
#endif
  if (const int64_t forced = thresholds.processors) limits.processors = forced;
  return limits;
}

}  // namespace fasthyper
