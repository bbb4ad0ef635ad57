// dx and dz from one pass: G is made a tile at a time and reduced twice while it is in registers.
//
//     G[m, r]  = Σ_o g[m, o] H[o, i, r]                     for one i after another
//     dx[m, i] = Σ_r G[m, r] z[m, r]  +  Σ_o g[m, o] W0[o, i]
//     dz[m, r] = Σ_i G[m, r] x[m, i]  +  Σ_o g[m, o] bias[o, r]
//
// A block has BM rows and a split's range of i; its warps share the rows (WM) and the i of a tile (WI). R is taken a
// tile's row at a time, and O 64 at a time. bias is H of one more i, for which x is one. Where O is no more than that,
// g stays in registers, and a pair of eight columns of G is reduced before the next one is made.
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
  Rows<T> g, z, x;
  const T *h, *bias, *base;
  int64_t h_o, h_i, h_r, bias_o, bias_r, base_o, base_i;
  T* dx;         // (M, I), or null
  Target<T> dz;  // (M, R), splits before; or null
  int M, N, I, O, R, per_split;
  int g_width, h_width, bias_width, base_width;
  bool z_aligned, tf32;
  Activation activation;  // of x: the result is then the gradient of what it is applied to
};

template <class T, int WM_, int WI_>
struct DxDzShape {
  static constexpr int WM = WM_, WI = WI_, BM = 16 * WM, THREADS = 32 * WM * WI, STAGES = 3;
  static constexpr int NT = per_row<T> / 8;                           // columns of G in a warp, by eight
  static constexpr int DEPTH = 64, STEPS_OF_O = DEPTH / per_step<T>;  // of O at a time
  static constexpr bool KEEPS_G = WM == 2;                            // then O is DEPTH at most

  INLINE static int rows_of_tile(int O) { return least(DEPTH, cdiv(O, per_step<T>) * per_step<T>); }
  INLINE static int g_bytes(int O) { return cdiv(O, per_row<T>) * BM * ROW_BYTES; }
  INLINE static int stage_bytes(int O) { return WI * rows_of_tile(O) * ROW_BYTES; }
  static constexpr int SUMS = (WI - 1) * BM * per_row<T> * sizeof(float);
  INLINE static int shared_bytes(int O, int per_split, bool dx) {
    return g_bytes(O) + STAGES * stage_bytes(O) + SUMS + (dx ? BM * per_split * static_cast<int>(sizeof(float)) : 0);
  }
};

// ACTIVE: whether x may be what an activation makes of the rows that are given.
template <class T, class Shape, bool ACTIVE>
class DxDzBlock {
  const DxDz<T>& f;
  char *const g_tiles, *const stages;
  float *const sums, *const dx;
  const int m0, first, last, split;
  const int lane = thread() % 32, wm = thread() / 32 % Shape::WM, wi = thread() / 32 / Shape::WM;
  const int inputs;  // of this split, with that of bias

  using Z = uint32_t[Shape::NT * 4 / per_word<T>];
  using Columns = float[Shape::NT][4];                                // of 16 rows by a tile's row of R
  using G16 = float[2][4];                                            // a pair of eight columns of G
  using Words = uint32_t[Shape::KEEPS_G ? Shape::STEPS_OF_O : 1][4];  // of g

  // A tile for each wi: input i0 + wi, or columns of W0 from i0 + wi·per_row on; rows of O from o0 on.
  struct Piece {
    bool base;
    int r0, i0, o0;
  };

 public:
  DEVICE DxDzBlock(const DxDz<T>& f, char* memory, int block, int split)
      : f(f),
        g_tiles(memory),
        stages(memory + Shape::g_bytes(f.O)),
        sums(reinterpret_cast<float*>(stages + Shape::STAGES * Shape::stage_bytes(f.O))),
        dx(sums + Shape::SUMS / sizeof(float)),
        m0(block * Shape::BM),
        first(split * f.per_split),
        last(least(f.I, first + f.per_split)),
        split(split),
        inputs(last - first + (f.bias && f.dz.wanted() && split == 0)) {}

