// How a call is divided: blocks of few or many rows, and splits of a sum whose output has too few blocks to fill the
// device. Partial sums are float32, in the workspace, and are added in order.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>

#include "dx_dz.h"
#include "fold.h"
#include "hopper_fold.h"
#include "hopper_weight_grad.h"
#include "limits.h"
#include "weight_grad.h"

namespace fasthyper {

constexpr int64_t MOST_SPLITS = 32, ALIGNED = 8;  // a split begins at a multiple: matrices are read 16 bytes at a time
constexpr double SPLIT_COST = 1.2;                // time of a split sum, relative to one that is not split
constexpr double LEAST_GAIN = 1.05;               // a second launch must be faster by this factor

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The number of splits of a sum: those that fill the device, have enough work, and fit the workspace. `blocks` are
// those of the output, `work` is what the splits share, `partial` the bytes of the partial sums of one split.
inline int64_t splits_of(int64_t blocks, int64_t work, int64_t partial, const Limits& limits) {
  const auto fill = limits.processors / std::max<int64_t>(1, blocks),
             fit = limits.partial_sums() / std::max<int64_t>(1, partial);
  return std::max<int64_t>(1, std::min({fill, work / thresholds.least_work, fit, MOST_SPLITS}));
}

// The inputs of a split, rounded up to a multiple of `ALIGNED`, or all inputs if these are fewer.
inline int64_t aligned(int64_t per_split, int64_t inputs) {
  return std::min(inputs, ceil_div(per_split, ALIGNED) * ALIGNED);
}

inline bool is_for_hopper(int64_t itemsize, int64_t flops, const Limits& limits) {
  return limits.hopper && itemsize == 2 && flops >= thresholds.hopper_work;
}

// How `fold` is divided; u is (M, C), v (M, K), out (M, P).
struct FoldDivision {
  int64_t per_split;  // length of a split of C
  bool wide;          // whether blocks have many rows

  FoldDivision(int64_t M, int64_t C, int64_t K, int64_t P, const Limits& limits, bool hopper) {
    const auto columns = ceil_div(P, hopper ? HopperFoldShape<128>::BN : WideFold<float>::BP);
    wide = hopper || ceil_div(M, WideFold<float>::BM) * columns >= limits.processors;
    const auto rows = hopper ? HopperFoldShape<128>::BM : wide ? WideFold<float>::BM : NarrowFold<float>::BM;
    const auto splits = splits_of(ceil_div(M, rows) * columns, C * K, 4 * M * P, limits);
    per_split = aligned(ceil_div(C, splits), C);
  }
};

// The number of rows to launch first: whole waves of blocks, if it is faster to split the last wave; else M. A wave is
// as many blocks as the device has multiprocessors.
inline int64_t whole_waves(int64_t M, int64_t P, int64_t processors) {
  const int64_t rows_of_block = HopperFoldShape<128>::BM, columns = ceil_div(P, HopperFoldShape<128>::BN);
  const auto blocks = ceil_div(M, rows_of_block) * columns, waves = blocks / processors, last = blocks % processors;
  const double split = double(waves) + SPLIT_COST * double(last) / double(processors);
  if (!waves || !last || split * LEAST_GAIN >= double(waves + 1)) return M;
  return waves * processors / columns * rows_of_block;
}

// How the gradients of a layer are divided; `mask` has a bit for each of dx, dz, dH, dbias, dW0, db0.
struct GradsDivision {
  bool fits = false;        // shared memory and the workspace
  bool wide = false;        // whether blocks of dx and dz have many rows
  bool hopper = false;      // whether the kernels for sm_90a compute the gradients that they can
  int64_t per_split_i = 0;  // length of a split of I, for dx and dz
  int64_t per_split_m = 0;  // length of a split of the batch, for the gradients of the parameters
  int64_t parameters = 0;   // how many numbers the gradients of the parameters have
  int64_t dz_partials = 0;  // partial sums of dz for each row; 0 if dz is stored at once

  GradsDivision(
      int64_t B, int64_t N, int64_t R, int64_t I, int64_t O, int64_t itemsize, int mask, const Limits& limits) {
    const auto M = B * N, row = ROW_BYTES / itemsize;  // numbers in a row of a tile
    if (B > MOST_ROWS / N) return;
    const bool dx = mask & 1, dz = mask & 2;
    const int64_t sizes[] = {O * I * R, O * R, O * I, O};
    for (int k = 0; k < 4; ++k) parameters += mask >> (k + 2) & 1 ? sizes[k] : 0;
    hopper = is_for_hopper(itemsize, 2 * M * R * I * O, limits);
    wide = hopper || ceil_div(M, WideDxDz<float>::BM) >= limits.processors;
    per_split_i = I;
    if (dx || dz) {
      const auto too_large = [&](bool wide, int64_t inputs) {
        return shared_memory(O, inputs, itemsize, dx, wide) > limits.shared_memory;
      };
      wide = wide || NarrowDxDz<float>::DEPTH < O || too_large(false, ALIGNED);
      const auto blocks = ceil_div(M, wide ? WideDxDz<float>::BM : NarrowDxDz<float>::BM);
      per_split_i = aligned(ceil_div(I, splits_of(blocks, I * R, 4 * M * R, limits)), I);
      while (per_split_i > ALIGNED && too_large(wide, per_split_i))  // a block collects its dx there
        per_split_i = ceil_div(per_split_i / 2, ALIGNED) * ALIGNED;
      if (too_large(wide, per_split_i)) return;
      const auto splits = ceil_div(I, per_split_i);
      dz_partials = dz && (N > 1 || splits > 1) ? splits : 0;
      if (4 * M * R * dz_partials > limits.partial_sums()) return;
    }
    per_split_m = M;
    if (parameters) {
      const auto columns = hopper && row < O ? HopperWeightGradShape<128>::BN : row;
      const auto blocks = ceil_div(I + (mask >> 3 & 1), WeightGradShape<float>::WI) *
                          (ceil_div(R, row) + (mask >> 4 & 1)) * ceil_div(O, columns);
      const int64_t batch = HopperWeightGradShape<128>::BATCH;  // splits of rows are multiples of it
      const auto rows = ceil_div(M, splits_of(blocks, M, 4 * parameters, limits));
      per_split_m = std::min(M, ceil_div(rows, batch) * batch);
    }
    fits = true;
  }

  // The bytes of shared memory of a block.
  static int64_t shared_memory(int64_t O, int64_t inputs, int64_t itemsize, bool dx, bool wide) {
    constexpr int64_t MOST = 1 << 20;  // more do not fit any GPU, and an int does not count their bytes
    if (O > MOST || (dx && inputs > MOST)) return std::numeric_limits<int64_t>::max();
    return itemsize == 4 ? shared_memory<float>(O, inputs, dx, wide) : shared_memory<bfloat16>(O, inputs, dx, wide);
  }

 private:
  template <class T>
  static int64_t shared_memory(int64_t O, int64_t inputs, bool dx, bool wide) {
    const int o = int(O), i = int(inputs);
    const int dx_dz = wide ? WideDxDz<T>::smem_bytes(o, i, dx) : NarrowDxDz<T>::smem_bytes(o, i, dx);
    return std::max(dx_dz, int(WeightGradShape<T>::SMEM_BYTES));
  }
};

static_assert(NarrowFold<float>::BP == WideFold<float>::BP);
static_assert(NarrowFold<float>::BM == NarrowDxDz<float>::BM && WideFold<float>::BM == WideDxDz<float>::BM);
static_assert(WeightGradShape<float>::WI == HopperWeightGradShape<128>::INPUTS);

}  // namespace fasthyper
