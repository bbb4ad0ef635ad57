// dx and dz in one pass: each tile of G is computed in registers, and reduced to both.
//
//     G[m, r]  = Σ_o g[m, o] H[o, i, r]                     for one i at a time
//     dx[m, i] = Σ_r G[m, r] z[m, r]  +  Σ_o g[m, o] W0[o, i]
//     dz[m, r] = Σ_i G[m, r] x[m, i]  +  Σ_o g[m, o] bias[o, r]
//
// A CTA computes BM rows for the i of a split. Its warps divide the rows (WM) and the i of a stage (WI). R is divided
// into tiles of per_row, O into tiles of 64. bias is treated as H of one more i, for which x is one. If O is at most
// 64, fragments of g stay in registers, and 16 columns of G are reduced before the next 16 are computed.
#pragma once
#include <cstdint>

#include "activation.h"
#include "fragments.h"
#include "instructions.h"
#include "numbers.h"
#include "tiles.h"
#include "views.h"

namespace fasthyper {

template <class T>
struct DxDz {
  RowView<T> g, z, x;
  const T *h, *bias, *base;
  int64_t h_o, h_i, h_r, bias_o, bias_r, base_o, base_i;
  T* dx;         // (M, I), or null
  Output<T> dz;  // (M, R), or partial sums (splits, M, R); or null
  int M, N, I, O, R, per_split;
  int g_width, h_width, bias_width, base_width;
  bool z_aligned, tf32;
  Activation activation;  // of x: dx is then the gradient of its argument
};

template <class T, int WM_, int WI_>
struct DxDzShape {
  static constexpr int WM = WM_, WI = WI_, BM = 16 * WM, THREADS = 32 * WM * WI, STAGES = 3;
  static constexpr int NT = per_row<T> / 8;                        // columns of G in a warp, divided by eight
  static constexpr int DEPTH = 64, O_STEPS = DEPTH / per_step<T>;  // of O per tile
  static constexpr bool G_OPERAND_IN_REGISTERS = WM == 2;          // requires O <= DEPTH

  INLINE static int tile_rows(int O) { return least(DEPTH, cdiv(O, per_step<T>) * per_step<T>); }
  INLINE static int g_bytes(int O) { return cdiv(O, per_row<T>) * BM * ROW_BYTES; }
  INLINE static int stage_bytes(int O) { return WI * tile_rows(O) * ROW_BYTES; }
  static constexpr int REDUCTION_BYTES = (WI - 1) * BM * per_row<T> * sizeof(float);
  INLINE static int smem_bytes(int O, int per_split, bool dx) {
    return g_bytes(O) + STAGES * stage_bytes(O) + REDUCTION_BYTES +
           (dx ? BM * per_split * static_cast<int>(sizeof(float)) : 0);
  }
};

// CTAs of few rows, and of many.
template <class T>
using NarrowDxDz = DxDzShape<T, 2, 4>;
template <class T>
using WideDxDz = DxDzShape<T, 8, 1>;

// ACTIVE: f.activation may apply to x.
template <class T, class Shape, bool ACTIVE>
class DxDzCta {
  const DxDz<T>& f;
  char *const g_tiles, *const stages;
  float *const reduction, *const dx;
  const int m0, i_begin, i_end, split;
  const int lane = thread() % 32, wm = thread() / 32 % Shape::WM, wi = thread() / 32 / Shape::WM;
  const int inputs;  // of this split, and one for bias

  using Z = uint32_t[Shape::NT * 4 / per_word<T>];
  using Columns = float[Shape::NT][4];                                                // 16 rows by per_row columns r
  using G16 = float[2][4];                                                            // 16 rows by 16 columns r
  using Fragments = uint32_t[Shape::G_OPERAND_IN_REGISTERS ? Shape::O_STEPS : 1][4];  // of g

  // A stage has one tile for each wi: H of input i0 + wi from r0 on, or W0 from column i0 + wi·per_row on (base); rows
  // from o0 on.
  struct TileCoord {
    bool base;
    int r0, i0, o0;
  };

 public:
  DEVICE DxDzCta(const DxDz<T>& f, char* smem, int cta, int split)
      : f(f),
        g_tiles(smem),
        stages(smem + Shape::g_bytes(f.O)),
        reduction(reinterpret_cast<float*>(stages + Shape::STAGES * Shape::stage_bytes(f.O))),
        dx(reduction + Shape::REDUCTION_BYTES / sizeof(float)),
        m0(cta * Shape::BM),
        i_begin(split * f.per_split),
        i_end(least(f.I, i_begin + f.per_split)),
        split(split),
        inputs(i_end - i_begin + (f.bias && f.dz.requested() && split == 0)) {}

