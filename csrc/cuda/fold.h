// x ⊗ z, folded into the K dimension of one matrix product. The left operand is generated in registers, per k-step.
//
//     out[m, p] = Σ_c Σ_k u[m, c] v[m, k] H(c, k, p)  +  Σ_c u[m, c] A(p, c)  +  Σ_k v[m, k] C(p, k)  +  d[p]
//
//             m       u   v   c   k   p     A     C     d
//     y    (b, n)     x   z   i   r   o    W0    bias   b0
//     dx   (b, n)     g   z   o   r   i    W0ᵀ
//
// A CTA computes BM rows and BP columns of out. Its warps divide the rows (WM) and the k-steps of a tile of H (WK,
// sliced-K). If all tiles of H fit into shared memory, they stay there, and the CTA goes on to further rows.
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
  RowView<T> u, v;
  const T *h, *a, *c, *d;
  int64_t h_c, h_k, h_p, a_p, a_c, c_p, c_k, d_p;
  T* out;
  float* partial;  // (splits, M, P), if the sum over c is split; each split sums over `per_split` c
  int M, N, C, K, P, per_split;
  int h_width, a_width, c_width;  // bytes per copy
  bool v_aligned, u_aligned, tf32;
  Activation activation;  // of u
  // A tile of H has c_per_tile c with steps_per_c k-steps each. For each k-step: its c in the tile, and its first k.
  int steps_per_c, c_per_tile;
  uint32_t c_of_step, k_of_step;  // a byte each

  // Compute the instances from `from` up to `to` alone.
  void take_instances(int64_t from, int64_t to) {
    u.data += from * u.instance_stride, v.data += from * v.instance_stride, out += from * N * P;
    M = static_cast<int>(to - from) * N;
  }
  void set_tile_layout() {
    steps_per_c = least(STEPS, cdiv(K, per_step<T>)), c_per_tile = STEPS / steps_per_c;
    for (int step = 0; step < STEPS; ++step) {
      c_of_step |= static_cast<uint32_t>(step / steps_per_c) << 8 * step;
      k_of_step |= static_cast<uint32_t>(step % steps_per_c * per_step<T>) << 8 * step;
    }
  }
  INLINE int k_tiles(int c_begin, int c_end, bool plain_terms) const {
    const int products = cdiv(K, steps_per_c * per_step<T>) * cdiv(c_end - c_begin, c_per_tile);
    return products + (plain_terms && a ? cdiv(C, per_row<T>) : 0) + (plain_terms && c ? cdiv(K, per_row<T>) : 0);
  }
};

template <class T, int WM_, int WK_, int MT_, int NT_>
struct FoldShape {
  static constexpr int WM = WM_, WK = WK_, MT = MT_, NT = NT_;
  static constexpr int BM = 16 * WM * MT, BP = 8 * NT, THREADS = 32 * WM * WK, TILE_BYTES = BP * ROW_BYTES,
                       PREFETCH = 3;
  static constexpr int REDUCTION_BYTES = (WK - 1) * BM * BP * sizeof(float);  // partial sums of the warps with wk > 0
  static constexpr int MIN_CTAS_PER_SM = WK > 1 && NT < 8 ? 2 : 1;            // as many as registers allow
  static int smem_bytes(int stages) { return stages * TILE_BYTES + REDUCTION_BYTES; }
};

// CTAs of few rows and 8·NT columns, and of many rows.
template <class T, int NT = 8>
using NarrowFold = FoldShape<T, 2, 4, 1, NT>;
template <class T>
using WideFold = FoldShape<T, 4, 1, 2, 8>;

// ACTIVE: f.activation may apply to u.
template <class T, class Shape, bool ACTIVE>
class FoldCta {
  static constexpr int WM = Shape::WM, WK = Shape::WK, MT = Shape::MT, NT = Shape::NT, J = STEPS / WK;
  const Fold<T>& f;
  char* const smem;
  const int stages, p0, split, c_begin, c_end;
  const int lane = thread() % 32, warp = thread() / 32;

