// dx and dz for sm_90a in one pass: wgmma computes G of the next i while G of the current i is reduced to both.
//
//     G[m, r]  = Σ_o g[m, o] H[o, i, r]                     for one i at a time
//     dx[m, i] = Σ_r G[m, r] z[m, r]  +  Σ_o g[m, o] W0[o, i]
//     dz[m, r] = Σ_i G[m, r] x[m, i]  +  Σ_o g[m, o] bias[o, r]
//
// Each consumer warpgroup has 64 rows m. It keeps all R of z, dz and G in registers and g in shared memory, and
// iterates over the i of a split on its own. If there are too few registers for two G, one warpgroup reduces while
// wgmma of another runs. O is padded with zeros to 16·DEPTH. Shared memory collects columns of dx; with W0, a tile
// of W0 initialises them. bias is treated as H of one more i, for which x is one. The CTAs of a cluster have different
// rows m; each loads a part of the rows o of a tile of H, W0 or bias for all.
#pragma once
#include <cstdint>

#include "device.h"
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
  static constexpr int BR = BR_, CONSUMERS = BR <= 64 ? 3 : 2, BM = 64 * CONSUMERS, STAGES = DEPTH > 8 ? 2 : 4;
  static constexpr int THREADS = WARPGROUP * (CONSUMERS + 1), REGISTERS = BR <= 64 ? 160 : 240;
  static constexpr bool DOUBLE_BUFFERED_G = BR <= 64 && DEPTH <= 8;  // otherwise there are too few registers
  static constexpr int COLUMNS = BR < 64 ? BR : 64, DX_STRIDE = COLUMNS + 4,
                       BOX_BYTES = 64 * ROW_BYTES;  // of dx, dx, g

  static constexpr int G_BOXES = (DEPTH + 3) / 4, H_BOXES = (BR + 63) / 64, H_BOX_BYTES = DEPTH * 16 * ROW_BYTES,
                       STAGE_BYTES = H_BOXES * H_BOX_BYTES;
  static constexpr int STAGES_OFFSET = CONSUMERS * G_BOXES * BOX_BYTES,
                       DX_OFFSET = STAGES_OFFSET + STAGES * STAGE_BYTES;
  static constexpr int MBARRIERS_OFFSET = DX_OFFSET + BM * DX_STRIDE * sizeof(float);
  static constexpr int SMEM_BYTES = MBARRIERS_OFFSET + Pipeline<STAGES>::BYTES + sizeof(Mbarrier);
  static_assert(SMEM_BYTES <= MOST_SHARED_MEMORY);
};

template <class T, int BR, int DEPTH>
class HopperDxDzCta {
  using Shape = HopperDxDzShape<BR, DEPTH>;
  const HopperDxDz<T>& params;
  const DxDz<T>& f;
  char* const smem;
  Pipeline<Shape::STAGES> pipeline;
  Mbarrier* const g_full;
  const int m0, i_begin, i_end, split;
  const int warpgroup =
      static_cast<int>(shuffle(thread() / WARPGROUP, 0)) - 1;  // shuffle: so the compiler knows it is uniform in a warp

  enum Term { base_term, h_term, bias_term, end };
  struct TileCoord {
    Term term;
    int i;
  };

 public:
  // CTAs that run at the same time have different rows, and share H in the L2 cache.
  DEVICE HopperDxDzCta(const HopperDxDz<T>& params, char* smem, int cta, int split)
      : params(params),
        f(params.f),
        smem(smem),
        pipeline(reinterpret_cast<Mbarrier*>(smem + Shape::MBARRIERS_OFFSET)),
        g_full(pipeline.full + 2 * Shape::STAGES),
        m0(cta * Shape::BM),
        i_begin(split * params.f.per_split),
        i_end(least(params.f.I, i_begin + params.f.per_split)),
        split(split) {}

  DEVICE void run() {
    if (thread() == 0) {
      mbarrier_init(g_full, 1);
      pipeline.init(1, 4 * Shape::CONSUMERS * cluster_size());
    }
    sync_cluster();
    if (thread() < WARPGROUP) {
      setmaxnreg_dec<24>();
      if (thread() == 0) produce();
    } else {
      setmaxnreg_inc<Shape::REGISTERS>();
      consume();
    }
    sync_cluster();  // the other CTA may still use this CTA's shared memory
  }

 private:
  DEVICE TileCoord first_tile() const { return {f.base ? base_term : h_term, i_begin}; }
  DEVICE TileCoord next_tile(TileCoord coord) const {
    if (coord.term == base_term) return {h_term, coord.i};
    if (coord.term == bias_term) return {end, i_end};
    if (coord.i + 1 == i_end) return {f.bias && split == 0 ? bias_term : end, i_end};
    const bool begins_columns = (coord.i + 1 - i_begin) % Shape::COLUMNS == 0;
    return {begins_columns && f.base ? base_term : h_term, coord.i + 1};
  }

