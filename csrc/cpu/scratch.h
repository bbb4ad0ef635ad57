// Temporary memory, from torch's allocator, so that its profiler sees every byte.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <cstdint>

namespace fasthyper {

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n = 0) : memory_(n ? c10::GetCPUAllocator()->allocate(n * sizeof(T)) : c10::DataPtr()) {}
  operator T*() const { return static_cast<T*>(memory_.get()); }

 private:
  c10::DataPtr memory_;
};

}  // namespace fasthyper
