// dH for sm_90a: rows (i, r) are the generated left operand, made in registers; the batch is what is summed over.
//
//     dH[o, i, r] = Σ_m (x[m, i] z[m, r]) g[m, o]
//
// A block has four i, two to a warpgroup of consumers, by 64 r and BN o, of a split of the rows m, 64 of which come at
// a time: z and g as boxes, x, whose strides are free, through the registers of two warps. z is read transposed, by
// matrices; both i of a warpgroup use it. g, whose o lie side by side, is the right operand as it is.
#pragma once
#include <cstdint>
#include <type_traits>

#include "hopper.h"
#include "hopper_instructions.h"
#include "hopper_layouts.h"
#include "instructions.h"
#include "numbers.h"
#include "tiles.h"
#include "weight_grad.h"

namespace fasthyper {

template <class T>
struct HopperWeightGrad {
  WeightGrad<T> f;
  TensorMap z, g;
};

template <int BN_>
struct HopperWeightGradShape {
  static constexpr int BN = BN_, MT = 2, CONSUMERS = 2, INPUTS = MT * CONSUMERS, BATCH = 64, X_THREADS = BATCH;
  static constexpr int THREADS = WARPGROUP * (CONSUMERS + 1), STAGES = BN == 128 ? 6 : 8;
  static constexpr int BOX = BATCH * ROW_BYTES, BOXES = 1 + BN / 64, AT_X = BOXES * BOX, STAGE = AT_X + PATTERN;
  static constexpr int AT_MOST = STAGES * STAGE + Ring<STAGES>::BYTES;
  static constexpr int SHARED = AT_MOST + THREADS / 32 * (INPUTS + 1) * sizeof(float);
};

template <class T, int BN>
class HopperWeightGradBlock {
  using Shape = HopperWeightGradShape<BN>;
  static constexpr int MT = Shape::MT, BATCH = Shape::BATCH, INPUTS = Shape::INPUTS;
  static constexpr int X_AHEAD = 4;  // pieces of x that are on their way to registers
  static constexpr bool SCALED = std::is_same_v<T, float16>;
  const HopperWeightGrad<T>& all;
  const WeightGrad<T>& f;
  char* const memory;
  Ring<Shape::STAGES> ring;
  int i0, r0, o0, split, first, last, pieces;
  int exponents[INPUTS] = {};  // float16: of the powers of two by which x is multiplied

 public:
  // Blocks that run together have other i of the same z and g.
  DEVICE HopperWeightGradBlock(const HopperWeightGrad<T>& all, char* memory, int block)
      : all(all), f(all.f), memory(memory), ring(reinterpret_cast<Barrier*>(memory + Shape::STAGES * Shape::STAGE)) {
    const int i_tiles = cdiv(f.I, INPUTS), r_tiles = cdiv(f.R, 64), o_tiles = cdiv(f.O, BN);
    i0 = block % i_tiles * INPUTS;
    r0 = block / i_tiles % r_tiles * 64;
    o0 = block / i_tiles / r_tiles % o_tiles * BN;
    split = block / i_tiles / r_tiles / o_tiles;
    first = split * f.per_split;
    last = least(f.M, first + f.per_split);
    pieces = cdiv(last - first, BATCH);
  }

  DEVICE void run() {
    if (thread() == 0) ring.init(1 + Shape::X_THREADS, 4 * Shape::CONSUMERS);
    if constexpr (SCALED) find_exponents();
    sync();
    if (thread() < WARPGROUP) {
      give_registers<72>();
      if (thread() == 0) bring_boxes();
      else if (thread() / 32 == 1 || thread() / 32 == 2) bring_x(thread() - 32);
    } else {
      take_registers<216>();
      consume();
    }
  }

 private:
  DEVICE char* stage() const { return memory + ring.stage * Shape::STAGE; }

  DEVICE void bring_boxes() {
    prefetch(all.z);
    prefetch(all.g);
    for (int k = 0; k < pieces; ++k) {
      ring.wait_empty();
      Barrier* const full = ring.full + ring.stage;
      const int m0 = first + k * BATCH;
      barrier_arrive_expecting(full, Shape::BOXES * Shape::BOX);
      load_box(stage(), all.z, r0, 0, m0, full);
#pragma unroll
      for (int b = 1; b < Shape::BOXES; ++b) load_box(stage() + b * Shape::BOX, all.g, o0 + (b - 1) * 64, 0, m0, full);
      ring.next();
    }
  }

  // x of a row m of each piece. Rows lie so that a consumer finds its eight words, m = 16·j + 8·half + 2·(lane%4) and
  // the next for all j and halves, side by side.
  DEVICE void bring_x(int row) {
    const int at = row / 2 % 4 * 16 + row / 8 * 2 + row % 2;
    T held[X_AHEAD][INPUTS];
#pragma unroll
    for (int a = 0; a < X_AHEAD; ++a) load_x(held[a], row + a * BATCH);
    for (int k = 0; k < pieces; k += X_AHEAD)
#pragma unroll
      for (int a = 0; a < X_AHEAD; ++a) {
        if (k + a >= pieces) break;
        ring.wait_empty();
        T* const to = reinterpret_cast<T*>(stage() + Shape::AT_X) + at;
#pragma unroll
        for (int i = 0; i < INPUTS; ++i) to[i * BATCH] = scaled(held[a][i], exponents[i]);
        barrier_arrive(ring.full + ring.stage);
        ring.next();
        load_x(held[a], row + (k + a + X_AHEAD) * BATCH);
      }
  }
  DEVICE void load_x(T (&x)[INPUTS], int row) const {
    const T* const from = f.x.data + static_cast<int64_t>(first + row) * f.x.instance;
#pragma unroll
    for (int i = 0; i < INPUTS; ++i) {
      x[i] = T(0.f);
      if (first + row < last && i0 + i < f.I) x[i] = from[(i0 + i) * f.x.step];
    }
  }

