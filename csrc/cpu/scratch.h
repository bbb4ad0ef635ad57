// Temporary memory. It comes from torch's allocator, so that torch's profiler sees every byte.
#pragma once

#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "sizes.h"

namespace fasthyper {

// A range of memory with its size. Every access states how many numbers it may touch; a build with FASTHYPER_CHECKED
// throws if the span has fewer.
template <class T>
class Span {
 public:
  Span() = default;
  Span(T* data, int64_t size) : data_(data), size_(size) {}

  operator Span<const T>() const { return {data_, size_}; }
  explicit operator bool() const { return data_ != nullptr; }
  int64_t size() const { return size_; }

  // A pointer to `count` numbers from `first` on.
  T* at(int64_t first, int64_t count) const {
#if defined(FASTHYPER_CHECKED)
    TORCH_CHECK(
        first >= 0 && count >= 0 && first + count <= size_, "fasthyper: numbers ", first, " to ", first + count,
        " of a span of ", size_);
#endif
    return data_ + first;
  }

  // The same as a span; empty if this span is null.
  Span subspan(int64_t first, int64_t count) const { return data_ ? Span(at(first, count), count) : Span(); }

  // From `first` to the end.
  Span subspan(int64_t first) const { return subspan(first, size_ - first); }

  void fill(T value) const { std::fill_n(data_, size_, value); }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// A span that owns its memory.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n = 0)
      : memory_(n ? c10::GetCPUAllocator()->allocate(n * sizeof(T)) : c10::DataPtr()), size_(n) {}

  Span<T> span() const { return {static_cast<T*>(memory_.get()), size_}; }
  operator Span<T>() const { return span(); }
  explicit operator bool() const { return size_ != 0; }
  T* at(int64_t first, int64_t count) const { return span().at(first, count); }
  Span<T> subspan(int64_t first, int64_t count) const { return span().subspan(first, count); }

 private:
  c10::DataPtr memory_;
  int64_t size_;
};

}  // namespace fasthyper
