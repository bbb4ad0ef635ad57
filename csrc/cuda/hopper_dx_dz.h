// dx and dz for sm_90a from one pass: G of the next i is made while that of the last one is reduced, twice.
//
//     G[m, r]  = Σ_o g[m, o] H[o, i, r]                     for one i after another
//     dx[m, i] = Σ_r G[m, r] z[m, r]  +  Σ_o g[m, o] W0[o, i]
//     dz[m, r] = Σ_i G[m, r] x[m, i]  +  Σ_o g[m, o] bias[o, r]
//
// Warpgroups of 64 rows m each keep all R of z, dz and G in registers and g in shared memory, and go through a split's
// i on their own: where there is no room for two G, one reduces while the products of another run. O is filled up with
// zeros to 16·DEPTH. dx is collected 64 columns at a time; where there is a W0 these begin as its part, a piece like
// those of H. bias is H of one more i, for which x is one.
#pragma once
#include <cstdint>

#include "dx_dz.h"
#include "hopper.h"
#include "hopper_instructions.h"
#include "hopper_layouts.h"
#include "instructions.h"
#include "numbers.h"

namespace fasthyper {

template <class T>
struct HopperDxDz {
  DxDz<T> f;
  TensorMap g, h, bias, base;
};

template <int BR_, int DEPTH>
struct HopperDxDzShape {
  static constexpr int BR = BR_, CONSUMERS = BR == 64 ? 3 : 2, BM = 64 * CONSUMERS, STAGES = DEPTH > 8 ? 2 : 4;
  static constexpr int THREADS = WARPGROUP * (CONSUMERS + 1), REGISTERS = BR == 64 ? 160 : 240;
  static constexpr bool TWO_G = BR == 64 && DEPTH <= 8;  // more would not fit into the registers
  static constexpr int COLUMNS = 64, STRIDE = COLUMNS + 4, BOX = 64 * ROW_BYTES;  // of dx; of g

  static constexpr int G_BOXES = (DEPTH + 3) / 4, BOX_OF_H = DEPTH * 16 * ROW_BYTES, STAGE = BR / 64 * BOX_OF_H;
  static constexpr int AT_STAGES = CONSUMERS * G_BOXES * BOX, AT_DX = AT_STAGES + STAGES * STAGE;
  static constexpr int AT_BARRIERS = AT_DX + BM * STRIDE * sizeof(float);
  static constexpr int SHARED = AT_BARRIERS + Ring<STAGES>::BYTES + sizeof(Barrier);
  static_assert(SHARED <= 227 << 10);
};

template <class T, int BR, int DEPTH>
class HopperDxDzBlock {
  using Shape = HopperDxDzShape<BR, DEPTH>;
  const HopperDxDz<T>& all;
  const DxDz<T>& f;
  char* const memory;
  Ring<Shape::STAGES> ring;
  Barrier* const g_barrier;
  const int m0, first, last, split;
  const int group = static_cast<int>(shuffle(thread() / WARPGROUP, 0)) - 1;  // so the compiler sees that a warp has one

  enum Kind { of_base, of_input, of_bias, none };
  struct Piece {
    Kind kind;
    int i;
  };

 public:
  // Blocks that run together have other rows, and so share H.
  DEVICE HopperDxDzBlock(const HopperDxDz<T>& all, char* memory, int block, int split)
      : all(all),
        f(all.f),
        memory(memory),
        ring(reinterpret_cast<Barrier*>(memory + Shape::AT_BARRIERS)),
        g_barrier(ring.full + 2 * Shape::STAGES),
        m0(block * Shape::BM),
        first(split * all.f.per_split),
        last(least(all.f.I, first + all.f.per_split)),
        split(split) {}

  DEVICE void run() {
    if (thread() == 0) {
      barrier_init(g_barrier, 1);
      ring.init(1, 4 * Shape::CONSUMERS);
    }
    sync();
    if (thread() < WARPGROUP) {
      give_registers<24>();
      if (thread() == 0) produce();
    } else {
      take_registers<Shape::REGISTERS>();
      consume();
    }
  }

 private:
  DEVICE Piece first_piece() const { return {f.base ? of_base : of_input, first}; }
  DEVICE Piece after(Piece piece) const {
    if (piece.kind == of_base) return {of_input, piece.i};
    if (piece.kind == of_bias) return {none, last};
    if (piece.i + 1 == last) return {f.bias && split == 0 ? of_bias : none, last};
    const bool begins = (piece.i + 1 - first) % Shape::COLUMNS == 0;
    return {begins && f.base ? of_base : of_input, piece.i + 1};
  }

