// The gradients of all parameters: rows (i, r) are the generated left operand, the batch is what is summed over.
//
//     dH[o, i, r]  = Σ_m (x[m, i] z[m, r]) g[m, o]             m = (b, n)
//     dbias[o, r], dW0[o, i], db0[o]                           the same with one for x, for z, for both
//
// A block has four i, a tile's row of R and one of O, of a split of the rows m; its warps are four by two halves of the
// row of R. i = I stands for the one in the place of x, the tile after the last of R for the one in that of z.
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
  Rows<T> x, z, g;
  Target<T> head, bias, base_weight, base_bias;  // (O, I, R), (O, R), (O, I), (O), splits before; or null
  int64_t partial_stride;                        // from split to split, of all four
  int M, N, I, O, R, per_split;
  int z_width, g_width;
  bool tf32;
  Activation activation;  // of x

  INLINE int inputs() const { return I + (bias.wanted() || base_bias.wanted()); }
  INLINE int r_tiles() const {
    return (head.wanted() || bias.wanted() ? cdiv(R, per_row<T>) : 0) + (base_weight.wanted() || base_bias.wanted());
  }
  INLINE int blocks() const { return cdiv(inputs(), 4) * r_tiles() * cdiv(O, per_row<T>); }
};

template <class T>
struct WeightGradShape {
  static constexpr int WI = 4, HALVES = 2, THREADS = 32 * WI * HALVES, STAGES = 4;
  static constexpr int MT = per_row<T> / 16 / HALVES, NT = per_row<T> / 8, BATCH = per_row<T>;  // rows m at a time
  static constexpr int TILE = BATCH * ROW_BYTES, XS = WI * BATCH * sizeof(T), STAGE = 2 * TILE + XS;
  static constexpr int SHARED = STAGES * STAGE;
};

template <class T, bool ACTIVE>
class WeightGradBlock {
  using Shape = WeightGradShape<T>;
  const WeightGrad<T>& f;
  char* const memory;
  const int split, first, last;
  const int rank = thread();
  const int lane = rank % 32, warp = rank / 32, wi = warp % Shape::WI, half = warp / Shape::WI;
  int i0, r0, o0;
  bool z_is_one;

 public:
  DEVICE WeightGradBlock(const WeightGrad<T>& f, char* memory, int block, int split)
      : f(f), memory(memory), split(split), first(split * f.per_split), last(least(f.M, first + f.per_split)) {
    const int r_tiles = f.r_tiles(), o_tiles = cdiv(f.O, per_row<T>);
    o0 = block % o_tiles * per_row<T>;
    const int r_tile = block / o_tiles % r_tiles;
    i0 = block / o_tiles / r_tiles * Shape::WI;
    z_is_one = r_tile == r_tiles - 1 && (f.base_weight.wanted() || f.base_bias.wanted());
    r0 = z_is_one ? 0 : r_tile * per_row<T>;
  }

  DEVICE void run() {
    const int pieces = cdiv(last - first, Shape::BATCH);
    float acc[Shape::MT][Shape::NT][4] = {};
    // x comes through a register: it is stored one piece later than it was sent for.
    T held = x_of(0);
    for (int k = 0; k < Shape::STAGES - 1; ++k) {
      bring(k, pieces);
      store_x(k, held);
      held = x_of(k + 1);
    }
    for (int k = 0; k < pieces; ++k) {
      copy_wait<Shape::STAGES - 2>();
      sync();
      const int ahead = k + Shape::STAGES - 1;
      bring(ahead, pieces);
      store_x(ahead, held);
      held = x_of(ahead + 1);
      multiply(acc, memory + k % Shape::STAGES * Shape::STAGE);
    }
    store(acc);
  }

 private:
  DEVICE void bring(int k, int pieces) {
    if (k < pieces) {
      char* const to = memory + k % Shape::STAGES * Shape::STAGE;
      const int m0 = first + k * Shape::BATCH;
      const auto rows_of = [&](const Rows<T>& from, int column, int limit) {
        return [&, column, limit, m0](int row, int step) -> Span<T> {
          const int j = column + step * per_step<T>;
          if (m0 + row >= last || j >= limit) return {nullptr, 0};
          return {from.row(m0 + row, f.N) + j * from.step, limit - j};
        };
      };
      if (!z_is_one)
        load_tile<T>(to, Shape::BATCH, STEPS, f.z_width, f.z.step, rank, Shape::THREADS, rows_of(f.z, r0, f.R));
      load_tile<T>(
          to + Shape::TILE, Shape::BATCH, STEPS, f.g_width, f.g.step, rank, Shape::THREADS, rows_of(f.g, o0, f.O));
    }
    copy_commit();
  }

