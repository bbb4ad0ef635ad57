// The operands of products: strided views of x, z, g and H, and the layouts that they are packed into.
//
// A row q = b·N + n is one point of one instance. A block is LANES rows with the row as the fastest axis, (features,
// LANES). One vector instruction then computes several rows for any sizes of the problem, and a block is a right
// operand without packing. A left operand has rows with contiguous k.
#pragma once

#include "gemm.h"

namespace fasthyper {

// The rows q of x, g or y, or of z: all points of an instance have the same row of z.
template <class S>
struct Rows {
  S* data;
  int64_t instance, point, feature;  // strides
  int64_t points, features;

  S* row(int64_t q) const { return data + q / points * instance + q % points * point; }
  Rows columns(int64_t f0, int64_t f1) const {
    return {data + f0 * feature, instance, point, feature, points, f1 - f0};
  }

  // Calls f(first row, count, stride) for ranges of rows with a constant stride.
  template <class F>
  void stretches(int64_t q0, int64_t q1, F&& f) const {
    if (points == 1 || instance == points * point) return f(q0, q1 - q0, points == 1 ? instance : point);
    while (q0 < q1) {
      const int64_t end = std::min(q1, (q0 / points + 1) * points);
      f(q0, end - q0, point);
      q0 = end;
    }
  }
};

// lanes[f][l] = feature f of row q0 + l, with `width` lanes for each feature; lanes from row q1 to `filled` are zero.
template <class S, class T>
void load_lanes(
    const Rows<const S>& t, int64_t q0, int64_t q1, Span<T> lanes, int64_t width = LANES, int64_t filled = LANES) {
  T* const to = lanes.at(0, extent(t.features, width, filled));
  t.stretches(q0, q1, [&](int64_t q, int64_t count, int64_t stride) {
    pack(t.row(q), t.feature, stride, to + (q - q0), width, t.features, count);
  });
  for (int64_t f = 0; f < t.features; ++f) std::fill(to + f * width + (q1 - q0), to + f * width + filled, T(0.f));
}

// The inverse of load_lanes; rows of an output are contiguous.
template <class S>
void store_lanes(Span<const float> lanes, const Rows<S>& t, int64_t q0, int64_t q1) {
  const float* const from = lanes.at(0, t.features * LANES);
  t.stretches(q0, q1, [&](int64_t q, int64_t count, int64_t stride) {
    pack(from + (q - q0), 1, LANES, t.row(q), stride, count, t.features);
  });
}

// A group of rows, in blocks of LANES. The blocks of a factor are stored one after the other.
struct Group {
  int64_t blocks, rows;

  explicit Group(int64_t rows) : blocks(ceil_div(rows, LANES)), rows(rows) {}

  // Rows of block k, and lanes that are computed for it.
  int64_t rows_in(int64_t k) const { return std::min(LANES, rows - k * LANES); }
  int64_t lanes_in(int64_t k) const { return whole_registers(rows_in(k)); }
};

// H with its axes in the order of a contraction: one axis for each factor. Strides are arbitrary.
template <class S>
struct Head {
  const S* data;
  int64_t p, q, c;
  int64_t sp, sq, sc;  // strides
};

// A left operand: rows with contiguous k.
template <class T>
struct Left {
  const T* data;
  int64_t ld;
};

// Whether a product can read k numbers of this stride in place.
template <class S, class T>
inline bool readable_in_place(int64_t stride, int64_t k) {
  return std::is_same_v<S, T> && stride == 1 && k % K_STEP<T> == 0;
}

// Packs rows × k as a left operand: k contiguous, rows `ld` apart, zeros to the end of the last K_STEP.
template <class S, class T>
void copy_rows(
    const S* src, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k, Span<T> packed, int64_t ld) {
  T* const to = packed.at(0, rows * ld);
  pack(src, row_stride, k_stride, to, ld, rows, k, ld);
  if (round_k<T>(k) > k)
    for (int64_t i = 0; i < rows; ++i) to[i * ld + k] = T(0.f);
}

// A left operand: in place if possible, else packed.
template <class S, class T>
Left<T> left_operand(const S* src, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k, Span<T> packed) {
  if constexpr (std::is_same_v<S, T>)
    if (readable_in_place<S, T>(k_stride, k)) return {src, row_stride};
  const int64_t ld = packed_ld(k);
  copy_rows<S, T>(src, row_stride, k_stride, rows, k, packed, ld);
  return {packed.at(0, rows * ld), ld};
}

// A right operand of T from rows (k, n) of floats, written to `out`: for 16-bit numbers, rows of n pairs,
// out[k / 2][n][k % 2]. Rows of floats are a right operand without packing.
inline const float* right_operand(const float* rows, Span<float>, int64_t, int64_t) { return rows; }

inline const BFloat16* right_operand(const float* rows, Span<BFloat16> out, int64_t k, int64_t n) {
  BFloat16* const to = out.at(0, round_k<BFloat16>(k) * n);
  for (int64_t i = 0; i + 1 < k; i += 2) interleave(rows + i * n, rows + (i + 1) * n, to + i * n, n);
  if (k % 2) interleave(rows + (k - 1) * n, nullptr, to + (k - 1) * n, n);
  return to;
}

}  // namespace fasthyper
