// One output and one point, O = N = 1, in float32: H is a matrix (I, R), and x, z and g are matrices of instances.
//
//   P = x·H      y = Σ_r z (P + bias) + Σ_i x base      dz = g (P + bias)
//   W = z·Hᵀ     dx = g (W + base)
//
// x and z are left operands, read in place; H is the right operand. There are no lanes.
#pragma once

#include "rows.h"

namespace fasthyper {

constexpr int64_t TILE_INSTANCES = tile_size(64);
constexpr int64_t TILE_COLUMNS = tile_size(128, WIDTH);
constexpr int64_t LARGEST_HEAD = 1 << 18;  // this file is used for an H of at most so many numbers

inline float dot(const float* a, const float* b, int64_t n) {
  Vec sums[4] = {};
  int64_t k = 0;
  for (; k + 4 * WIDTH <= n; k += 4 * WIDTH)
    for (int v = 0; v < 4; ++v) sums[v] += load<Vec>(a + k + v * WIDTH) * load<Vec>(b + k + v * WIDTH);
  const Vec sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float total = 0;
  for (int v = 0; v < WIDTH; ++v) total += sum[v];
  for (; k < n; ++k) total += a[k] * b[k];
  return total;
}

// A matrix (k, n) as a right operand: in place, or packed, with rows padded with zeros to a multiple of WIDTH.
class RightMatrix {
 public:
  RightMatrix(const float* data, int64_t sk, int64_t sn, int64_t k, int64_t n)
      : n(n), data_(data), ld_(sk), packed_(sn == 1 && n % WIDTH == 0 ? 0 : k * whole_registers(n)) {
    if (!packed_) return;
    ld_ = whole_registers(n);
    float* const to = packed_.at(0, k * ld_);
    pack(data, sk, sn, to, ld_, k, n, ld_);
    for (int64_t i = 0; i < k; ++i) std::fill(to + i * ld_ + n, to + (i + 1) * ld_, 0.f);
    data_ = to;
  }

  // tile = u · (columns of the matrix from c on), for rows of k numbers. Returns the number of columns.
  int64_t multiply(const Left<float>& u, int64_t rows, int64_t k, int64_t c, float* tile) const {
    const int64_t width = std::min(TILE_COLUMNS, n - c);
    gemm(rows, whole_registers(width), k, u.data, u.ld, data_ + c, ld_, tile, TILE_COLUMNS, false);
    return width;
  }

  const int64_t n;

 private:
  const float* data_;
  int64_t ld_;
  Scratch<float> packed_;
};

// Calls run(first, last, tile) for tiles of instances, in parallel; `tile` holds one result of RightMatrix::multiply.
template <class F>
void for_tiles(const Factors<float>& f, F&& run) {
  const int64_t tiles = ceil_div(f.B, TILE_INSTANCES);
  at::parallel_for(0, tiles, tasks_per_thread(tiles, f.multiplications()), [&](int64_t begin, int64_t end) {
    const Scratch<float> tile(TILE_INSTANCES * TILE_COLUMNS);
    for (int64_t t = begin; t < end; ++t)
      run(t * TILE_INSTANCES, std::min(f.B, (t + 1) * TILE_INSTANCES), tile.at(0, TILE_INSTANCES * TILE_COLUMNS));
  });
}

// Whether this file is used: x and z can be read in place, and H, which may be packed, is not too large.
template <class S>
bool is_one_output(const Factors<S>& f, Schedule schedule) {
  const bool in_place = readable_in_place<S, float>(f.x.feature, f.I) && readable_in_place<S, float>(f.z.feature, f.R);
  return in_place && f.O == 1 && f.N == 1 && schedule == Schedule::project && f.I * f.R <= LARGEST_HEAD;
}

// A contiguous copy of a row that all instances share, or n zeros if it is null.
inline Scratch<float> row_or_zeros(const float* data, int64_t stride, int64_t n) {
  Scratch<float> copy(n);
  if (data) pack(data, 0, stride, copy.at(0, n), n, 1, n);
  else copy.span().fill(0.f);
  return copy;
}

inline void apply_one_output(const Factors<float>& f, const float* base_bias, Rows<float> y) {
  const RightMatrix h(f.h, f.si, f.sr, f.I, f.R);
  const auto bias = row_or_zeros(f.bias.data, f.bias.s1, f.R), base = row_or_zeros(f.base.data, f.base.s1, f.I);
  for_tiles(f, [&](int64_t b0, int64_t b1, float* tile) {
    const Left<float> x{f.x.row(b0), f.x.instance}, z{f.z.row(b0), f.z.instance};
    float* const to = y.row(b0);  // y is contiguous
    for (int64_t b = 0; b < b1 - b0; ++b) {
      float sum = base_bias ? *base_bias : 0.f;
      if (f.base.data) sum += dot(x.data + b * x.ld, base.at(0, f.I), f.I);
      if (f.bias.data) sum += dot(z.data + b * z.ld, bias.at(0, f.R), f.R);
      to[b] = sum;
    }
    for (int64_t r = 0, width; r < f.R; r += width) {
      width = h.multiply(x, b1 - b0, f.I, r, tile);
      for (int64_t b = 0; b < b1 - b0; ++b) to[b] += dot(tile + b * TILE_COLUMNS, z.data + b * z.ld + r, width);
    }
  });
}

// out = g (u·h + shared)
inline void scaled_product(
    const Factors<float>& f, const Rows<const float>& u, const RightMatrix& h, const float* shared, Rows<float> out) {
  for_tiles(f, [&](int64_t b0, int64_t b1, float* tile) {
    const float* const g = f.g.row(b0);
    for (int64_t c = 0, width; c < h.n; c += width) {
      width = h.multiply({u.row(b0), u.instance}, b1 - b0, u.features, c, tile);
      float* to = out.row(b0) + c;
      for (int64_t b = 0; b < b1 - b0; ++b, to += out.instance) {
        const float* const t = tile + b * TILE_COLUMNS;
        const float factor = g[b * f.g.instance];
        int64_t k = 0;
        for (; k + WIDTH <= width; k += WIDTH) store(to + k, factor * (load<Vec>(t + k) + load<Vec>(shared + c + k)));
        for (; k < width; ++k) to[k] = factor * (t[k] + shared[c + k]);
      }
    }
  });
}

inline void grads_one_output(const Factors<float>& f, Rows<float> dx, Rows<float> dz) {
  if (dx.data)
    scaled_product(
        f, f.z, RightMatrix(f.h, f.sr, f.si, f.R, f.I), row_or_zeros(f.base.data, f.base.s1, f.I).at(0, f.I), dx);
  if (dz.data)
    scaled_product(
        f, f.x, RightMatrix(f.h, f.si, f.sr, f.I, f.R), row_or_zeros(f.bias.data, f.bias.s1, f.R).at(0, f.R), dz);
}

}  // namespace fasthyper
