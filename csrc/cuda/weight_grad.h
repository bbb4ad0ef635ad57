// Gradients of all parameters. Rows (i, r) of the left operand are generated; the sum is over the batch.
//
//     dH[o, i, r]  = Σ_m (x[m, i] z[m, r]) g[m, o]             m = (b, n)
//     dbias[o, r], dW0[o, i], db0[o]                           the same, with x = 1, with z = 1, with both
//
// A CTA computes four i by per_row of R by per_row of O, for the rows m of a split. It has eight warps: two for
// each i, one for each half of the r. i = I stands for x = 1, and the r tile after the last for z = 1.
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
struct WeightGrad {
  RowView<T> x, z, g;
  Output<T> head, bias, base_weight, base_bias;  // (O, I, R), (O, R), (O, I), (O), or partial sums; or null
  int64_t partial_stride;                        // between splits of the partial sums of all four
  int M, N, I, O, R, per_split;
  int z_width, g_width;
  bool tf32;
  Activation activation;  // of x

  INLINE int inputs() const { return I + (bias.requested() || base_bias.requested()); }
  INLINE int r_tiles() const {
    return (head.requested() || bias.requested() ? cdiv(R, per_row<T>) : 0) +
           (base_weight.requested() || base_bias.requested());
  }
  INLINE int ctas() const { return cdiv(inputs(), 4) * r_tiles() * cdiv(O, per_row<T>); }
};

template <class T>
struct WeightGradShape {
  static constexpr int WI = 4, HALVES = 2, THREADS = 32 * WI * HALVES, STAGES = 4;
  static constexpr int MT = per_row<T> / 16 / HALVES, NT = per_row<T> / 8, BATCH = per_row<T>;  // rows m per stage
  static constexpr int TILE_BYTES = BATCH * ROW_BYTES, X_BYTES = WI * BATCH * sizeof(T),
                       STAGE_BYTES = 2 * TILE_BYTES + X_BYTES;
  static constexpr int SMEM_BYTES = STAGES * STAGE_BYTES;
};

template <class T, bool ACTIVE>
class WeightGradCta {
  using Shape = WeightGradShape<T>;
  const WeightGrad<T>& f;
  char* const smem;
  const int split, m_begin, m_end;
  const int rank = thread();
  const int lane = rank % 32, warp = rank / 32, wi = warp % Shape::WI, half = warp / Shape::WI;
  int i0, r0, o0;
  bool z_is_one;

 public:
  DEVICE WeightGradCta(const WeightGrad<T>& f, char* smem, int cta, int split)
      : f(f), smem(smem), split(split), m_begin(split * f.per_split), m_end(least(f.M, m_begin + f.per_split)) {
    const int r_tiles = f.r_tiles(), o_tiles = cdiv(f.O, per_row<T>);
    o0 = cta % o_tiles * per_row<T>;
    const int r_tile = cta / o_tiles % r_tiles;
    i0 = cta / o_tiles / r_tiles * Shape::WI;
    z_is_one = r_tile == r_tiles - 1 && (f.base_weight.requested() || f.base_bias.requested());
    r0 = z_is_one ? 0 : r_tile * per_row<T>;
  }

  DEVICE void run() {
    const int k_tiles = cdiv(m_end - m_begin, Shape::BATCH);
    float acc[Shape::MT][Shape::NT][4] = {};
    // x goes through a register, and is stored to shared memory one stage after its load.
    T next_x = load_x(0);
    for (int k = 0; k < Shape::STAGES - 1; ++k) {
      load_stage(k, k_tiles);
      store_x(k, next_x);
      next_x = load_x(k + 1);
    }
    for (int k = 0; k < k_tiles; ++k) {
      cp_async_wait_group<Shape::STAGES - 2>();
      sync_threads();
      const int next = k + Shape::STAGES - 1;
      load_stage(next, k_tiles);
      store_x(next, next_x);
      next_x = load_x(next + 1);
      multiply(acc, smem + k % Shape::STAGES * Shape::STAGE_BYTES);
    }
    epilogue(acc);
  }

 private:
  DEVICE void load_stage(int k, int k_tiles) {
    if (k < k_tiles) {
      char* const to = smem + k % Shape::STAGES * Shape::STAGE_BYTES;
      const int m0 = m_begin + k * Shape::BATCH;
      const auto span_of = [&](const RowView<T>& from, int column, int limit) {
        return [&, column, limit, m0](int row, int step) -> Span<T> {
          const int j = column + step * per_step<T>;
          if (m0 + row >= m_end || j >= limit) return {nullptr, 0};
          return {from.row(m0 + row, f.N) + j * from.stride, limit - j};
        };
      };
      if (!z_is_one)
        load_tile<T>(to, Shape::BATCH, STEPS, f.z_width, f.z.stride, rank, Shape::THREADS, span_of(f.z, r0, f.R));
      load_tile<T>(
          to + Shape::TILE_BYTES, Shape::BATCH, STEPS, f.g_width, f.g.stride, rank, Shape::THREADS,
          span_of(f.g, o0, f.O));
    }
    cp_async_commit_group();
  }