  DEVICE int pieces() const {
    const int inputs = last - first;
    return inputs + (f.base ? cdiv(inputs, Shape::COLUMNS) : 0) + (f.bias && split == 0);
  }

  DEVICE void produce() {
    prefetch(all.h);
    barrier_arrive_expecting(g_barrier, Shape::AT_STAGES);
    for (int b = 0; b < Shape::CONSUMERS * Shape::G_BOXES; ++b)
      load_box(memory + b * Shape::BOX, all.g, b % Shape::G_BOXES * 64, 0, m0 + b / Shape::G_BOXES * 64, g_barrier);
    for (Piece piece = first_piece(); piece.kind != none; piece = after(piece)) {
      ring.wait_empty();
      Barrier* const full = ring.full + ring.stage;
      char* const to = memory + Shape::AT_STAGES + ring.stage * Shape::STAGE;
      const int count = piece.kind == of_base ? 1 : BR / 64;
      barrier_arrive_expecting(full, count * Shape::BOX_OF_H);
      for (int b = 0; b < count; ++b) {
        if (piece.kind == of_base) load_box(to, all.base, piece.i, 0, 0, full);
        else if (piece.kind == of_bias) load_box(to + b * Shape::BOX_OF_H, all.bias, b * 64, 0, 0, full);
        else load_box(to + b * Shape::BOX_OF_H, all.h, b * 64, piece.i, 0, full);
      }
      ring.next();
    }
  }

  DEVICE int row_in_group(int h) const { return thread() / 32 % 4 * 16 + thread() % 32 / 4 + 8 * h; }
  DEVICE int row(int h) const { return m0 + group * 64 + row_in_group(h); }

  // z as lanes hold columns of G: numbers 4·j + 2·h + e.
  struct Kept {
    float z[BR / 2], dz[BR / 2], x[2];
    T next[2];    // of x
    int x_at[2];  // where its rows begin
  };

  DEVICE void consume() {
    Kept kept;
    load_rows(kept);
    fetch(kept, 0);
    barrier_wait(g_barrier, 0);
    Piece piece = first_piece();
    if constexpr (Shape::TWO_G) {
      float even[BR / 2], odd[BR / 2];
      multiply(even);
      ring.next();
      int left = pieces();
      for (; left > 2; left -= 2) {
        reduce_behind_next(even, odd, kept, piece);
        reduce_behind_next(odd, even, kept, piece);
      }
      if (left == 2) {
        reduce_behind_next(even, odd, kept, piece);
        reduce_last(odd, kept, piece);
      } else {
        reduce_last(even, kept, piece);
      }
    } else {
      float G[BR / 2];
      do {
        multiply(G);
        products_wait<0>();
        settled(G);
        if (thread() % 32 == 0) ring.release();
        ring.next();
        reduce(G, kept, piece);
        piece = after(piece);
      } while (piece.kind != none);
    }
    store_dz(kept);
  }

  // Send off the next G and reduce this one.
  DEVICE void reduce_behind_next(float (&G)[BR / 2], float (&next)[BR / 2], Kept& kept, Piece& piece) {
    multiply(next);
    products_wait<1>();
    settled(G);
    if (thread() % 32 == 0) ring.release_last();
    ring.next();
    reduce(G, kept, piece);
    piece = after(piece);
  }
  DEVICE void reduce_last(float (&G)[BR / 2], Kept& kept, Piece piece) {
    products_wait<0>();
    settled(G);
    reduce(G, kept, piece);
  }

  DEVICE void multiply(float (&G)[BR / 2]) {
    const uint64_t g = k_rows(shared_address(memory) + group * Shape::G_BOXES * Shape::BOX);
    const uint64_t h = mn_rows(shared_address(memory) + Shape::AT_STAGES + ring.stage * Shape::STAGE, Shape::BOX_OF_H);
    ring.wait_full();
    products_begin();
    product<false, false, true>(G, g, h, T{});
#pragma unroll
    for (int j = 1; j < DEPTH; ++j)
      product<true, false, true>(G, g + j / 4 * (Shape::BOX >> 4) + j % 4 * K16, h + j * K16_TRANSPOSED, T{});
    products_commit();
  }

