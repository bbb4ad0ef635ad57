// Views of tensors in global memory: rows that are read, and where results go.
#pragma once
#include <cstdint>

#include "numbers.h"

namespace fasthyper {

// Rows m = (b, n) of x and g, or of z with a point stride of zero.
template <class T>
struct RowView {
  const T* data;
  int64_t instance_stride, point_stride, stride;

  INLINE const T* row(int m, int N) const {
    return N == 1 ? data + m * instance_stride : data + m / N * instance_stride + m % N * point_stride;
  }
};

// `count` numbers of a row; none, where it is not there.
template <class T>
struct Span {
  const T* first;
  int count;
};

// The word of numbers `column` and what follows it in a span; zeros beyond it. aligned: words may be read as such.
template <class T>
DEVICE uint32_t word_at(Span<T> span, int column, int64_t stride, bool aligned) {
  if constexpr (per_word<T> == 1) {
    return column < span.count ? as_uint(span.first[column * stride]) : 0;
  } else {
    if (aligned && column + 1 < span.count) return *reinterpret_cast<const uint32_t*>(span.first + column);
    const T low = column < span.count ? span.first[column * stride] : T(0.f);
    return pack(low, column + 1 < span.count ? span.first[(column + 1) * stride] : T(0.f));
  }
}

// Bytes that can be read at a time where rows begin at multiples of `strides` and their numbers lie side by side: 16,
// 8, 4, or those of a number.
template <class T, class... Strides>
int copy_width(const T* data, int64_t stride, Strides... strides) {
  if (data == nullptr || stride != 1) return sizeof(T);
  for (int width = 16; width > static_cast<int>(sizeof(T)); width /= 2)
    if (reinterpret_cast<uintptr_t>(data) % width == 0 && ((strides * sizeof(T) % width == 0) && ...)) return width;
  return sizeof(T);
}

// Whether 31 bits lead to every number of rows of `count`.
template <class T>
bool fits_int32(const RowView<T>& view, int M, int N, int64_t count) {
  const int64_t row = (M / N - 1) * view.instance_stride + (N - 1) * view.point_stride;
  return row + (count - 1) * view.stride < int64_t(1) << 31;
}

// Where a result goes: to the tensor, or as a float32 part of it, one split after another.
template <class T>
struct Output {
  T* out;
  float* partial;

  INLINE bool requested() const { return out || partial; }
  DEVICE void store(int64_t index, float value) const {
    if (partial) partial[index] = value;
    else out[index] = static_cast<T>(value);
  }
};

}  // namespace fasthyper