  DEVICE int tile_count() const {
    const int inputs = i_end - i_begin;
    return inputs + (f.base ? cdiv(inputs, Shape::COLUMNS) : 0) + (f.bias && split == 0);
  }

  DEVICE void produce() {
    prefetch_tensormap(params.h);
    const int o = cluster_rank() * 16 * DEPTH / cluster_size();  // the first row that this CTA loads
    mbarrier_arrive_expect_tx(g_full, Shape::STAGES_OFFSET);
    for (int b = 0; b < Shape::CONSUMERS * Shape::G_BOXES; ++b)
      tma_load(smem + b * Shape::BOX_BYTES, params.g, b % Shape::G_BOXES * 64, 0, m0 + b / Shape::G_BOXES * 64, g_full);
    for (TileCoord coord = first_tile(); coord.term != end; coord = next_tile(coord)) {
      pipeline.producer_acquire();
      Mbarrier* const full = pipeline.full + pipeline.stage;
      char* const to = smem + Shape::STAGES_OFFSET + pipeline.stage * Shape::STAGE_BYTES + o * ROW_BYTES;
      const int count = coord.term == base_term ? 1 : Shape::H_BOXES;
      mbarrier_arrive_expect_tx(full, count * Shape::H_BOX_BYTES);
      for (int b = 0; b < count; ++b) {
        if (coord.term == base_term) cluster_load(to, params.base, coord.i, 0, o, full);
        else if (coord.term == bias_term) cluster_load(to + b * Shape::H_BOX_BYTES, params.bias, b * 64, 0, o, full);
        else cluster_load(to + b * Shape::H_BOX_BYTES, params.h, b * 64, coord.i, o, full);
      }
      pipeline.advance();
    }
  }

  DEVICE int row_in_warpgroup(int h) const { return thread() / 32 % 4 * 16 + thread() % 32 / 4 + 8 * h; }
  DEVICE int row(int h) const { return m0 + warpgroup * 64 + row_in_warpgroup(h); }

  // z and dz in the layout of the accumulators: element 4·j + 2·h + e.
  struct RowState {
    float z[BR / 2], dz[BR / 2], x[2];
    T next_x[2];
    int x_offset[2];  // offsets of the rows in x
  };

  DEVICE void consume() {
    RowState rows;
    load_rows(rows);
    load_x(rows, 0);
    mbarrier_wait(g_full, 0);
    TileCoord coord = first_tile();
    if constexpr (Shape::DOUBLE_BUFFERED_G) {
      float even[BR / 2], odd[BR / 2];
      multiply(even);
      pipeline.advance();
      int left = tile_count();
      for (; left > 2; left -= 2) {
        multiply_next_and_reduce(even, odd, rows, coord);
        multiply_next_and_reduce(odd, even, rows, coord);
      }
      if (left == 2) {
        multiply_next_and_reduce(even, odd, rows, coord);
        reduce_last(odd, rows, coord);
      } else {
        reduce_last(even, rows, coord);
      }
    } else {
      float G[BR / 2];
      do {
        multiply(G);
        wgmma_wait_group<0>();
        fence_accumulator(G);
        pipeline.cluster_release();
        pipeline.advance();
        reduce(G, rows, coord);
        coord = next_tile(coord);
      } while (coord.term != end);
    }
    store_dz(rows);
  }

  // Start the next G, and reduce this one while it runs.
  DEVICE void multiply_next_and_reduce(float (&G)[BR / 2], float (&next)[BR / 2], RowState& rows, TileCoord& coord) {
    multiply(next);
    wgmma_wait_group<1>();
    fence_accumulator(G);
    pipeline.cluster_release_previous();
    pipeline.advance();
    reduce(G, rows, coord);
    coord = next_tile(coord);
  }
  DEVICE void reduce_last(float (&G)[BR / 2], RowState& rows, TileCoord coord) {
    wgmma_wait_group<0>();
    fence_accumulator(G);
    reduce(G, rows, coord);
  }

  DEVICE void multiply(float (&G)[BR / 2]) {
    const uint64_t g = k_major(smem_address(smem) + warpgroup * Shape::G_BOXES * Shape::BOX_BYTES);
    const uint64_t h =
        mn_major(smem_address(smem) + Shape::STAGES_OFFSET + pipeline.stage * Shape::STAGE_BYTES, Shape::H_BOX_BYTES);
    pipeline.consumer_wait();
    wgmma_fence();
    wgmma<false, false, true>(G, g, h, T{});
#pragma unroll
    for (int j = 1; j < DEPTH; ++j)
      wgmma<true, false, true>(
          G, g + j / 4 * (Shape::BOX_BYTES >> 4) + j % 4 * K_MAJOR_STEP, h + j * MN_MAJOR_STEP, T{});
    wgmma_commit_group();
  }

