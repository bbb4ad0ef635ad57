// Strided views: of rows that are instances and points, and of the head.
#pragma once

#include "gemm.h"

namespace fasthyper {

// The rows (b, n) of x, g or y, or those of z, which every point of an instance repeats.
template <class S>
struct Rows {
  S* data;
  int64_t instance, point, feature;  // strides
  int64_t points, features;

  S* row(int64_t q) const { return data + q / points * instance + q % points * point; }
  Rows columns(int64_t f0, int64_t f1) const {
    return {data + f0 * feature, instance, point, feature, points, f1 - f0};
  }

  // Calls f(first row, count, stride) for stretches of rows a fixed stride apart.
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

// lanes[f][l] = row q0 + l, `width` lanes a row; those from q1 to `filled` are zero.
template <class S, class T>
void load_lanes(
    const Rows<const S>& t, int64_t q0, int64_t q1, Block<T> lanes, int64_t width = LANES, int64_t filled = LANES) {
  T* const to = lanes.at(0, extent(t.features, width, filled));
  t.stretches(q0, q1, [&](int64_t q, int64_t count, int64_t stride) {
    pack(t.row(q), t.feature, stride, to + (q - q0), width, t.features, count);
  });
  for (int64_t f = 0; f < t.features; ++f) std::fill(to + f * width + (q1 - q0), to + f * width + filled, T(0.f));
}

// The way back; rows of an output are contiguous.
template <class S>
void store_lanes(Block<const float> lanes, const Rows<S>& t, int64_t q0, int64_t q1) {
  const float* const from = lanes.at(0, t.features * LANES);
  t.stretches(q0, q1, [&](int64_t q, int64_t count, int64_t stride) {
    pack(from + (q - q0), 1, LANES, t.row(q), stride, count, t.features);
  });
}

// Rows in blocks of LANES; each factor has its features of one block after those of another.
struct Group {
  int64_t blocks, rows;

  explicit Group(int64_t rows) : blocks(ceil_div(rows, LANES)), rows(rows) {}

  // Of a block, the rows that are there, and the lanes that are computed.
  int64_t filled(int64_t k) const { return std::min(LANES, rows - k * LANES); }
  int64_t width(int64_t k) const { return whole_registers(filled(k)); }
};

// H with its axes in the order that a contraction wants; strides may be any.
template <class S>
struct Head {
  const S* data;
  int64_t p, q, c;
  int64_t sp, sq, sc;  // strides
};

// A left operand: rows with k contiguous.
template <class T>
struct Left {
  const T* data;
  int64_t ld;
};

// Whether a run of k of this stride can be read as it lies.
template <class S, class T>
inline bool readable(int64_t stride, int64_t k) {
  return std::is_same_v<S, T> && stride == 1 && k % K_STEP<T> == 0;
}

// rows × k with k contiguous, ld apart, and zeros to where a product's last step ends.
template <class S, class T>
void copy_rows(
    const S* src, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k, Block<T> packed, int64_t ld) {
  T* const to = packed.at(0, rows * ld);
  pack(src, row_stride, k_stride, to, ld, rows, k, ld);
  if (round_k<T>(k) > k)
    for (int64_t i = 0; i < rows; ++i) to[i * ld + k] = T(0.f);
}

// The same where they lie, if that can be, else packed.
template <class S, class T>
Left<T> left(const S* src, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k, Block<T> packed) {
  if constexpr (std::is_same_v<S, T>)
    if (readable<S, T>(k_stride, k)) return {src, row_stride};
  const int64_t ld = packed_ld(k);
  copy_rows<S, T>(src, row_stride, k_stride, rows, k, packed, ld);
  return {packed.at(0, rows * ld), ld};
}

// Rows (k, n) of floats as a right operand in T, written to `out`. Floats are one as they stand.
inline const float* right(const float* rows, Block<float>, int64_t, int64_t) { return rows; }

inline const BFloat16* right(const float* rows, Block<BFloat16> out, int64_t k, int64_t n) {
  BFloat16* const to = out.at(0, round_k<BFloat16>(k) * n);
  for (int64_t i = 0; i + 1 < k; i += 2) interleave(rows + i * n, rows + (i + 1) * n, to + i * n, n);
  if (k % 2) interleave(rows + (k - 1) * n, nullptr, to + (k - 1) * n, n);
  return to;
}

}  // namespace fasthyper