  DEVICE void run() {
    load_tile_of_g();
    for (int k = thread(); f.dx && k < Shape::BM * f.per_split; k += Shape::THREADS) dx[k] = 0.f;
    Piece at{false, 0, first, 0};
    const int stage_bytes = Shape::stage_bytes(f.O);
    int stage_at = 0;
    const auto bring_ahead = [&](int pieces) {
      Piece ahead = at;
      for (int k = 0; k < pieces; ++k) advance(ahead);
      const int stage = stage_at + pieces;
      if (!done(ahead)) bring(ahead, stages + (stage < Shape::STAGES ? stage : stage - Shape::STAGES) * stage_bytes);
      copy_commit();  // in any case: groups are counted as pieces
    };
    for (int k = 0; k < Shape::STAGES - 1; ++k) bring_ahead(k);

    Z z;
    Columns dz, G;
    Words g;
    float x[2], next_x[2], dx_of_i[2];
    inputs_of(next_x, at);
    for (bool begun = false; !done(at); advance(at)) {
      copy_wait<Shape::STAGES - 2>();
      sync();
      bring_ahead(Shape::STAGES - 1);
      if (Shape::KEEPS_G && !begun) words_of_g(g), begun = true;
      if (!at.base && at.i0 == first && at.o0 == 0) begin_round(at, z, dz);
      if (at.o0 == 0) {
#pragma unroll
        for (int h = 0; h < 2; ++h) x[h] = next_x[h], dx_of_i[h] = 0.f;
        Piece next = at;
        next.o0 = f.O;
        advance(next);
        inputs_of(next_x, next);
      }
      const char* const tile = stages + stage_at * stage_bytes + wi * Shape::rows_of_tile(f.O) * ROW_BYTES;
      stage_at = stage_at + 1 < Shape::STAGES ? stage_at + 1 : 0;
      const int count = columns_of(at);
      if constexpr (Shape::KEEPS_G) {
#pragma unroll
        for (int q = 0; q < Shape::NT / 2; ++q) {
          if (16 * q >= count) break;
          G16 pair = {};
          multiply(pair, g, tile, q);
          take(pair, q, at, x, z, dz, dx_of_i);
        }
      } else {
        multiply_all(G, at, tile, count);
        if (at.o0 + Shape::DEPTH < f.O) continue;
#pragma unroll
        for (int q = 0; q < Shape::NT / 2; ++q)
          if (16 * q < count) take(reinterpret_cast<const G16&>(G[2 * q]), q, at, x, z, dz, dx_of_i);
      }
      if (at.base) continue;
      if (f.dx && at.i0 + wi < last) add_to_dx(dx_of_i, at);
      if (at.i0 + Shape::WI >= first + inputs && f.dz.wanted()) end_round(at, dz);
    }
    if (f.dx) store_dx();
  }

 private:
  // O within inputs within rows of R; then W0, O within columns.
  DEVICE void advance(Piece& at) const {
    at.o0 += Shape::DEPTH;
    if (at.o0 < f.O) return;
    at.o0 = 0;
    if (at.base) {
      at.i0 += Shape::WI * per_row<T>;
      return;
    }
    at.i0 += Shape::WI;
    if (at.i0 < first + inputs) return;
    at.i0 = first, at.r0 += per_row<T>;
    if (at.r0 >= f.R) at.base = true, at.r0 = 0;
  }
  DEVICE bool done(const Piece& at) const { return at.base && (!f.base || !f.dx || at.i0 >= last); }

