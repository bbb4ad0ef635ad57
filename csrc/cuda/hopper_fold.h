// fold for sm_90a: the formula of fold.h, its generated operand made in registers while products run.
//
//     out[m, p] = Σ_c Σ_k u[m, c] v[m, k] H(c, k, p)  +  Σ_c u[m, c] A(p, c)  +  Σ_k v[m, k] C(p, k)  +  d[p]
//
// A tile of out has 256 rows, four times 64 in two warpgroups of consumers; a warp of a third one brings tiles of H, BN
// rows p by 64 k, through a ring. Runs of one k0 keep v in registers and go through c. A and C make runs of one tile
// each, in which u or v stands for v, and one for u. Blocks go from tile to tile; those that run together have other
// rows of the same p, and so share H in the L2 cache.
#pragma once
#include <cstdint>
#include <type_traits>

#include "fold.h"
#include "hopper.h"
#include "hopper_instructions.h"
#include "hopper_layouts.h"
#include "instructions.h"
#include "numbers.h"
#include "views.h"

namespace fasthyper {

template <class T>
struct HopperFold {
  Fold<T> f;
  TensorMap h, a, c;
  int together;  // c to a tile of H, where K is 16 or 32 and they lie side by side; else one

  INLINE int steps_of_c() const { return f.K / per_step<T>; }
};

template <int BN_>
struct HopperFoldShape {
  static constexpr int BN = BN_, MT = 2, CONSUMERS = 2, BM = CONSUMERS * MT * 64;
  static constexpr int THREADS = WARPGROUP * (CONSUMERS + 1), TILE = BN * ROW_BYTES, STAGES = BN == 128 ? 6 : 8;
  static constexpr int AT_ROWS = STAGES * TILE + Ring<STAGES>::BYTES, SHARED = AT_ROWS + CONSUMERS * WARPGROUP * 32;
};

template <class T, int BN, bool SMALL>
class HopperFoldBlock {
  using Shape = HopperFoldShape<BN>;
  static constexpr int MT = Shape::MT, PER_ROW = per_row<T>, GROUP = 4;  // c whose u is read at a time
  static constexpr bool SCALED = std::is_same_v<T, float16>;
  const HopperFold<T>& all;
  const Fold<T>& f;
  char* const memory;
  Ring<Shape::STAGES> ring;
  int m_tiles, p_tiles, tiles, product_runs, a_runs, plain_runs;
  int m0, p0, split, first, last;  // of the tile at hand

  enum Kind { product_with_h, from_u, from_v };
  struct Run {
    Kind kind;
    int k0, steps, tiles;
  };

 public:
  DEVICE HopperFoldBlock(const HopperFold<T>& all, char* memory)
      : all(all), f(all.f), memory(memory), ring(reinterpret_cast<Barrier*>(memory + Shape::STAGES * Shape::TILE)) {
    m_tiles = cdiv(f.M, Shape::BM), p_tiles = cdiv(f.P, BN);
    tiles = m_tiles * p_tiles * cdiv(f.C, f.per_split);
    product_runs = SMALL ? 1 : cdiv(f.K, PER_ROW);
  }

  DEVICE void run() {
    if (thread() == 0) ring.init(1, 4 * Shape::CONSUMERS);
    sync();
    if (thread() < WARPGROUP) {
      give_registers<24>();
      if (thread() == 0) produce();
    } else {
      take_registers<240>();
      consume();
    }
  }

 private:
  DEVICE void begin_tile(int tile) {
    m0 = tile % m_tiles * Shape::BM;
    p0 = tile / m_tiles % p_tiles * BN;
    split = tile / m_tiles / p_tiles;
    first = split * f.per_split;
    last = least(f.C, first + f.per_split);
    a_runs = f.a && split == 0 ? cdiv(f.C, PER_ROW) : 0;
    plain_runs = a_runs + (f.c && split == 0 ? cdiv(f.K, PER_ROW) : 0);
  }

  // Those of A come first, then those of C, then the products with H.
  DEVICE Run run_at(int r) const {
    const Kind kind = r < a_runs ? from_u : r < plain_runs ? from_v : product_with_h;
    const int k0 = (kind == from_u ? r : kind == from_v ? r - a_runs : r - plain_runs) * PER_ROW;
    const int left = (kind == from_u ? f.C : f.K) - k0;
    const int tiles = kind != product_with_h ? 1 : SMALL ? cdiv(last - first, all.together) : last - first;
    const int steps = SMALL || kind != product_with_h ? STEPS : least(STEPS, cdiv(left, per_step<T>));
    return {kind, k0, steps, tiles};
  }

