// x ⊗ z, folded into the K dimension of one product. The generated operand is made in registers, step by step.
//
//     out[m, p] = Σ_c Σ_k u[m, c] v[m, k] H(c, k, p)  +  Σ_c u[m, c] A(p, c)  +  Σ_k v[m, k] C(p, k)  +  d[p]
//
//             m       u   v   c   k   p     A     C     d
//     y    (b, n)     x   z   i   r   o    W0    bias   b0
//     dx   (b, n)     g   z   o   r   i    W0ᵀ
//
// A block has BM rows and BP columns of out; its warps share the rows (WM) and the steps of a tile of H (WK). Blocks go
// on to further rows with the tiles of H still in shared memory, where all of them fit.
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
struct Fold {
  Rows<T> u, v;
  const T *h, *a, *c, *d;
  int64_t h_c, h_k, h_p, a_p, a_c, c_p, c_k, d_p;
  T* out;
  float* partial;  // where the sum is in parts, of `per_split` c each
  int M, N, C, K, P, per_split;
  int h_width, a_width, c_width;  // bytes that may be read at a time
  bool v_aligned, u_aligned, tf32;
  Activation activation;  // of u
  // Steps of a tile that have the same c, and how many c it has; of each step, which of them, and where its k begin.
  int steps, together;
  uint32_t c_of_step, k_of_step;  // a byte each

  void cut() {
    steps = least(STEPS, cdiv(K, per_step<T>)), together = STEPS / steps;
    for (int step = 0; step < STEPS; ++step) {
      c_of_step |= static_cast<uint32_t>(step / steps) << 8 * step;
      k_of_step |= static_cast<uint32_t>(step % steps * per_step<T>) << 8 * step;
    }
  }
  INLINE int pieces(int first, int last, bool shared) const {
    const int products = cdiv(K, steps * per_step<T>) * cdiv(last - first, together);
    return products + (shared && a ? cdiv(C, per_row<T>) : 0) + (shared && c ? cdiv(K, per_row<T>) : 0);
  }
};

template <class T, int WM_, int WK_, int MT_, int NT_>
struct FoldShape {
  static constexpr int WM = WM_, WK = WK_, MT = MT_, NT = NT_;
  static constexpr int BM = 16 * WM * MT, BP = 8 * NT, THREADS = 32 * WM * WK, TILE = BP * ROW_BYTES, AHEAD = 3;
  static constexpr int SUMS = (WK - 1) * BM * BP * sizeof(float);  // what the other warps of a row hand over
  static constexpr int AT_ONCE = WK > 1 && NT < 8 ? 2 : 1;         // blocks side by side that a part has registers for
  static int shared_bytes(int tiles) { return tiles * TILE + SUMS; }
};

// ACTIVE: whether u may be what an activation makes of the rows that are given.
template <class T, class Shape, bool ACTIVE>
class FoldBlock {
  static constexpr int WM = Shape::WM, WK = Shape::WK, MT = Shape::MT, NT = Shape::NT, J = STEPS / WK;
  const Fold<T>& f;
  char* const memory;
  const int tiles, p0, split, first, last;
  const int lane = thread() % 32, warp = thread() / 32;

  // What a tile is multiplied with: products with c0 and what follows it, or u or v as they are.
  enum Kind { product, from_u, from_v };
  struct Piece {
    Kind kind;
    int k0, c0;
  };

 public:
  // Columns p0 and on, of the sum over c of this split; `tiles`: tiles that the memory holds.
  DEVICE FoldBlock(const Fold<T>& f, char* memory, int tiles, int p0, int split)
      : f(f),
        memory(memory),
        tiles(tiles),
        p0(p0),
        split(split),
        first(split * f.per_split),
        last(least(f.C, first + f.per_split)) {}

  // Rows m0 and on; `store(m, p, value)` gets the sums that are in range. again: for other rows than before.
  template <class Store>
  DEVICE void run(int m0, bool again, Store store) {
    const int wm = warp % WM, wk = warp / WM, pieces = f.pieces(first, last, split == 0);
    const bool resident = again && pieces <= tiles;
    float acc[MT][NT][4] = {};
    uint32_t v[J][MT][4], u[J][MT][2], next_u[J][MT][2];
    const T *u_row[MT][2], *v_row[MT][2];
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int m = least(m0 + (wm * MT + mt) * 16 + lane / 4 + 8 * h, f.M - 1);  // beyond it nothing is stored
        u_row[mt][h] = f.u.row(m, f.N);
        v_row[mt][h] = f.v.row(m, f.N);
      }