  // A thread's number of x of a piece, if it has one: input thread / BATCH, row thread % BATCH.
  DEVICE T x_of(int piece) const {
    const int i = i0 + rank / Shape::BATCH, m = first + piece * Shape::BATCH + rank % Shape::BATCH;
    if (rank >= Shape::WI * Shape::BATCH || m >= last || i > f.I) return T(0.f);
    if (i == f.I) return T(1.f);
    const T x = f.x.row(m, f.N)[i * f.x.step];
    return !ACTIVE || f.activation == Activation::none ? x
                                                       : static_cast<T>(activated(static_cast<float>(x), f.activation));
  }

  DEVICE void store_x(int piece, T x) {
    if (rank >= Shape::WI * Shape::BATCH) return;
    char* const stage = memory + piece % Shape::STAGES * Shape::STAGE;
    reinterpret_cast<T*>(stage + 2 * Shape::TILE)[rank] = x;
  }

  DEVICE void multiply(float (&acc)[Shape::MT][Shape::NT][4], const char* stage) {
    const uint32_t* const x =
        reinterpret_cast<const uint32_t*>(stage + 2 * Shape::TILE + wi * Shape::BATCH * sizeof(T));
    if (i0 + wi >= f.inputs()) return;
    const int lane = anew(this->lane);  // there are no registers to keep addresses
#pragma unroll
    for (int j = 0; j < STEPS; ++j) {
      const int m = j * per_step<T>;
      const uint32_t x0 = x[m / per_word<T> + lane % 4], x1 = x[m / per_word<T> + lane % 4 + 4];
      const int r_here = half * Shape::MT * 16, r_count = (z_is_one ? 1 : f.R) - r0 - r_here;
      Generated<T> left[Shape::MT];
#pragma unroll
      for (int mt = 0; mt < Shape::MT; ++mt) {
        if (16 * mt >= r_count) break;
        uint32_t z[4];
        if (z_is_one) {
#pragma unroll
          for (int q = 0; q < 4; ++q) z[q] = lane / 4 == 0 && q % 2 == 0 ? twice(T(1.f)) : 0;
        } else {
          left_words_transposed<T>(z, stage, m, r_here + 16 * mt, lane);
        }
        left[mt].set_columns(z, x0, x1);
      }
#pragma unroll
      for (int q = 0; q < Shape::NT / 2; ++q) {
        if (o0 + 16 * q >= f.O) break;
        uint32_t right[4];
        right_words_transposed<T>(right, stage + Shape::TILE, m, 16 * q, lane);
#pragma unroll
        for (int mt = 0; mt < Shape::MT; ++mt) {
          if (16 * mt >= r_count) break;
          left[mt].accumulate(acc[mt][2 * q], right[0], right[1], f.tf32);
          left[mt].accumulate(acc[mt][2 * q + 1], right[2], right[3], f.tf32);
        }
      }
    }
  }

  DEVICE void store(const float (&acc)[Shape::MT][Shape::NT][4]) {
    const int i = i0 + wi;
    if (i >= f.inputs()) return;
    const int64_t part = split * f.partial_stride;
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
          const int64_t of_i = static_cast<int64_t>(o) * f.I + i;
          if (i < f.I) {
            if (z_is_one) {
              if (f.base_weight.wanted()) f.base_weight.store(part + of_i, value);
            } else if (f.head.wanted()) {
              f.head.store(part + of_i * f.R + r, value);
            }
          } else if (z_is_one) {
            if (f.base_bias.wanted()) f.base_bias.store(part + o, value);
          } else if (f.bias.wanted()) {
            f.bias.store(part + static_cast<int64_t>(o) * f.R + r, value);
          }
        }
  }
};

}  // namespace fasthyper