  DEVICE void run() {
    load_g();
    for (int k = thread(); f.dx && k < Shape::BM * f.per_split; k += Shape::THREADS) dx[k] = 0.f;
    TileCoord coord{false, 0, i_begin, 0};
    const int stage_bytes = Shape::stage_bytes(f.O);
    int stage = 0;
    const auto load_ahead = [&](int tiles) {
      TileCoord next_load = coord;
      for (int k = 0; k < tiles; ++k) advance(next_load);
      const int to = stage + tiles;
      if (!done(next_load))
        load_stage(next_load, stages + (to < Shape::STAGES ? to : to - Shape::STAGES) * stage_bytes);
      cp_async_commit_group();  // even if empty: one group per stage
    };
    for (int k = 0; k < Shape::STAGES - 1; ++k) load_ahead(k);

    Z z;
    Columns dz, G;
    Fragments g;
    float x[2], next_x[2], dx_of_i[2];
    load_x(next_x, coord);
    for (bool g_loaded = false; !done(coord); advance(coord)) {
      cp_async_wait_group<Shape::STAGES - 2>();
      sync_threads();
      load_ahead(Shape::STAGES - 1);
      if (Shape::G_OPERAND_IN_REGISTERS && !g_loaded) load_g_fragments(g), g_loaded = true;
      if (!coord.base && coord.i0 == i_begin && coord.o0 == 0) begin_r_tile(coord, z, dz);
      if (coord.o0 == 0) {
#pragma unroll
        for (int h = 0; h < 2; ++h) x[h] = next_x[h], dx_of_i[h] = 0.f;
        TileCoord next = coord;
        next.o0 = f.O;
        advance(next);
        load_x(next_x, next);
      }
      const char* const tile = stages + stage * stage_bytes + wi * Shape::tile_rows(f.O) * ROW_BYTES;
      stage = stage + 1 < Shape::STAGES ? stage + 1 : 0;
      const int count = column_count(coord);
      if constexpr (Shape::G_OPERAND_IN_REGISTERS) {
#pragma unroll
        for (int q = 0; q < Shape::NT / 2; ++q) {
          if (16 * q >= count) break;
          G16 columns = {};
          multiply(columns, g, tile, q);
          reduce_columns(columns, q, coord, x, z, dz, dx_of_i);
        }
      } else {
        multiply_all(G, coord, tile, count);
        if (coord.o0 + Shape::DEPTH < f.O) continue;
#pragma unroll
        for (int q = 0; q < Shape::NT / 2; ++q)
          if (16 * q < count) reduce_columns(reinterpret_cast<const G16&>(G[2 * q]), q, coord, x, z, dz, dx_of_i);
      }
      if (coord.base) continue;
      if (f.dx && coord.i0 + wi < i_end) add_to_dx(dx_of_i, coord);
      if (coord.i0 + Shape::WI >= i_begin + inputs && f.dz.requested()) end_r_tile(coord, dz);
    }
    if (f.dx) store_dx();
  }

 private:
  // The order of stages: o within i within r of H; then o within i of W0.
  DEVICE void advance(TileCoord& coord) const {
    coord.o0 += Shape::DEPTH;
    if (coord.o0 < f.O) return;
    coord.o0 = 0;
    if (coord.base) {
      coord.i0 += Shape::WI * per_row<T>;
      return;
    }
    coord.i0 += Shape::WI;
    if (coord.i0 < i_begin + inputs) return;
    coord.i0 = i_begin, coord.r0 += per_row<T>;
    if (coord.r0 >= f.R) coord.base = true, coord.r0 = 0;
  }
  DEVICE bool done(const TileCoord& coord) const { return coord.base && (!f.base || !f.dx || coord.i0 >= i_end); }

  // Load x of a lane's two rows, for the input of its warp; for bias, x is one.
  DEVICE void load_x(float (&x)[2], const TileCoord& coord) const {
    const int i = coord.i0 + wi;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int m = row_of(h);
      x[h] = i == i_end ? 1.f : 0.f;
      if (coord.base || i >= i_end || m >= f.M || !f.dz.requested()) continue;
      x[h] = static_cast<float>(f.x.row(m, f.N)[i * f.x.stride]);
      if (ACTIVE && f.activation != Activation::none)
        x[h] = static_cast<float>(static_cast<T>(activate(x[h], f.activation)));
    }
  }

  DEVICE int row_of(int h) const { return m0 + 16 * wm + lane / 4 + 8 * h; }

  DEVICE void load_g() {
    for (int tile = 0; tile < cdiv(f.O, per_row<T>); ++tile)
      load_tile<T>(
          g_tiles + tile * Shape::BM * ROW_BYTES, Shape::BM, STEPS, f.g_width, f.g.stride, thread(), Shape::THREADS,
          [&](int row, int step) -> Span<T> {
            const int o = tile * per_row<T> + step * per_step<T>;
            if (m0 + row >= f.M || o >= f.O) return {nullptr, 0};
            return {f.g.row(m0 + row, f.N) + o * f.g.stride, f.O - o};
          });
  }