  DEVICE float* dx_row(int h) const {
    float* const dx = reinterpret_cast<float*>(memory + Shape::AT_DX);
    return dx + (group * 64 + row_in_group(h)) * Shape::STRIDE;
  }

  DEVICE void reduce(const float (&G)[BR / 2], Kept& kept, Piece piece) {
    const int lane = thread() % 32, column = (piece.i - first) % Shape::COLUMNS;
    if (piece.kind == of_base) {
#pragma unroll
      for (int k = 0; k < 32; k += 2) store_pair(dx_row(k / 2 % 2) + k / 4 * 8 + lane % 4 * 2, G[k], G[k + 1]);
      sync_warp();
      return;
    }
    if (piece.kind == of_input && column % 4 == 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h) kept.x[h] = static_cast<float>(kept.next[h]);
      fetch(kept, piece.i - first + 4);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float x = 1.f, sum = 0.f;
      if (piece.kind == of_input) x = number(shuffle(bits(kept.x[h]), (lane & 28) | column % 4));
#pragma unroll
      for (int k = 2 * h; k < BR / 2; k += 4)
#pragma unroll
        for (int e = k; e < k + 2; ++e) {
          kept.dz[e] += G[e] * x;
          sum += G[e] * kept.z[e];
        }
      if (piece.kind != of_input) continue;
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      if (lane % 4 == 0) dx_row(h)[column] = f.base ? dx_row(h)[column] + sum : sum;
    }
    if (piece.kind == of_input && (column == Shape::COLUMNS - 1 || piece.i == last - 1))
      store_dx(piece.i - column, column + 1);
  }

  // x of the four i from `first` + n on, one to each lane of four; the last one where there are no more.
  DEVICE void fetch(Kept& kept, int n) const {
    const int at = least(first + n + thread() % 4, last - 1) * static_cast<int>(f.x.step);
#pragma unroll
    for (int h = 0; h < 2; ++h) kept.next[h] = f.x.data[kept.x_at[h] + at];
  }

  // Rows beyond M as the last one: what comes of them is not stored.
  DEVICE void load_rows(Kept& kept) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int m = least(row(h), f.M - 1);
      kept.x_at[h] = static_cast<int>(f.x.row(m, f.N) - f.x.data);
      const T* const z = f.z.row(m, f.N);
#pragma unroll
      for (int k = 2 * h; k < BR / 2; k += 4)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int r = k / 4 * 8 + thread() % 4 * 2 + e;
          kept.z[k + e] = r < f.R ? static_cast<float>(z[r * f.z.step]) : 0.f;
          kept.dz[k + e] = 0.f;
        }
    }
  }

  // `count` columns from i on, of a warp's own rows: half of it has a row, a lane four numbers.
  DEVICE void store_dx(int i, int count) {
    sync_warp();
    const int lane = thread() % 32, at = lane % 16 * 4, row0 = group * 64 + thread() / 32 % 4 * 16 + lane / 16;
    const float* const dx = reinterpret_cast<const float*>(memory + Shape::AT_DX) + at;
    const bool in_fours = f.I % 4 == 0 && i % 4 == 0;
    for (int k = 0; k < 16; k += 2) {
      const float* const from = dx + (row0 + k) * Shape::STRIDE;
      T* const to = f.dx + static_cast<int64_t>(m0 + row0 + k) * f.I + i + at;
      if (m0 + row0 + k >= f.M) break;
      if (in_fours && at + 4 <= count) {
        struct alignas(8) Four {
          uint32_t low, high;
        };
        *reinterpret_cast<Four*>(to) = {
            pair(static_cast<T>(from[0]), static_cast<T>(from[1])),
            pair(static_cast<T>(from[2]), static_cast<T>(from[3]))};
      } else {
        for (int e = 0; e < 4 && at + e < count; ++e) to[e] = static_cast<T>(from[e]);
      }
    }
    sync_warp();
  }

  DEVICE void store_dz(const Kept& kept) const {
#pragma unroll
    for (int k = 0; k < BR / 2; ++k) {
      const int m = row(k / 2 % 2), r = k / 4 * 8 + thread() % 4 * 2 + k % 2;
      if (m < f.M && r < f.R) f.dz.store((static_cast<int64_t>(split) * f.M + m) * f.R + r, kept.dz[k]);
    }
  }
};

}  // namespace fasthyper