  DEVICE T scaled(T x, int exponent) const {
    if constexpr (!SCALED) return x;
    return static_cast<T>(static_cast<float>(x) * power_of_two(exponent));
  }

  // Of the largest |x| of each i and |z| of all r of the block, in its rows m.
  DEVICE void find_exponents() {
    float most[INPUTS + 1] = {};
    for (int m = first + thread() / 32; m < last; m += Shape::THREADS / 32) {
      const T *const x = f.x.data + m * f.x.instance, *const z = f.z.data + m * f.z.instance;
      const int lane = thread() % 32;
      if (lane < INPUTS && i0 + lane < f.I) {
        const float size = static_cast<float>(x[(i0 + lane) * f.x.step]);
#pragma unroll
        for (int i = 0; i < INPUTS; ++i)
          if (i == lane) most[i] = larger(most[i], size);
      }
#pragma unroll
      for (int r = r0; r < r0 + 64; r += 32)
        if (r + lane < f.R) most[INPUTS] = larger(most[INPUTS], static_cast<float>(z[r + lane]));
    }
    float* const of_warps = reinterpret_cast<float*>(memory + Shape::AT_MOST);
#pragma unroll
    for (int k = 0; k <= INPUTS; ++k) {
#pragma unroll
      for (int by = 16; by > 0; by /= 2) most[k] = fmaxf(most[k], shuffle_xor(most[k], by));
      if (thread() % 32 == 0) of_warps[thread() / 32 * (INPUTS + 1) + k] = most[k];
    }
    sync();
#pragma unroll
    for (int k = 0; k <= INPUTS; ++k)
      for (int warp = 0; warp < Shape::THREADS / 32; ++warp)
        most[k] = fmaxf(most[k], of_warps[warp * (INPUTS + 1) + k]);
#pragma unroll
    for (int i = 0; i < INPUTS; ++i) exponents[i] = into_range(most[i], most[INPUTS]);
  }

  DEVICE void consume() {
    const int lane = thread() % 32, warp = thread() / 32 % 4, i_first = (thread() / WARPGROUP - 1) * MT;
    float acc[MT][BN / 2];
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int k = 0; k < BN / 2; ++k) acc[mt][k] = 0.f;
    int k = 0;
    do {
      ring.wait_full();
      uint32_t x[MT][2 * STEPS], z[STEPS][4];
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
        load_words(x[mt], stage() + Shape::AT_X + (i_first + mt) * BATCH * sizeof(T) + lane % 4 * 32);
#pragma unroll
      for (int j = 0; j < STEPS; ++j) left_words_transposed<T>(z[j], stage(), 16 * j, 16 * warp, lane);
      const uint64_t g = mn_rows(shared_address(stage()) + Shape::BOX, Shape::BOX);
#pragma unroll
      for (int j = 0; j < STEPS; ++j) {
        uint32_t a[MT][4];
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
          for (int q = 0; q < 4; ++q) a[mt][q] = times(z[j][q], x[mt][2 * j + (q >> 1)], T{});
        products_begin();
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) product<true>(acc[mt], a[mt], g + j * K16_TRANSPOSED, T{});
        products_commit();
        products_wait<1>();  // so the group before is over, and with the first of a piece the piece before
        if (j == 0 && k > 0 && thread() % 32 == 0) ring.release_last();
      }
      ring.next();
    } while (++k < pieces);
    products_wait<0>();
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) settled(acc[mt]);
    store(acc, i0 + i_first, r0 + 16 * warp + lane / 4, o0 + lane % 4 * 2);
  }

  DEVICE static void load_words(uint32_t (&words)[2 * STEPS], const char* from) {
    struct alignas(16) Four {
      uint32_t words[4];
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Four four = reinterpret_cast<const Four*>(from)[half];
#pragma unroll
      for (int w = 0; w < 4; ++w) words[4 * half + w] = four.words[w];
    }
  }

  DEVICE void store(const float (&acc)[MT][BN / 2], int i, int r, int o) const {
    const int64_t part = split * f.partial_stride;
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
      int exponent = 0;
      if constexpr (SCALED)
#pragma unroll
        for (int k = 0; k < INPUTS; ++k) exponent = i + mt == i0 + k ? exponents[k] : exponent;
      const float back = power_of_two(-exponent);
#pragma unroll
      for (int k = 0; k < BN / 2; ++k) {
        const int row = r + k / 2 % 2 * 8, column = o + k / 4 * 8 + k % 2;
        if (i + mt < f.I && row < f.R && column < f.O)
          f.head.store(part + (static_cast<int64_t>(column) * f.I + i + mt) * f.R + row, acc[mt][k] * back);
      }
    }
  }
};

}  // namespace fasthyper