  DEVICE void load_stage(const TileCoord& coord, char* to) const {
    const int rows = Shape::tile_rows(f.O);
    if (!coord.base && f.h_width == 16 && coord.i0 + Shape::WI <= i_end) load_slots(coord, to, rows);
    else load_tiles(coord, to, rows);
  }

  // The fast path, which takes most of the time: all WI inputs are in range, and rows are copied 16 bytes at a time.
  DEVICE void load_slots(const TileCoord& coord, char* to, int rows) const {
#pragma unroll
    for (int k = 0; k < cdiv(Shape::DEPTH * 8, Shape::THREADS); ++k) {
      const CopySlot<T, Shape::THREADS> slot(k);
      if (slot.row >= rows) break;
      const int r = coord.r0 + slot.chunk * slot.ELEMENTS, o = coord.o0 + slot.row;
      const T* const from = f.h + o * f.h_o + coord.i0 * f.h_i + r;
#pragma unroll 1
      for (int w = 0; w < Shape::WI; ++w) slot.copy(to + w * rows * ROW_BYTES, from + w * f.h_i, o < f.O ? f.R - r : 0);
    }
  }

  DEVICE void load_tiles(const TileCoord& coord, char* to, int rows) const {
#pragma unroll 1
    for (int w = 0; w < Shape::WI; ++w) {
      const int i = coord.base ? coord.i0 + w * per_row<T> : coord.i0 + w;
      const bool is_bias = !coord.base && i == i_end;
      if (i >= (coord.base ? i_end : i_begin + inputs)) break;
      const T* const from = coord.base ? f.base + i * f.base_i : is_bias ? f.bias : f.h + i * f.h_i;
      const int64_t stride = coord.base ? f.base_i : is_bias ? f.bias_r : f.h_r;
      const int64_t row_stride = coord.base ? f.base_o : is_bias ? f.bias_o : f.h_o;
      const int width = coord.base ? f.base_width : is_bias ? f.bias_width : f.h_width;
      const int count = coord.base ? i_end - i : f.R - coord.r0;
      load_tile<T>(
          to + w * rows * ROW_BYTES, rows, STEPS, width, stride, thread(), Shape::THREADS,
          [&](int row, int step) -> Span<T> {
            const int j = step * per_step<T>;
            if (coord.o0 + row >= f.O || j >= count) return {nullptr, 0};
            return {from + (coord.o0 + row) * row_stride + (coord.r0 + j) * stride, count - j};
          });
    }
  }

