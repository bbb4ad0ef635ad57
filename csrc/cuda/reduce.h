// Adds partial sums. Their order is fixed, so that the same inputs give the same bits.
//
//     out[row, column] = Σ over splits and terms of partials[split, row, term, column]
#pragma once
#include <cstdint>

#include "instructions.h"

namespace fasthyper {

struct Reduction {
  const float* partials;
  void* out;
  int64_t rows, terms, columns, splits, split_stride;

  INLINE int64_t numel() const { return partials ? rows * columns : 0; }
};

struct Reductions {
  static constexpr int MAX_COUNT = 9, THREADS = 256, IN_FLIGHT = 8;  // partial sums that a thread loads at once
  Reduction items[MAX_COUNT] = {};
  int count = 0;

  void add(const Reduction& reduction) { items[count++] = reduction; }
  INLINE int64_t numel() const {
    int64_t all = 0;
    for (int k = 0; k < count; ++k) all += items[k].numel();
    return all;
  }
};

template <class T>
KERNEL(Reductions::THREADS, 1)
reduce(const GRID_CONSTANT Reductions reductions) {
  int64_t index = static_cast<int64_t>(cta_x()) * Reductions::THREADS + thread();
  int k = 0;
  for (; k < reductions.count && index >= reductions.items[k].numel(); ++k) index -= reductions.items[k].numel();
  if (k == reductions.count) return;
  const Reduction& reduction = reductions.items[k];
  const float* const first =
      reduction.partials + index / reduction.columns * reduction.terms * reduction.columns + index % reduction.columns;
  float total = 0.f, terms[Reductions::IN_FLIGHT];
  for (int64_t t = 0; t < reduction.terms; ++t)
    for (int64_t s = 0; s < reduction.splits; s += Reductions::IN_FLIGHT) {
#pragma unroll
      for (int k = 0; k < Reductions::IN_FLIGHT; ++k)
        terms[k] = s + k < reduction.splits ? first[(s + k) * reduction.split_stride + t * reduction.columns] : 0.f;
#pragma unroll
      for (int k = 0; k < Reductions::IN_FLIGHT; ++k) total += terms[k];
    }
  static_cast<T*>(reduction.out)[index] = static_cast<T>(total);
}

template <class T>
void launch_reduce(const Reductions& reductions, Stream stream) {
  if (reductions.numel() == 0) return;
  const auto ctas = (reductions.numel() + Reductions::THREADS - 1) / Reductions::THREADS;
  launch(&reduce<T>, Grid{static_cast<unsigned>(ctas)}, Reductions::THREADS, 0, stream, reductions);
}

}  // namespace fasthyper