  DEVICE float* dx_row(int h) const {
    float* const dx = reinterpret_cast<float*>(smem + Shape::DX_OFFSET);
    return dx + (warpgroup * 64 + row_in_warpgroup(h)) * Shape::DX_STRIDE;
  }

  DEVICE void reduce(const float (&G)[BR / 2], RowState& rows, TileCoord coord) {
    const int lane = thread() % 32, column = (coord.i - i_begin) % Shape::COLUMNS;
    if (coord.term == base_term) {
#pragma unroll
      for (int k = 0; k < Shape::COLUMNS / 2; k += 2)
        store_pair(dx_row(k / 2 % 2) + k / 4 * 8 + lane % 4 * 2, G[k], G[k + 1]);
      sync_warp();
      return;
    }
    if (coord.term == h_term && column % 4 == 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h) rows.x[h] = static_cast<float>(rows.next_x[h]);
      load_x(rows, coord.i - i_begin + 4);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float x = 1.f, sum = 0.f;
      if (coord.term == h_term) x = as_float(shuffle(as_uint(rows.x[h]), (lane & 28) | column % 4));
#pragma unroll
      for (int k = 2 * h; k < BR / 2; k += 4)
#pragma unroll
        for (int e = k; e < k + 2; ++e) {
          rows.dz[e] += G[e] * x;
          sum += G[e] * rows.z[e];
        }
      if (coord.term != h_term) continue;
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      if (lane % 4 == 0) dx_row(h)[column] = f.base ? dx_row(h)[column] + sum : sum;
    }
    if (coord.term == h_term && (column == Shape::COLUMNS - 1 || coord.i == i_end - 1))
      store_dx(coord.i - column, column + 1);
  }

  // Load x of the four i from i_begin + n on: one for each of four lanes; beyond the end, x of the last i.
  DEVICE void load_x(RowState& rows, int n) const {
    const int i_offset = least(i_begin + n + thread() % 4, i_end - 1) * static_cast<int>(f.x.stride);
#pragma unroll
    for (int h = 0; h < 2; ++h) rows.next_x[h] = f.x.data[rows.x_offset[h] + i_offset];
  }

  // Rows beyond M repeat the last row; their results are not stored.
  DEVICE void load_rows(RowState& rows) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int m = least(row(h), f.M - 1);
      rows.x_offset[h] = static_cast<int>(f.x.row(m, f.N) - f.x.data);
      const T* const z = f.z.row(m, f.N);
#pragma unroll
      for (int k = 2 * h; k < BR / 2; k += 4)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int r = k / 4 * 8 + thread() % 4 * 2 + e;
          rows.z[k + e] = r < f.R ? static_cast<float>(z[r * f.z.stride]) : 0.f;
          rows.dz[k + e] = 0.f;
        }
    }
  }

  // Store `count` columns from i on of this warp's rows: half a warp per row, four elements per lane.
  DEVICE void store_dx(int i, int count) {
    sync_warp();
    const int lane = thread() % 32, column = lane % 16 * 4, row0 = warpgroup * 64 + thread() / 32 % 4 * 16 + lane / 16;
    const float* const dx = reinterpret_cast<const float*>(smem + Shape::DX_OFFSET) + column;
    const bool vectorized = f.I % 4 == 0 && i % 4 == 0;
    for (int k = 0; k < 16; k += 2) {
      const float* const from = dx + (row0 + k) * Shape::DX_STRIDE;
      T* const to = f.dx + static_cast<int64_t>(m0 + row0 + k) * f.I + i + column;
      if (m0 + row0 + k >= f.M) break;
      if (vectorized && column + 4 <= count) {
        struct alignas(8) Four {
          uint32_t low, high;
        };
        *reinterpret_cast<Four*>(to) = {
            pack(static_cast<T>(from[0]), static_cast<T>(from[1])),
            pack(static_cast<T>(from[2]), static_cast<T>(from[3]))};
      } else {
        for (int e = 0; e < 4 && column + e < count; ++e) to[e] = static_cast<T>(from[e]);
      }
    }
    sync_warp();
  }

  DEVICE void store_dz(const RowState& rows) const {
#pragma unroll
    for (int k = 0; k < BR / 2; ++k) {
      const int m = row(k / 2 % 2), r = k / 4 * 8 + thread() % 4 * 2 + k % 2;
      if (m < f.M && r < f.R) f.dz.store((static_cast<int64_t>(split) * f.M + m) * f.R + r, rows.dz[k]);
    }
  }
};

}  // namespace fasthyper