    sync();  // with the reads of other rows' tiles and sums
    Piece at{product, 0, first}, ahead = at;
    Source source = aimed(ahead);
    int tile_at = 0;
    const auto bring_next = [&](int k, int tile) {
      if (k < pieces) bring(ahead, source, memory + tile * Shape::TILE);
      copy_commit();  // in any case: groups are counted as pieces
      advance(ahead);
      aim(source, ahead);
    };
    const auto arrived = [&](int k) {
      if (!resident) {
        copy_wait<Shape::AHEAD - 1>();
        sync();
        const int ahead_of_it = tile_at + Shape::AHEAD;
        bring_next(k + Shape::AHEAD, ahead_of_it < tiles ? ahead_of_it : ahead_of_it - tiles);
      }
      const char* const tile = memory + tile_at * Shape::TILE;
      tile_at = tile_at + 1 < tiles ? tile_at + 1 : 0;
      return tile;
    };
    // Sums over a tile, of what `left_of` makes of the words of each step.
    const auto accumulate = [&](const char* tile, const Piece& of, auto left_of) {
      const int lane = WK > 1 && NT == 8 ? anew(this->lane) : this->lane;  // no registers to keep addresses
#pragma unroll
      for (int jj = 0; jj < J; ++jj) {
        const int j = jj * WK + wk;
        if (beyond(of, j)) continue;
        uint32_t w[NT / 2][4];
#pragma unroll
        for (int q = 0; q < NT / 2; ++q) right_words(w[q], tile, 16 * q, j, lane);
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
          const auto left = left_of(jj, mt);
#pragma unroll
          for (int nt = 0; nt < NT; ++nt)
            left.accumulate(acc[mt][nt], w[nt / 2][nt % 2 * 2], w[nt / 2][nt % 2 * 2 + 1], f.tf32);
        }
      }
    };

    for (int k = 0; k < Shape::AHEAD && !resident; ++k) bring_next(k, k);
    multipliers(next_u, at, u_row, wk);
    int k = 0;
    for (; at.kind == product; ++k) {
      const char* const tile = arrived(k);
#pragma unroll
      for (int jj = 0; jj < J; ++jj)
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
          for (int h = 0; h < 2; ++h) u[jj][mt][h] = next_u[jj][mt][h];
      if (at.c0 == first) operands(v, at, f.v, v_row, f.K, f.v_aligned, wk);
      const Piece now = at;
      advance(at);
      multipliers(next_u, at, u_row, wk);
      accumulate(tile, now, [&](int jj, int mt) {
        Generated<T> left;
        left.set(v[jj][mt], u[jj][mt][0], u[jj][mt][1]);
        return left;
      });
    }
    for (; k < pieces; ++k, advance(at)) {
      const char* const tile = arrived(k);
      if (at.kind == from_u) operands(v, at, f.u, u_row, f.C, f.u_aligned, wk);
      else operands(v, at, f.v, v_row, f.K, f.v_aligned, wk);
      accumulate(tile, at, [&](int jj, int mt) {
        Plain<T> left;
        left.set(v[jj][mt]);
        return left;
      });
    }
    if constexpr (WK > 1) add_warps(acc, wm, wk);
    if (wk > 0) return;
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int m = m0 + (wm * MT + mt) * 16 + lane / 4 + 8 * (e >> 1), p = p0 + nt * 8 + lane % 4 * 2 + (e & 1);
          if (m < f.M && p < f.P) store(m, p, acc[mt][nt][e]);
        }
  }

 private:
  // All products, k by k, then, in the first split, A and C.
  DEVICE void advance(Piece& at) const {
    if (at.kind == product) {
      at.c0 += f.together;
      if (at.c0 < last) return;
      at.c0 = first, at.k0 += f.steps * per_step<T>;
      if (at.k0 < f.K) return;
      at = {f.a ? from_u : from_v, 0, 0};
    } else {
      at.k0 += per_row<T>;
      if (at.kind == from_u && at.k0 >= f.C) at = {from_v, 0, 0};
    }
  }

  DEVICE int column(const Piece& at, int step) const {
    return at.k0 + (at.kind == product ? static_cast<int>(f.k_of_step >> 8 * step & 255) : step * per_step<T>);
  }
  DEVICE int which_c(const Piece& at, int step) const { return at.c0 + (f.c_of_step >> 8 * step & 255); }

  DEVICE bool beyond(const Piece& at, int step) const {
    if (at.kind != product) return column(at, step) >= (at.kind == from_u ? f.C : f.K);
    return which_c(at, step) >= least(last, at.c0 + f.together) || column(at, step) >= f.K;
  }

  // What a thread copies of a tile of H whose rows are read 16 bytes at a time: from where, of which c, numbers left.
  struct Source {
    const T* from;
    int c, count;
  };
  DEVICE Source aimed(const Piece& at) const {
    const Slot<T, Shape::THREADS> slot(0);
    const int c = which_c(at, slot.step()), j = column(at, slot.step()) + slot.column();
    return {f.h + (p0 + slot.row) * f.h_p + c * f.h_c + j, c < at.c0 + f.together ? c : last, f.K - j};
  }
  DEVICE void aim(Source& source, const Piece& next) const {
    if (next.c0 == first) {
      source = aimed(next);
    } else {
      source.from += f.together * f.h_c;
      source.c += f.together;
    }
  }

  DEVICE void bring(const Piece& at, const Source& source, char* tile) const {
    if (at.kind == product && f.h_width == 16) {
#pragma unroll
      for (int k = 0; k < cdiv(Shape::BP * 8, Shape::THREADS); ++k) {
        const Slot<T, Shape::THREADS> slot(k);
        if (Shape::BP * 8 < Shape::THREADS && slot.row >= Shape::BP) break;
        const bool there = source.c < last && p0 + slot.row < f.P;
        slot.copy(tile, source.from + k * (Shape::THREADS / 8) * f.h_p, there ? source.count : 0);
      }
      return;
    }
    const int64_t row_stride = at.kind == product ? f.h_p : at.kind == from_u ? f.a_p : f.c_p;
    const int64_t stride = at.kind == product ? f.h_k : at.kind == from_u ? f.a_c : f.c_k;
    const T* const from = at.kind == product ? f.h : at.kind == from_u ? f.a : f.c;
    const int width = at.kind == product ? f.h_width : at.kind == from_u ? f.a_width : f.c_width;
    const int limit = at.kind == from_u ? f.C : f.K;
    load_tile<T>(tile, Shape::BP, STEPS, width, stride, thread(), Shape::THREADS, [&](int row, int step) -> Span<T> {
      if (p0 + row >= f.P || beyond(at, step)) return {nullptr, 0};
      const int64_t of_c = at.kind == product ? which_c(at, step) * f.h_c : 0;
      const int j = column(at, step);
      return {from + of_c + (p0 + row) * row_stride + j * stride, limit - j};
    });
  }

  // What rows are multiplied by in each step of a piece: numbers of u.
  DEVICE void multipliers(uint32_t (&u)[J][MT][2], const Piece& at, const T* const (&u_row)[MT][2], int wk) const {
#pragma unroll
    for (int jj = 0; jj < J; ++jj) {
      const int64_t at_c = least(which_c(at, jj * WK + wk), last - 1) * f.u.step;  // beyond it the step is left out
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int h = 0; h < 2; ++h) u[jj][mt][h] = twice(active(u_row[mt][h][at_c]));
    }
  }

  DEVICE T active(T u) const {
    if (!ACTIVE || f.activation == Activation::none) return u;
    return static_cast<T>(activated(static_cast<float>(u), f.activation));
  }

  // The words of each step of a piece, of rows of `of`, `limit` numbers each.
  DEVICE void operands(
      uint32_t (&words)[J][MT][4], const Piece& at, const Rows<T>& of, const T* const (&row)[MT][2], int limit,
      bool aligned, int wk) const {
#pragma unroll
    for (int jj = 0; jj < J; ++jj)
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const int j = column(at, jj * WK + wk) + (lane % 4 + 4 * (q >> 1)) * per_word<T>;
          words[jj][mt][q] = word_at<T>({row[mt][q & 1], limit}, j, of.step, aligned);
          if (ACTIVE && at.kind == from_u && f.activation != Activation::none)
            words[jj][mt][q] = active_word(words[jj][mt][q]);
        }
  }

  DEVICE uint32_t active_word(uint32_t word) const {
    if constexpr (per_word<T> == 1) return bits(active(number(word)));
    else return pair(active(static_cast<T>(half_of(word, 0, T{}))), active(static_cast<T>(half_of(word, 1, T{}))));
  }

  // The sums of the warps of a row come together, in order.
  DEVICE void add_warps(float (&acc)[MT][NT][4], int wm, int wk) {
    float* const sums = reinterpret_cast<float*>(memory + tiles * Shape::TILE);
    constexpr int size = MT * NT * 4 * 32;  // of a warp
    if (wk > 0)
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            sums[((wk - 1) * WM + wm) * size + ((mt * NT + nt) * 4 + e) * 32 + lane] = acc[mt][nt][e];
    sync();
    if (wk > 0) return;
    for (int other = 0; other < WK - 1; ++other)
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            acc[mt][nt][e] += sums[(other * WM + wm) * size + ((mt * NT + nt) * 4 + e) * 32 + lane];
  }
};

}  // namespace fasthyper