  // Load this thread's element of x for a k-tile: input thread / BATCH, row thread % BATCH.
  DEVICE T load_x(int k_tile) const {
    const int i = i0 + rank / Shape::BATCH, m = m_begin + k_tile * Shape::BATCH + rank % Shape::BATCH;
    if (rank >= Shape::WI * Shape::BATCH || m >= m_end || i > f.I) return T(0.f);
    if (i == f.I) return T(1.f);
    const T x = f.x.row(m, f.N)[i * f.x.stride];
    return !ACTIVE || f.activation == Activation::none ? x
                                                       : static_cast<T>(activate(static_cast<float>(x), f.activation));
  }

  DEVICE void store_x(int k_tile, T x) {
    if (rank >= Shape::WI * Shape::BATCH) return;
    char* const stage = smem + k_tile % Shape::STAGES * Shape::STAGE_BYTES;
    reinterpret_cast<T*>(stage + 2 * Shape::TILE_BYTES)[rank] = x;
  }

  DEVICE void multiply(float (&acc)[Shape::MT][Shape::NT][4], const char* stage) {
    const uint32_t* const x =
        reinterpret_cast<const uint32_t*>(stage + 2 * Shape::TILE_BYTES + wi * Shape::BATCH * sizeof(T));
    if (i0 + wi >= f.inputs()) return;
    const int lane = opaque(this->lane);  // keeps addresses out of registers: none are free
#pragma unroll
    for (int j = 0; j < STEPS; ++j) {
      const int m = j * per_step<T>;
      const uint32_t x0 = x[m / per_word<T> + lane % 4], x1 = x[m / per_word<T> + lane % 4 + 4];
      const int r_half = half * Shape::MT * 16, r_count = (z_is_one ? 1 : f.R) - r0 - r_half;
      GeneratedFragment<T> left[Shape::MT];
#pragma unroll
      for (int mt = 0; mt < Shape::MT; ++mt) {
        if (16 * mt >= r_count) break;
        uint32_t z[4];
        if (z_is_one) {
#pragma unroll
          for (int q = 0; q < 4; ++q) z[q] = lane / 4 == 0 && q % 2 == 0 ? replicate(T(1.f)) : 0;
        } else {
          load_left_fragment_transposed<T>(z, stage, m, r_half + 16 * mt, lane);
        }
        left[mt].set_columns(z, x0, x1);
      }
#pragma unroll
      for (int q = 0; q < Shape::NT / 2; ++q) {
        if (o0 + 16 * q >= f.O) break;
        uint32_t right[4];
        load_right_fragment_transposed<T>(right, stage + Shape::TILE_BYTES, m, 16 * q, lane);
#pragma unroll
        for (int mt = 0; mt < Shape::MT; ++mt) {
          if (16 * mt >= r_count) break;
          left[mt].accumulate(acc[mt][2 * q], right[0], right[1], f.tf32);
          left[mt].accumulate(acc[mt][2 * q + 1], right[2], right[3], f.tf32);
        }
      }
    }
  }

  DEVICE void epilogue(const float (&acc)[Shape::MT][Shape::NT][4]) {
    const int i = i0 + wi;
    if (i >= f.inputs()) return;
    const int64_t offset = split * f.partial_stride;
#pragma unroll
    for (int mt = 0; mt < Shape::MT; ++mt)
#pragma unroll
      for (int nt = 0; nt < Shape::NT; ++nt)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = r0 + (half * Shape::MT + mt) * 16 + lane / 4 + 8 * (e >> 1);
          const int o = o0 + nt * 8 + lane % 4 * 2 + (e & 1);
          const float value = acc[mt][nt][e];
          if (o >= f.O || r >= (z_is_one ? 1 : f.R)) continue;
          const int64_t oi = static_cast<int64_t>(o) * f.I + i;
          if (i < f.I) {
            if (z_is_one) {
              if (f.base_weight.requested()) f.base_weight.store(offset + oi, value);
            } else if (f.head.requested()) {
              f.head.store(offset + oi * f.R + r, value);
            }
          } else if (z_is_one) {
            if (f.base_bias.requested()) f.base_bias.store(offset + o, value);
          } else if (f.bias.requested()) {
            f.bias.store(offset + static_cast<int64_t>(o) * f.R + r, value);
          }
        }
  }
};

}  // namespace fasthyper
