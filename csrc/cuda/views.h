// Views of tensors in global memory: rows that are read, and where results go.
#pragma once
#include <cstdint>

#include "numbers.h"

namespace fasthyper {

// Rows m = (b, n) of x and g, or of z with a point stride of zero.
template <class T>
struct Rows {
  const T* data;
  int64_t instance, point, step;

  INLINE const T* row(int m, int N) const {
    return N == 1 ? data + m * instance : data + m / N * instance + m % N * point;
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
DEVICE uint32_t word_at(Span<T> of, int column, int64_t step, bool aligned) {
  if constexpr (per_word<T> == 1) {
    return column < of.count ? bits(of.first[column * step]) : 0;
  } else {
    if (aligned && column + 1 < of.count) return *reinterpret_cast<const uint32_t*>(of.first + column);
    const T low = column < of.count ? of.first[column * step] : T(0.f);
    return pair(low, column + 1 < of.count ? of.first[(column + 1) * step] : T(0.f));
  }
}

// Bytes that can be read at a time where rows begin at multiples of `strides` and their numbers lie side by side: 16,
// 8, 4, or those of a number.
template <class T, class... Strides>
int width_of(const T* data, int64_t step, Strides... strides) {
  if (data == nullptr || step != 1) return sizeof(T);
  for (int width = 16; width > static_cast<int>(sizeof(T)); width /= 2)
    if (reinterpret_cast<uintptr_t>(data) % width == 0 && ((strides * sizeof(T) % width == 0) && ...)) return width;
  return sizeof(T);
}

// Whether 31 bits lead to every number of rows of `count`.
template <class T>
bool is_near(const Rows<T>& rows, int M, int N, int64_t count) {
  return (M / N - 1) * rows.instance + (N - 1) * rows.point + (count - 1) * rows.step < int64_t(1) << 31;
}

// Where a result goes: to the tensor, or as a float32 part of it, one split after another.
template <class T>
struct Target {
  T* out;
  float* partial;

  INLINE bool wanted() const { return out || partial; }
  DEVICE void store(int64_t at, float value) const {
    if (partial) partial[at] = value;
    else out[at] = static_cast<T>(value);
  }
};

}  // namespace fasthyper
