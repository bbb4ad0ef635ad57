// Temporary memory, from torch's allocator, so that its profiler sees every byte.
#pragma once

#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "sizes.h"

namespace fasthyper {

// A stretch of memory that knows its size. Who hands a part of it on says how many numbers may be touched there, and a
// checked build fails where there are fewer.
template <class T>
class Block {
 public:
  Block() = default;
  Block(T* data, int64_t size) : data_(data), size_(size) {}

  operator Block<const T>() const { return {data_, size_}; }
  explicit operator bool() const { return data_ != nullptr; }
  int64_t size() const { return size_; }

  // The `count` numbers from `first` on.
  T* at(int64_t first, int64_t count) const {
#if defined(FASTHYPER_CHECKED)
    TORCH_CHECK(
        first >= 0 && count >= 0 && first + count <= size_, "fasthyper: numbers ", first, " to ", first + count,
        " of a block of ", size_);
#endif
    return data_ + first;
  }

  // The same as a block; of no block, none.
  Block part(int64_t first, int64_t count) const { return data_ ? Block(at(first, count), count) : Block(); }

  // From `first` on to the end.
  Block from(int64_t first) const { return part(first, size_ - first); }

  void fill(T value) const { std::fill_n(data_, size_, value); }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// A block that is freed with its owner.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n = 0)
      : memory_(n ? c10::GetCPUAllocator()->allocate(n * sizeof(T)) : c10::DataPtr()), size_(n) {}

  Block<T> block() const { return {static_cast<T*>(memory_.get()), size_}; }
  operator Block<T>() const { return block(); }
  explicit operator bool() const { return size_ != 0; }
  T* at(int64_t first, int64_t count) const { return block().at(first, count); }
  Block<T> part(int64_t first, int64_t count) const { return block().part(first, count); }

 private:
  c10::DataPtr memory_;
  int64_t size_;
};

}  // namespace fasthyper