  // Reset dz for the next tile of R, and load z in the layout of the accumulators.
  DEVICE void begin_r_tile(const TileCoord& coord, Z& z, Columns& dz) const {
#pragma unroll
    for (int nt = 0; nt < Shape::NT; ++nt)
#pragma unroll
      for (int e = 0; e < 4; ++e) dz[nt][e] = 0.f;
    constexpr int words = 2 / per_word<T>;  // of a lane's two columns
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int m = row_of(h);
      const T* const row = f.dx && m < f.M ? f.z.row(m, f.N) : nullptr;
#pragma unroll
      for (int nt = 0; nt < Shape::NT; ++nt)
#pragma unroll
        for (int e = 0; e < words; ++e) {
          const int r = coord.r0 + nt * 8 + lane % 4 * 2 + e;
          z[(nt * 2 + h) * words + e] = row ? word_at<T>({row, f.R}, r, f.z.stride, f.z_aligned) : 0;
        }
    }
  }

  // Return z for the element of G in row h and column e of a lane.
  DEVICE float z_at(const Z& z, int nt, int h, int e) const {
    if constexpr (per_word<T> == 1) return as_float(z[(nt * 2 + h) * 2 + e]);
    else return unpack(z[nt * 2 + h], e, T{});
  }

  // Return the number of columns, r or i, in the tile of this warp.
  DEVICE int column_count(const TileCoord& coord) const {
    if (coord.base) return i_end - coord.i0 - wi * per_row<T>;
    return coord.i0 + wi < i_begin + inputs ? f.R - coord.r0 : 0;
  }

  DEVICE const char* g_tile(int o) const { return g_tiles + o / per_row<T> * Shape::BM * ROW_BYTES; }

  DEVICE void load_g_fragments(Fragments& g) const {
#pragma unroll
    for (int j = 0; j < Shape::O_STEPS; ++j)
      if (j * per_step<T> < f.O) load_left_fragment(g[j], g_tile(j * per_step<T>), 16 * wm, j % STEPS, lane);
  }

  // Compute 16 columns of G from 16·q on, over all of O.
  DEVICE void multiply(G16& G, const Fragments& g, const char* tile, int q) const {
    const int lane = opaque(this->lane);  // keeps addresses out of registers: none are free
#pragma unroll
    for (int j = 0; j < Shape::O_STEPS; ++j) {
      if (j * per_step<T> >= f.O) break;
      uint32_t right[4];
      load_right_fragment_transposed<T>(right, tile, j * per_step<T>, 16 * q, lane);
      PlainFragment<T> left;
      left.set(g[j]);
      left.accumulate(G[0], right[0], right[1], f.tf32);
      left.accumulate(G[1], right[2], right[3], f.tf32);
    }
  }

  // Add one tile of O to all columns of G.
  DEVICE void multiply_all(Columns& G, const TileCoord& coord, const char* tile, int count) const {
    if (coord.o0 == 0)
#pragma unroll
      for (int nt = 0; nt < Shape::NT; ++nt)
#pragma unroll
        for (int e = 0; e < 4; ++e) G[nt][e] = 0.f;
#pragma unroll
    for (int j = 0; j < Shape::O_STEPS; ++j) {
      const int o = coord.o0 + j * per_step<T>;
      if (o >= f.O || count <= 0) break;
      uint32_t words[4];
      PlainFragment<T> left;
      load_left_fragment(words, g_tile(o), 16 * wm, j % STEPS, lane);
      left.set(words);
#pragma unroll
      for (int q = 0; q < Shape::NT / 2; ++q) {
        if (16 * q >= count) break;
        load_right_fragment_transposed<T>(words, tile, j * per_step<T>, 16 * q, lane);
        left.accumulate(G[2 * q], words[0], words[1], f.tf32);
        left.accumulate(G[2 * q + 1], words[2], words[3], f.tf32);
      }
    }
  }

  // Reduce 16 columns of G from 16·q on to dx and dz; columns of W0 are terms of dx themselves.
  DEVICE void reduce_columns(
      const G16& G, int q, const TileCoord& coord, const float (&x)[2], const Z& z, Columns& dz, float (&dx_of_i)[2]) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int h = k >> 1, e = k & 1, nt = 2 * q + n;
        if (coord.base) {
          const int i = coord.i0 + wi * per_row<T> + nt * 8 + lane % 4 * 2 + e;
          if (i < i_end) dx[(row_of(h) - m0) * f.per_split + i - i_begin] += G[n][k];
        } else {
          dz[nt][k] += G[n][k] * x[h];
          dx_of_i[h] += G[n][k] * z_at(z, nt, h, e);
        }
      }
  }

  // Add the partial sums of the four lanes of a row, for one input.
  DEVICE void add_to_dx(const float (&dx_of_i)[2], const TileCoord& coord) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = dx_of_i[h];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      if (lane % 4 == 0) dx[(row_of(h) - m0) * f.per_split + coord.i0 + wi - i_begin] += sum;
    }
  }

  // Add dz of the WI warps, in order, and store it.
  DEVICE void end_r_tile(const TileCoord& coord, Columns& dz) {
    constexpr int size = Shape::NT * 4 * 32;  // of a warp
    if (wi > 0)
#pragma unroll
      for (int nt = 0; nt < Shape::NT; ++nt)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          reduction[((wi - 1) * Shape::WM + wm) * size + (nt * 4 + e) * 32 + lane] = dz[nt][e];
    sync_threads();
    if (wi == 0)
#pragma unroll
      for (int nt = 0; nt < Shape::NT; ++nt)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          for (int other = 0; other < Shape::WI - 1; ++other)
            dz[nt][e] += reduction[(other * Shape::WM + wm) * size + (nt * 4 + e) * 32 + lane];
          const int m = row_of(e >> 1), r = coord.r0 + nt * 8 + lane % 4 * 2 + (e & 1);
          if (m < f.M && r < f.R) f.dz.store((static_cast<int64_t>(split) * f.M + m) * f.R + r, dz[nt][e]);
        }
    sync_threads();
  }

  DEVICE void store_dx() {
    sync_threads();
    const int count = i_end - i_begin;
    for (int k = thread(); k < Shape::BM * count; k += Shape::THREADS) {
      const int m = m0 + k / count, i = i_begin + k % count;
      if (m >= f.M) break;
      float value = dx[(m - m0) * f.per_split + i - i_begin];
      if (ACTIVE && f.activation != Activation::none)
        value *= activation_derivative(static_cast<float>(f.x.row(m, f.N)[i * f.x.stride]), f.activation);
      f.dx[static_cast<int64_t>(m) * f.I + i] = static_cast<T>(value);
    }
  }
};

}  // namespace fasthyper