  DEVICE void produce() {
    prefetch(all.h);
    for (int tile = block_x(); tile < tiles; tile += blocks_x()) {
      begin_tile(tile);
      for (int r = 0; r < plain_runs + product_runs; ++r) {
        const Run run = run_at(r);
        for (int k = 0; k < run.tiles; ++k) {
          ring.wait_empty();
          Barrier* const full = ring.full + ring.stage;
          char* const to = memory + ring.stage * Shape::TILE;
          barrier_arrive_expecting(full, Shape::TILE);
          if (run.kind == product_with_h) {
            if constexpr (SMALL) load_box(to, all.h, (first + k * all.together) * f.K, 0, p0, full);
            else load_box(to, all.h, run.k0, first + k, p0, full);
          } else {
            load_box(to, run.kind == from_u ? all.a : all.c, run.k0, 0, p0, full);
          }
          ring.next();
        }
      }
    }
  }

  DEVICE int row(int mt, int h) const {
    return m0 + (thread() / 32 - 4) / 4 * MT * 64 + mt * 64 + thread() / 32 % 4 * 16 + thread() % 32 / 4 + 8 * h;
  }

  DEVICE void consume() {
    for (int tile = block_x(); tile < tiles; tile += blocks_x()) {
      begin_tile(tile);
      float acc[MT][BN / 2];
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
        for (int k = 0; k < BN / 2; ++k) acc[mt][k] = 0.f;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int m = row(mt, h);
          own_rows()->at[mt][h] = static_cast<int>(f.u.row(least(m, f.M - 1), f.N) - f.u.data);
          if constexpr (SCALED) own_rows()->exponent[mt][h] = factor_of(m);
        }
      }
      int r = 0;
      for (; r < plain_runs; ++r) multiply_plainly(acc, run_at(r));
      if constexpr (SCALED) scale(acc);
      do {
        const Run run = run_at(r);
        if (SMALL || run.steps == STEPS) go_through<true>(acc, run);
        else go_through<false>(acc, run);
      } while (++r < plain_runs + product_runs);
      store(acc);
    }
  }

  // Where in u a thread's rows begin, those beyond M as the last one, and what power of two they are multiplied by: its
  // own words of shared memory, as registers are few.
  struct alignas(16) OwnRows {
    int at[MT][2], exponent[MT][2];
  };
  DEVICE OwnRows* own_rows() const {
    return reinterpret_cast<OwnRows*>(memory + Shape::AT_ROWS) + thread() - WARPGROUP;
  }

  // u of the four c from `first` + c on: each lane of four has one of them, the last one where there are no more.
  DEVICE void fetch(T (&u)[MT][2], int c) const {
    const OwnRows u_row = *own_rows();
    const int at = least(first + c + thread() % 4, last - 1) * static_cast<int>(f.u.step);
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int h = 0; h < 2; ++h) u[mt][h] = f.u.data[u_row.at[mt][h] + at];
  }

  template <bool WHOLE>
  DEVICE void go_through(float (&acc)[MT][BN / 2], const Run& run) {
    uint32_t v[MT][STEPS][4], words[MT][2];
    T next[MT][2];
    operands(v, run.k0, SMALL ? all.steps_of_c() : STEPS, f.v, f.K, f.v_aligned);
    fetch(next, 0);
    const int stride = SMALL ? all.together : 1;
    int k = 0;
    do {
      const int c = k * stride;  // from `first` on
      if (c % GROUP == 0) {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
          for (int h = 0; h < 2; ++h) words[mt][h] = scaled(next[mt][h], mt, h);
        fetch(next, c + GROUP);
      }
      uint32_t u[MT][2];
      if constexpr (!SMALL) choose(u, words, c);
#pragma unroll
      for (int j = 0; j < STEPS; ++j) {
        if (!WHOLE && j > 0 && j >= run.steps) break;
        uint32_t a[MT][4];
        if constexpr (SMALL) choose(u, words, c + j * stride / STEPS);
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
          for (int q = 0; q < 4; ++q) a[mt][q] = times(v[mt][j][q], u[mt][q & 1], T{});
        if (j == 0) ring.wait_full();
        products_begin();
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) product<false>(acc[mt], a[mt], tile() + j * K16, T{});
        products_commit();
        products_wait<1>();  // so the group before is over, and with the first of a tile the tile before
        if (j == 0 && k > 0 && thread() % 32 == 0) ring.release_last();
      }
      if constexpr (!WHOLE) products_wait<0>();  // the next words are made in the same registers
      ring.next();
    } while (++k < run.tiles);
    products_wait<0>();
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) settled(acc[mt]);
    if (thread() % 32 == 0) ring.release_last();
  }

  DEVICE uint64_t tile() const { return k_rows(shared_address(memory) + ring.stage * Shape::TILE); }

  // One tile of A or C, with u or v as they are.
  DEVICE void multiply_plainly(float (&acc)[MT][BN / 2], const Run& run) {
    uint32_t a[MT][STEPS][4];
    if (run.kind == from_u) operands(a, run.k0, STEPS, f.u, f.C, f.u_aligned);
    else operands(a, run.k0, STEPS, f.v, f.K, f.v_aligned);
    ring.wait_full();
    products_begin();
#pragma unroll
    for (int j = 0; j < STEPS; ++j)
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) product<false>(acc[mt], a[mt][j], tile() + j * K16, T{});
    products_commit();
    products_wait<0>();
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) settled(acc[mt]);
    if (thread() % 32 == 0) ring.release();
    ring.next();
  }

  // The number of the c-th after `first`, twice, of the words of its four; zero beyond the last.
  DEVICE void choose(uint32_t (&u)[MT][2], const uint32_t (&words)[MT][2], int c) const {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        u[mt][h] = shuffle(words[mt][h], (thread() & 28) | c % GROUP);
        if (SMALL && first + c >= last) u[mt][h] = 0;
      }
  }

  // Rows from k0 on, zeros beyond `limit`; every `steps` the same again.
  template <int COUNT>
  DEVICE void operands(
      uint32_t (&v)[MT][COUNT][4], int k0, int steps, const Rows<T>& rows, int limit, bool aligned) const {
    if (limit % 2 == 0 && aligned)
      load_operands(v, k0, steps, rows, [&](const T* row, int k) {
        return k < limit ? *reinterpret_cast<const uint32_t*>(row + k) : 0;
      });
    else
      load_operands(v, k0, steps, rows, [&](const T* row, int k) {
        const T low = k < limit ? row[k * rows.step] : T(0.f);
        return pair(low, k + 1 < limit ? row[(k + 1) * rows.step] : T(0.f));
      });
  }
  template <int COUNT, class Load>
  DEVICE void load_operands(uint32_t (&v)[MT][COUNT][4], int k0, int steps, const Rows<T>& rows, Load load) const {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int m = row(mt, h), limit = m < f.M ? k0 + STEPS * per_step<T> : 0;
        const T* const from = rows.row(least(m, f.M - 1), f.N);
#pragma unroll
        for (int j = 0; j < COUNT; ++j)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int k = k0 + (j & (steps - 1)) * per_step<T> + thread() % 4 * 2 + half * 8;
            v[mt][j][half * 2 + h] = k < limit ? load(from, k) : 0;
          }
      }
  }

  // float16: a power of two for each row of u, undone at the end.
  DEVICE int factor_of(int m) const {
    float most_u = 0.f, most_v = 0.f;
    if (m < f.M) {
      const T *const u = f.u.row(m, f.N), *const v = f.v.row(m, f.N);
      for (int c = first + thread() % 4; c < last; c += 4) most_u = larger(most_u, static_cast<float>(u[c * f.u.step]));
      for (int k = thread() % 4; k < f.K; k += 4) most_v = larger(most_v, static_cast<float>(v[k * f.v.step]));
    }
#pragma unroll
    for (int by = 1; by < 4; by *= 2) {
      most_u = fmaxf(most_u, shuffle_xor(most_u, by));
      most_v = fmaxf(most_v, shuffle_xor(most_v, by));
    }
    return into_range(most_u, most_v);
  }
  DEVICE uint32_t scaled(T u, int mt, int h) const {
    if constexpr (!SCALED) return twice(u);
    return twice(static_cast<T>(static_cast<float>(u) * power_of_two(own_rows()->exponent[mt][h])));
  }
  DEVICE void scale(float (&acc)[MT][BN / 2]) const {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
      const float by[2] = {power_of_two(own_rows()->exponent[mt][0]), power_of_two(own_rows()->exponent[mt][1])};
#pragma unroll
      for (int k = 0; k < BN / 2; ++k) acc[mt][k] *= by[k / 2 % 2];
    }
  }

  DEVICE void store(const float (&acc)[MT][BN / 2]) const {
    if (f.partial) store_to(f.partial + static_cast<int64_t>(split) * f.M * f.P, acc);
    else store_to(f.out, acc);
  }
  template <class Out>
  DEVICE void store_to(Out* out, const float (&acc)[MT][BN / 2]) const {
    if (f.P % 2 == 0) store_to<true>(out, acc);
    else store_to<false>(out, acc);
  }
  template <bool PAIRS, class Out>
  DEVICE void store_to(Out* out, const float (&acc)[MT][BN / 2]) const {
#pragma unroll
    for (int j = 0; j < BN / 8; ++j) {
      const int p = p0 + j * 8 + thread() % 4 * 2;
      const bool first_there = p < f.P, second_there = p + 1 < f.P, add = f.d && split == 0;
      const float d0 = add && first_there ? static_cast<float>(f.d[p * f.d_p]) : 0.f;
      const float d1 = add && second_there ? static_cast<float>(f.d[(p + 1) * f.d_p]) : 0.f;
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int m = row(mt, h);
          const float back = SCALED ? power_of_two(-own_rows()->exponent[mt][h]) : 1.f;
          const float low = acc[mt][j * 4 + 2 * h] * back + d0, high = acc[mt][j * 4 + 2 * h + 1] * back + d1;
          Out* const to = out + static_cast<int64_t>(m) * f.P + p;
          if constexpr (PAIRS) {
            if (m < f.M && first_there) store_pair(to, low, high);
          } else {
            if (m < f.M && first_there) to[0] = static_cast<Out>(low);
            if (m < f.M && second_there) to[1] = static_cast<Out>(high);
          }
        }
    }
  }
};

}  // namespace fasthyper
