// Views of tensors in global memory: rows to read, and outputs to write.
#pragma once
#include <cstdint>

#include "numbers.h"

namespace fasthyper {

// Rows m = (b, n) of x and g, or of z with a point stride of zero. `stride` is that between elements of a row.
template <class T>
struct RowView {
  const T* data;
  int64_t instance_stride, point_stride, stride;

  INLINE const T* row(int m, int N) const {
    return N == 1 ? data + m * instance_stride : data + m / N * instance_stride + m % N * point_stride;
  }
};

// `count` elements of a row. If `count` is zero or less, nothing is read.
template <class T>
struct Span {
  const T* first;
  int count;
};

// Return the word that begins with element `column` of a span; elements beyond its end are zero. aligned: a word may be
// read with one instruction.
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

// Return how many bytes one copy may read, if rows begin at multiples of `strides`: 16, 8, 4, or the size of one
// element. Elements that are not contiguous are read one by one.
template <class T, class... Strides>
int copy_width(const T* data, int64_t stride, Strides... strides) {
  if (data == nullptr || stride != 1) return sizeof(T);
  for (int width = 16; width > static_cast<int>(sizeof(T)); width /= 2)
    if (reinterpret_cast<uintptr_t>(data) % width == 0 && ((strides * sizeof(T) % width == 0) && ...)) return width;
  return sizeof(T);
}

// Return whether int32 offsets reach every element of rows of `count` elements.
template <class T>
bool fits_int32(const RowView<T>& view, int M, int N, int64_t count) {
  const int64_t row = (M / N - 1) * view.instance_stride + (N - 1) * view.point_stride;
  return row + (count - 1) * view.stride < int64_t(1) << 31;
}

// Where a result is stored: in the tensor, or as float32 partial sums, one split after another.
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
