// One output and one point, O = N = 1: rows of matrices, and no lanes.
//
//   P = x·H      y = Σ_r z (P + bias) + Σ_i x base      dz = g (P + bias)
//   W = z·Hᵀ     dx = g (W + base)
//
// x and z are left operands as they lie, and what they are multiplied by is all of H.
#pragma once

#include "rows.h"

namespace fasthyper {

constexpr int64_t TILE = tile_of(64);          // instances
constexpr int64_t SPAN = tile_of(128, WIDTH);  // columns
constexpr int64_t MOST = 1 << 18;              // numbers of H

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

// A matrix (k, n) as a right operand: where it lies, or packed, its rows padded with zeros to a multiple of WIDTH.
class Panel {
 public:
  Panel(const float* data, int64_t sk, int64_t sn, int64_t k, int64_t n)
      : n(n), data_(data), ld_(sk), packed_(sn == 1 && n % WIDTH == 0 ? 0 : k * whole_registers(n)) {
    if (!packed_) return;
    ld_ = whole_registers(n);
    float* const to = packed_.at(0, k * ld_);
    pack(data, sk, sn, to, ld_, k, n, ld_);
    for (int64_t i = 0; i < k; ++i) std::fill(to + i * ld_ + n, to + (i + 1) * ld_, 0.f);
    data_ = to;
  }

  // tile = u · columns [c, c + the result), from rows of k.
  int64_t multiply(const Left<float>& u, int64_t rows, int64_t k, int64_t c, float* tile) const {
    const int64_t width = std::min(SPAN, n - c);
    gemm(rows, whole_registers(width), k, u.data, u.ld, data_ + c, ld_, tile, SPAN, false);
    return width;
  }

  const int64_t n;

 private:
  const float* data_;
  int64_t ld_;
  Scratch<float> packed_;
};

// Calls f(first, last, tile) for tiles of instances, in parallel; `tile` holds what a Panel multiplies at a time.
template <class F>
void over_tiles(const Factors<float>& f, F&& run) {
  const int64_t tiles = ceil_div(f.B, TILE);
  at::parallel_for(0, tiles, tasks_per_thread(tiles, f.multiplications()), [&](int64_t begin, int64_t end) {
    const Scratch<float> tile(TILE * SPAN);
    for (int64_t t = begin; t < end; ++t) run(t * TILE, std::min(f.B, (t + 1) * TILE), tile.at(0, TILE * SPAN));
  });
}

// Whether this file serves: x and z can be read as they lie, and H, which may be packed, is not too large.
template <class S>
bool one_output(const Factors<S>& f, Schedule schedule) {
  const bool in_place = readable<S, float>(f.x.feature, f.I) && readable<S, float>(f.z.feature, f.R);
  return in_place && f.O == 1 && f.N == 1 && schedule == Schedule::project && f.I * f.R <= MOST;
}

// A row that all instances share, n zeros where there is none.
inline Scratch<float> row_of(const float* data, int64_t stride, int64_t n) {
  Scratch<float> copy(n);
  if (data) pack(data, 0, stride, copy.at(0, n), n, 1, n);
  else copy.block().fill(0.f);
  return copy;
}

inline void apply_one_output(const Factors<float>& f, const float* base_bias, Rows<float> y) {
  const Panel h(f.h, f.si, f.sr, f.I, f.R);
  const auto bias = row_of(f.bias.data, f.bias.s1, f.R), base = row_of(f.base.data, f.base.s1, f.I);
  over_tiles(f, [&](int64_t b0, int64_t b1, float* tile) {
    const Left<float> x{f.x.row(b0), f.x.instance}, z{f.z.row(b0), f.z.instance};
    float* const to = y.row(b0);  // an output is contiguous
    for (int64_t b = 0; b < b1 - b0; ++b) {
      float sum = base_bias ? *base_bias : 0.f;
      if (f.base.data) sum += dot(x.data + b * x.ld, base.at(0, f.I), f.I);
      if (f.bias.data) sum += dot(z.data + b * z.ld, bias.at(0, f.R), f.R);
      to[b] = sum;
    }
    for (int64_t r = 0, width; r < f.R; r += width) {
      width = h.multiply(x, b1 - b0, f.I, r, tile);
      for (int64_t b = 0; b < b1 - b0; ++b) to[b] += dot(tile + b * SPAN, z.data + b * z.ld + r, width);
    }
  });
}

// out = g (u · h + shared)
inline void scaled_product(
    const Factors<float>& f, const Rows<const float>& u, const Panel& h, const float* shared, Rows<float> out) {
  over_tiles(f, [&](int64_t b0, int64_t b1, float* tile) {
    const float* const g = f.g.row(b0);
    for (int64_t c = 0, width; c < h.n; c += width) {
      width = h.multiply({u.row(b0), u.instance}, b1 - b0, u.features, c, tile);
      float* to = out.row(b0) + c;
      for (int64_t b = 0; b < b1 - b0; ++b, to += out.instance) {
        const float* const t = tile + b * SPAN;
        const float factor = g[b * f.g.instance];
        for (int64_t k = 0; k < width; ++k) to[k] = factor * (t[k] + shared[c + k]);
      }
    }
  });
}

inline void grads_one_output(const Factors<float>& f, Rows<float> dx, Rows<float> dz) {
  if (dx.data)
    scaled_product(f, f.z, Panel(f.h, f.sr, f.si, f.R, f.I), row_of(f.base.data, f.base.s1, f.I).at(0, f.I), dx);
  if (dz.data)
    scaled_product(f, f.x, Panel(f.h, f.si, f.sr, f.I, f.R), row_of(f.bias.data, f.bias.s1, f.R).at(0, f.R), dz);
}

}  // namespace fasthyper
