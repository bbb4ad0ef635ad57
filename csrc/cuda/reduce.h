// The second stage of a sum in parts: they are added in order, so that the same inputs give the same bits.
#pragma once
#include <cstdint>

#include "instructions.h"

namespace fasthyper {

// out[row, column] = Σ over splits and terms of in[split, row, term, column]
struct Sum {
  const float* in;
  void* out;
  int64_t rows, terms, columns, splits, split_stride;

  INLINE int64_t numel() const { return in ? rows * columns : 0; }
};

struct Sums {
  static constexpr int MOST = 9, THREADS = 256, AT_ONCE = 8;  // parts of a sum on their way together
  Sum each[MOST] = {};
  int count = 0;

  void add(const Sum& sum) { each[count++] = sum; }
  INLINE int64_t numel() const {
    int64_t all = 0;
    for (int k = 0; k < count; ++k) all += each[k].numel();
    return all;
  }
};

template <class T>
KERNEL(Sums::THREADS, 1)
reduce(const GRID_CONSTANT Sums sums) {
  int64_t at = static_cast<int64_t>(block_x()) * Sums::THREADS + thread();
  int k = 0;
  for (; k < sums.count && at >= sums.each[k].numel(); ++k) at -= sums.each[k].numel();
  if (k == sums.count) return;
  const Sum& sum = sums.each[k];
  const float* const in = sum.in + at / sum.columns * sum.terms * sum.columns + at % sum.columns;
  float total = 0.f, part[Sums::AT_ONCE];
  for (int64_t t = 0; t < sum.terms; ++t)
    for (int64_t s = 0; s < sum.splits; s += Sums::AT_ONCE) {
#pragma unroll
      for (int k = 0; k < Sums::AT_ONCE; ++k)
        part[k] = s + k < sum.splits ? in[(s + k) * sum.split_stride + t * sum.columns] : 0.f;
#pragma unroll
      for (int k = 0; k < Sums::AT_ONCE; ++k) total += part[k];
    }
  static_cast<T*>(sum.out)[at] = static_cast<T>(total);
}

template <class T>
void launch_reduce(const Sums& sums, Stream stream) {
  if (sums.numel() == 0) return;
  const auto blocks = (sums.numel() + Sums::THREADS - 1) / Sums::THREADS;
  launch(&reduce<T>, Grid{static_cast<unsigned>(blocks)}, Sums::THREADS, 0, stream, sums);
}

}  // namespace fasthyper