  // The term of the formula that a tile belongs to: H, with c_per_tile c from c0 on, or A or C.
  enum Term { h_term, a_term, c_term };
  struct TileCoord {
    Term term;
    int k0, c0;
  };

 public:
  // Columns from p0 on, and the c of this split. Shared memory holds `stages` tiles.
  DEVICE FoldCta(const Fold<T>& f, char* smem, int stages, int p0, int split)
      : f(f),
        smem(smem),
        stages(stages),
        p0(p0),
        split(split),
        c_begin(split * f.per_split),
        c_end(least(f.C, c_begin + f.per_split)) {}

  // Compute rows from m0 on; call epilogue(m, p, sum) for each result in range. again: this CTA has computed other
  // rows.
  template <class Epilogue>
  DEVICE void run(int m0, bool again, Epilogue epilogue) {
    const int wm = warp % WM, wk = warp / WM, k_tiles = f.k_tiles(c_begin, c_end, split == 0);
    const bool resident = again && k_tiles <= stages;
    float acc[MT][NT][4] = {};
    uint32_t v[J][MT][4], u[J][MT][2], next_u[J][MT][2];
    const T *u_row[MT][2], *v_row[MT][2];
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int m = least(m0 + (wm * MT + mt) * 16 + lane / 4 + 8 * h, f.M - 1);  // rows beyond M are not stored
        u_row[mt][h] = f.u.row(m, f.N);
        v_row[mt][h] = f.v.row(m, f.N);
      }