  // x of a lane's two rows and the input of its warp; one for bias.
  DEVICE void inputs_of(float (&x)[2], const Piece& at) const {
    const int i = at.i0 + wi;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int m = row_of(h);
      x[h] = i == last ? 1.f : 0.f;
      if (at.base || i >= last || m >= f.M || !f.dz.wanted()) continue;
      x[h] = static_cast<float>(f.x.row(m, f.N)[i * f.x.step]);
      if (ACTIVE && f.activation != Activation::none)
        x[h] = static_cast<float>(static_cast<T>(activated(x[h], f.activation)));
    }
  }

  DEVICE int row_of(int h) const { return m0 + 16 * wm + lane / 4 + 8 * h; }

  DEVICE void load_tile_of_g() {
    for (int tile = 0; tile < cdiv(f.O, per_row<T>); ++tile)
      load_tile<T>(
          g_tiles + tile * Shape::BM * ROW_BYTES, Shape::BM, STEPS, f.g_width, f.g.step, thread(), Shape::THREADS,
          [&](int row, int step) -> Span<T> {
            const int o = tile * per_row<T> + step * per_step<T>;
            if (m0 + row >= f.M || o >= f.O) return {nullptr, 0};
            return {f.g.row(m0 + row, f.N) + o * f.g.step, f.O - o};
          });
  }

  DEVICE void bring(const Piece& at, char* to) const {
    const int rows = Shape::rows_of_tile(f.O);
    if (!at.base && f.h_width == 16 && at.i0 + Shape::WI <= last) bring_slots(at, to, rows);
    else bring_tiles(at, to, rows);
  }

  // Tiles of inputs that are all there, of rows read 16 bytes at a time, which is where time is spent.
  DEVICE void bring_slots(const Piece& at, char* to, int rows) const {
#pragma unroll
    for (int k = 0; k < cdiv(Shape::DEPTH * 8, Shape::THREADS); ++k) {
      const Slot<T, Shape::THREADS> slot(k);
      if (slot.row >= rows) break;
      const int r = at.r0 + slot.chunk * slot.NUMBERS, o = at.o0 + slot.row;
      const T* const from = f.h + o * f.h_o + at.i0 * f.h_i + r;
#pragma unroll 1
      for (int w = 0; w < Shape::WI; ++w) slot.copy(to + w * rows * ROW_BYTES, from + w * f.h_i, o < f.O ? f.R - r : 0);
    }
  }

  DEVICE void bring_tiles(const Piece& at, char* to, int rows) const {
#pragma unroll 1
    for (int w = 0; w < Shape::WI; ++w) {
      const int i = at.base ? at.i0 + w * per_row<T> : at.i0 + w;
      const bool of_bias = !at.base && i == last;
      if (i >= (at.base ? last : first + inputs)) break;
      const T* const from = at.base ? f.base + i * f.base_i : of_bias ? f.bias : f.h + i * f.h_i;
      const int64_t stride = at.base ? f.base_i : of_bias ? f.bias_r : f.h_r;
      const int64_t row_stride = at.base ? f.base_o : of_bias ? f.bias_o : f.h_o;
      const int width = at.base ? f.base_width : of_bias ? f.bias_width : f.h_width;
      const int count = at.base ? last - i : f.R - at.r0;
      load_tile<T>(
          to + w * rows * ROW_BYTES, rows, STEPS, width, stride, thread(), Shape::THREADS,
          [&](int row, int step) -> Span<T> {
            const int j = step * per_step<T>;
            if (at.o0 + row >= f.O || j >= count) return {nullptr, 0};
            return {from + (at.o0 + row) * row_stride + (at.r0 + j) * stride, count - j};
          });
    }
  }

  // dz of a tile's row of R starts anew, and its z is read, as lanes hold columns of G.
  DEVICE void begin_round(const Piece& at, Z& z, Columns& dz) const {
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
          const int r = at.r0 + nt * 8 + lane % 4 * 2 + e;
          z[(nt * 2 + h) * words + e] = row ? word_at<T>({row, f.R}, r, f.z.step, f.z_aligned) : 0;
        }
    }
  }

  // The number of z beside that of G in column e of a lane's two, row h of its two.
  DEVICE float z_beside(const Z& z, int nt, int h, int e) const {
    if constexpr (per_word<T> == 1) return number(z[(nt * 2 + h) * 2 + e]);
    else return half_of(z[nt * 2 + h], e, T{});
  }

  // Columns of G that a warp has of a piece: of R, or of W0.
  DEVICE int columns_of(const Piece& at) const {
    if (at.base) return last - at.i0 - wi * per_row<T>;
    return at.i0 + wi < first + inputs ? f.R - at.r0 : 0;
  }

  DEVICE const char* tile_of_g(int o) const { return g_tiles + o / per_row<T> * Shape::BM * ROW_BYTES; }

  DEVICE void words_of_g(Words& g) const {
#pragma unroll
    for (int j = 0; j < Shape::STEPS_OF_O; ++j)
      if (j * per_step<T> < f.O) left_words(g[j], tile_of_g(j * per_step<T>), 16 * wm, j % STEPS, lane);
  }

  // Columns 16·q and on of G, all of O at once.
  DEVICE void multiply(G16& G, const Words& g, const char* tile, int q) const {
    const int lane = anew(this->lane);  // there are no registers to keep addresses
#pragma unroll
    for (int j = 0; j < Shape::STEPS_OF_O; ++j) {
      if (j * per_step<T> >= f.O) break;
      uint32_t words[4];
      right_words_transposed<T>(words, tile, j * per_step<T>, 16 * q, lane);
      Plain<T> left;
      left.set(g[j]);
      left.accumulate(G[0], words[0], words[1], f.tf32);
      left.accumulate(G[1], words[2], words[3], f.tf32);
    }
  }

  // All columns of G, a piece of O at a time.
  DEVICE void multiply_all(Columns& G, const Piece& at, const char* tile, int count) const {
    if (at.o0 == 0)
#pragma unroll
      for (int nt = 0; nt < Shape::NT; ++nt)
#pragma unroll
        for (int e = 0; e < 4; ++e) G[nt][e] = 0.f;
#pragma unroll
    for (int j = 0; j < Shape::STEPS_OF_O; ++j) {
      const int o = at.o0 + j * per_step<T>;
      if (o >= f.O || count <= 0) break;
      uint32_t words[4];
      Plain<T> left;
      left_words(words, tile_of_g(o), 16 * wm, j % STEPS, lane);
      left.set(words);
#pragma unroll
      for (int q = 0; q < Shape::NT / 2; ++q) {
        if (16 * q >= count) break;
        right_words_transposed<T>(words, tile, j * per_step<T>, 16 * q, lane);
        left.accumulate(G[2 * q], words[0], words[1], f.tf32);
        left.accumulate(G[2 * q + 1], words[2], words[3], f.tf32);
      }
    }
  }

  // Reduce columns 16·q and on of G; of W0, they are a part of dx itself.
  DEVICE void take(
      const G16& G, int q, const Piece& at, const float (&x)[2], const Z& z, Columns& dz, float (&dx_of_i)[2]) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int h = k >> 1, e = k & 1, nt = 2 * q + n;
        if (at.base) {
          const int i = at.i0 + wi * per_row<T> + nt * 8 + lane % 4 * 2 + e;
          if (i < last) dx[(row_of(h) - m0) * f.per_split + i - first] += G[n][k];
        } else {
          dz[nt][k] += G[n][k] * x[h];
          dx_of_i[h] += G[n][k] * z_beside(z, nt, h, e);
        }
      }
  }

  // The four lanes of a row add what they have of an input.
  DEVICE void add_to_dx(const float (&dx_of_i)[2], const Piece& at) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = dx_of_i[h];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      if (lane % 4 == 0) dx[(row_of(h) - m0) * f.per_split + at.i0 + wi - first] += sum;
    }
  }

  // dz of the warps of a row comes together, in order, and goes out.
  DEVICE void end_round(const Piece& at, Columns& dz) {
    constexpr int size = Shape::NT * 4 * 32;  // of a warp
    if (wi > 0)
#pragma unroll
      for (int nt = 0; nt < Shape::NT; ++nt)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[((wi - 1) * Shape::WM + wm) * size + (nt * 4 + e) * 32 + lane] = dz[nt][e];
    sync();
    if (wi == 0)
#pragma unroll
      for (int nt = 0; nt < Shape::NT; ++nt)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          for (int other = 0; other < Shape::WI - 1; ++other)
            dz[nt][e] += sums[(other * Shape::WM + wm) * size + (nt * 4 + e) * 32 + lane];
          const int m = row_of(e >> 1), r = at.r0 + nt * 8 + lane % 4 * 2 + (e & 1);
          if (m < f.M && r < f.R) f.dz.store((static_cast<int64_t>(split) * f.M + m) * f.R + r, dz[nt][e]);
        }
    sync();
  }

  DEVICE void store_dx() {
    sync();
    const int count = last - first;
    for (int k = thread(); k < Shape::BM * count; k += Shape::THREADS) {
      const int m = m0 + k / count, i = first + k % count;
      if (m >= f.M) break;
      float value = dx[(m - m0) * f.per_split + i - first];
      if (ACTIVE && f.activation != Activation::none)
        value *= derivative(static_cast<float>(f.x.row(m, f.N)[i * f.x.step]), f.activation);
      f.dx[static_cast<int64_t>(m) * f.I + i] = static_cast<T>(value);
    }
  }
};

}  // namespace fasthyper