    sync_threads();  // the warps may still read tiles and sums of other rows
    TileCoord coord{h_term, 0, c_begin}, next_load = coord;
    TileIterator iterator = iterator_at(next_load);
    int stage = 0;
    const auto load_next = [&](int k, int to) {
      if (k < k_tiles) load_stage(next_load, iterator, smem + to * Shape::TILE_BYTES);
      cp_async_commit_group();  // even if empty: one group per tile
      advance(next_load);
      advance_iterator(iterator, next_load);
    };
    const auto wait_for_tile = [&](int k) {
      if (!resident) {
        cp_async_wait_group<Shape::PREFETCH - 1>();
        sync_threads();
        const int to = stage + Shape::PREFETCH;
        load_next(k + Shape::PREFETCH, to < stages ? to : to - stages);
      }
      const char* const tile = smem + stage * Shape::TILE_BYTES;
      stage = stage + 1 < stages ? stage + 1 : 0;
      return tile;
    };
    // Multiply a tile by the fragments that make_left returns for its k-steps.
    const auto accumulate = [&](const char* tile, const TileCoord& coord, auto make_left) {
      const int lane = WK > 1 && NT == 8 ? opaque(this->lane) : this->lane;  // keeps addresses out of registers
#pragma unroll
      for (int jj = 0; jj < J; ++jj) {
        const int j = jj * WK + wk;
        if (beyond(coord, j)) continue;
        uint32_t w[NT / 2][4];
#pragma unroll
        for (int q = 0; q < NT / 2; ++q) load_right_fragment(w[q], tile, 16 * q, j, lane);
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
          const auto left = make_left(jj, mt);
#pragma unroll
          for (int nt = 0; nt < NT; ++nt)
            left.accumulate(acc[mt][nt], w[nt / 2][nt % 2 * 2], w[nt / 2][nt % 2 * 2 + 1], f.tf32);
        }
      }
    };

    for (int k = 0; k < Shape::PREFETCH && !resident; ++k) load_next(k, k);
    load_u(next_u, coord, u_row, wk);
    int k = 0;
    for (; coord.term == h_term; ++k) {
      const char* const tile = wait_for_tile(k);
#pragma unroll
      for (int jj = 0; jj < J; ++jj)
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
          for (int h = 0; h < 2; ++h) u[jj][mt][h] = next_u[jj][mt][h];
      if (coord.c0 == c_begin) load_fragments(v, coord, f.v, v_row, f.K, f.v_aligned, wk);
      const TileCoord current = coord;
      advance(coord);
      load_u(next_u, coord, u_row, wk);
      accumulate(tile, current, [&](int jj, int mt) {
        GeneratedFragment<T> left;
        left.set(v[jj][mt], u[jj][mt][0], u[jj][mt][1]);
        return left;
      });
    }
    for (; k < k_tiles; ++k, advance(coord)) {
      const char* const tile = wait_for_tile(k);
      if (coord.term == a_term) load_fragments(v, coord, f.u, u_row, f.C, f.u_aligned, wk);
      else load_fragments(v, coord, f.v, v_row, f.K, f.v_aligned, wk);
      accumulate(tile, coord, [&](int jj, int mt) {
        PlainFragment<T> left;
        left.set(v[jj][mt]);
        return left;
      });
    }
    if constexpr (WK > 1) reduce_warps(acc, wm, wk);
    if (wk > 0) return;
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int m = m0 + (wm * MT + mt) * 16 + lane / 4 + 8 * (e >> 1), p = p0 + nt * 8 + lane % 4 * 2 + (e & 1);
          if (m < f.M && p < f.P) epilogue(m, p, acc[mt][nt][e]);
        }
  }

 private:
  // The order of tiles: c within k of H; then, in the first split, A and C.
  DEVICE void advance(TileCoord& coord) const {
    if (coord.term == h_term) {
      coord.c0 += f.c_per_tile;
      if (coord.c0 < c_end) return;
      coord.c0 = c_begin, coord.k0 += f.steps_per_c * per_step<T>;
      if (coord.k0 < f.K) return;
      coord = {f.a ? a_term : c_term, 0, 0};
    } else {
      coord.k0 += per_row<T>;
      if (coord.term == a_term && coord.k0 >= f.C) coord = {c_term, 0, 0};
    }
  }

  DEVICE int column(const TileCoord& coord, int step) const {
    return coord.k0 + (coord.term == h_term ? static_cast<int>(f.k_of_step >> 8 * step & 255) : step * per_step<T>);
  }
  DEVICE int c_at(const TileCoord& coord, int step) const { return coord.c0 + (f.c_of_step >> 8 * step & 255); }

  DEVICE bool beyond(const TileCoord& coord, int step) const {
    if (coord.term != h_term) return column(coord, step) >= (coord.term == a_term ? f.C : f.K);
    return c_at(coord, step) >= least(c_end, coord.c0 + f.c_per_tile) || column(coord, step) >= f.K;
  }

  // The address of a thread's first chunk in a tile of H with 16-byte copies, its c, and the elements left in the row.
  struct TileIterator {
    const T* from;
    int c, count;
  };
  DEVICE TileIterator iterator_at(const TileCoord& coord) const {
    const CopySlot<T, Shape::THREADS> slot(0);
    const int c = c_at(coord, slot.step()), j = column(coord, slot.step()) + slot.column();
    return {f.h + (p0 + slot.row) * f.h_p + c * f.h_c + j, c < coord.c0 + f.c_per_tile ? c : c_end, f.K - j};
  }
  DEVICE void advance_iterator(TileIterator& iterator, const TileCoord& next) const {
    if (next.c0 == c_begin) {
      iterator = iterator_at(next);
    } else {
      iterator.from += f.c_per_tile * f.h_c;
      iterator.c += f.c_per_tile;
    }
  }

  DEVICE void load_stage(const TileCoord& coord, const TileIterator& iterator, char* tile) const {
    if (coord.term == h_term && f.h_width == 16) {
#pragma unroll
      for (int k = 0; k < cdiv(Shape::BP * 8, Shape::THREADS); ++k) {
        const CopySlot<T, Shape::THREADS> slot(k);
        if (Shape::BP * 8 < Shape::THREADS && slot.row >= Shape::BP) break;
        const bool in_range = iterator.c < c_end && p0 + slot.row < f.P;
        slot.copy(tile, iterator.from + k * (Shape::THREADS / 8) * f.h_p, in_range ? iterator.count : 0);
      }
      return;
    }
    const int64_t row_stride = coord.term == h_term ? f.h_p : coord.term == a_term ? f.a_p : f.c_p;
    const int64_t stride = coord.term == h_term ? f.h_k : coord.term == a_term ? f.a_c : f.c_k;
    const T* const from = coord.term == h_term ? f.h : coord.term == a_term ? f.a : f.c;
    const int width = coord.term == h_term ? f.h_width : coord.term == a_term ? f.a_width : f.c_width;
    const int limit = coord.term == a_term ? f.C : f.K;
    load_tile<T>(tile, Shape::BP, STEPS, width, stride, thread(), Shape::THREADS, [&](int row, int step) -> Span<T> {
      if (p0 + row >= f.P || beyond(coord, step)) return {nullptr, 0};
      const int64_t c_offset = coord.term == h_term ? c_at(coord, step) * f.h_c : 0;
      const int j = column(coord, step);
      return {from + c_offset + (p0 + row) * row_stride + j * stride, limit - j};
    });
  }

  // Load u of a lane's rows for each k-step of a tile.
  DEVICE void load_u(uint32_t (&u)[J][MT][2], const TileCoord& coord, const T* const (&u_row)[MT][2], int wk) const {
#pragma unroll
    for (int jj = 0; jj < J; ++jj) {
      const int64_t c_offset =
          least(c_at(coord, jj * WK + wk), c_end - 1) * f.u.stride;  // k-steps beyond it are skipped
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int h = 0; h < 2; ++h) u[jj][mt][h] = replicate(activate_u(u_row[mt][h][c_offset]));
    }
  }

  DEVICE T activate_u(T u) const {
    if (!ACTIVE || f.activation == Activation::none) return u;
    return static_cast<T>(activate(static_cast<float>(u), f.activation));
  }

  // Load the fragments of each k-step of a tile from rows of `limit` elements.
  DEVICE void load_fragments(
      uint32_t (&fragment)[J][MT][4], const TileCoord& coord, const RowView<T>& view, const T* const (&row)[MT][2],
      int limit, bool aligned, int wk) const {
#pragma unroll
    for (int jj = 0; jj < J; ++jj)
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const int j = column(coord, jj * WK + wk) + (lane % 4 + 4 * (q >> 1)) * per_word<T>;
          fragment[jj][mt][q] = word_at<T>({row[mt][q & 1], limit}, j, view.stride, aligned);
          if (ACTIVE && coord.term == a_term && f.activation != Activation::none)
            fragment[jj][mt][q] = activate_word(fragment[jj][mt][q]);
        }
  }

  DEVICE uint32_t activate_word(uint32_t word) const {
    if constexpr (per_word<T> == 1) return as_uint(activate_u(as_float(word)));
    else
      return pack(activate_u(static_cast<T>(unpack(word, 0, T{}))), activate_u(static_cast<T>(unpack(word, 1, T{}))));
  }

  // Add the accumulators of the WK warps, in order.
  DEVICE void reduce_warps(float (&acc)[MT][NT][4], int wm, int wk) {
    float* const reduction = reinterpret_cast<float*>(smem + stages * Shape::TILE_BYTES);
    constexpr int size = MT * NT * 4 * 32;  // of a warp
    if (wk > 0)
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            reduction[((wk - 1) * WM + wm) * size + ((mt * NT + nt) * 4 + e) * 32 + lane] = acc[mt][nt][e];
    sync_threads();
    if (wk > 0) return;
    for (int other = 0; other < WK - 1; ++other)
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            acc[mt][nt][e] += reduction[(other * WM + wm) * size + ((mt * NT + nt) * 4 + e) * 32 + lane];
  }
};

}  // namespace fasthyper
