// fold for sm_90a: the formula of fold.h. Left operands are generated in registers while wgmma runs.
//
//     out[m, p] = Σ_c Σ_k u[m, c] v[m, k] H(c, k, p)  +  Σ_c u[m, c] A(p, c)  +  Σ_k v[m, k] C(p, k)  +  d[p]
//
// A tile of out has 256 rows: twice 64 for each of two consumer warpgroups. A producer warp loads tiles of H, BN rows p
// by 64 k, with TMA into a pipeline. A pass keeps v of one k0 in registers, and iterates over c. A and C are passes of
// one tile each, with u or v as the left operand. CTAs are persistent. CTAs that run at the same time have different
// rows of the same p, and share H in the L2 cache.
#pragma once
#include <cstdint>

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
  int c_per_tile;  // of H: more than one if K is 16 or 32, and all c are contiguous

  INLINE int steps_per_c() const { return f.K / per_step<T>; }
};

template <int BN_>
struct HopperFoldShape {
  static constexpr int BN = BN_, MT = 2, CONSUMERS = 2, BM = CONSUMERS * MT * 64;
  static constexpr int THREADS = WARPGROUP * (CONSUMERS + 1), TILE_BYTES = BN * ROW_BYTES, STAGES = BN > 64 ? 6 : 8;
  static constexpr int ROW_SCRATCH_OFFSET = STAGES * TILE_BYTES + Pipeline<STAGES>::BYTES,
                       SMEM_BYTES = ROW_SCRATCH_OFFSET + CONSUMERS * WARPGROUP * 32;
};

template <class T, int BN, bool SMALL_K>
class HopperFoldCta {
  using Shape = HopperFoldShape<BN>;
  static constexpr int MT = Shape::MT, PER_ROW = per_row<T>, U_GROUP = 4;  // c whose u is loaded at once
  const HopperFold<T>& params;
  const Fold<T>& f;
  char* const smem;
  Pipeline<Shape::STAGES> pipeline;
  int m_tiles, p_tiles, tiles, product_passes, a_passes, plain_passes;
  int m0, p0, split, c_begin, c_end;  // of the current tile

  enum Term { h_term, a_term, c_term };
  struct Pass {
    Term term;
    int k0, steps, k_tiles;
  };

 public:
  DEVICE HopperFoldCta(const HopperFold<T>& params, char* smem)
      : params(params),
        f(params.f),
        smem(smem),
        pipeline(reinterpret_cast<Mbarrier*>(smem + Shape::STAGES * Shape::TILE_BYTES)) {
    m_tiles = cdiv(f.M, Shape::BM), p_tiles = cdiv(f.P, BN);
    tiles = m_tiles * p_tiles * cdiv(f.C, f.per_split);
    product_passes = SMALL_K ? 1 : cdiv(f.K, PER_ROW);
  }

  DEVICE void run() {
    if (thread() == 0) pipeline.init(1, 4 * Shape::CONSUMERS);
    sync_threads();
    if (thread() < WARPGROUP) {
      setmaxnreg_dec<24>();
      if (thread() == 0) produce();
    } else {
      setmaxnreg_inc<240>();
      consume();
    }
  }

 private:
  DEVICE void begin_tile(int tile) {
    m0 = tile % m_tiles * Shape::BM;
    p0 = tile / m_tiles % p_tiles * BN;
    split = tile / m_tiles / p_tiles;
    c_begin = split * f.per_split;
    c_end = least(f.C, c_begin + f.per_split);
    a_passes = f.a && split == 0 ? cdiv(f.C, PER_ROW) : 0;
    plain_passes = a_passes + (f.c && split == 0 ? cdiv(f.K, PER_ROW) : 0);
  }

  // The order of passes: A, then C, then H.
  DEVICE Pass pass_at(int r) const {
    const Term term = r < a_passes ? a_term : r < plain_passes ? c_term : h_term;
    const int k0 = (term == a_term ? r : term == c_term ? r - a_passes : r - plain_passes) * PER_ROW;
    const int left = (term == a_term ? f.C : f.K) - k0;
    const int k_tiles = term != h_term ? 1 : SMALL_K ? cdiv(c_end - c_begin, params.c_per_tile) : c_end - c_begin;
    const int steps = SMALL_K || term != h_term ? STEPS : least(STEPS, cdiv(left, per_step<T>));
    return {term, k0, steps, k_tiles};
  }

  DEVICE void produce() {
    prefetch_tensormap(params.h);
    for (int tile = cta_x(); tile < tiles; tile += grid_x()) {
      begin_tile(tile);
      for (int r = 0; r < plain_passes + product_passes; ++r) {
        const Pass pass = pass_at(r);
        for (int k = 0; k < pass.k_tiles; ++k) {
          pipeline.producer_acquire();
          Mbarrier* const full = pipeline.full + pipeline.stage;
          char* const to = smem + pipeline.stage * Shape::TILE_BYTES;
          mbarrier_arrive_expect_tx(full, Shape::TILE_BYTES);
          if (pass.term == h_term) {
            if constexpr (SMALL_K) tma_load(to, params.h, (c_begin + k * params.c_per_tile) * f.K, 0, p0, full);
            else tma_load(to, params.h, pass.k0, c_begin + k, p0, full);
          } else {
            tma_load(to, pass.term == a_term ? params.a : params.c, pass.k0, 0, p0, full);
          }
          pipeline.advance();
        }
      }
    }
  }

  DEVICE int row(int mt, int h) const {
    return m0 + (thread() / 32 - 4) / 4 * MT * 64 + mt * 64 + thread() / 32 % 4 * 16 + thread() % 32 / 4 + 8 * h;
  }

  DEVICE void consume() {
    for (int tile = cta_x(); tile < tiles; tile += grid_x()) {
      begin_tile(tile);
      float acc[MT][BN / 2];
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
        for (int k = 0; k < BN / 2; ++k) acc[mt][k] = 0.f;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int m = row(mt, h);
          row_scratch()->u_offset[mt][h] = static_cast<int>(f.u.row(least(m, f.M - 1), f.N) - f.u.data);
          if constexpr (is_scaled<T>) row_scratch()->exponent[mt][h] = row_exponent(m);
        }
      }
      int r = 0;
      for (; r < plain_passes; ++r) multiply_plain(acc, pass_at(r));
      if constexpr (is_scaled<T>) scale(acc);
      do {
        const Pass pass = pass_at(r);
        if constexpr (SMALL_K) {
          multiply_pass<STEPS>(acc, pass);
        } else {
          if (pass.steps == 4) multiply_pass<4>(acc, pass);
          else if (pass.steps == 3) multiply_pass<3>(acc, pass);
          else if (pass.steps == 2) multiply_pass<2>(acc, pass);
          else multiply_pass<1>(acc, pass);
        }
      } while (++r < plain_passes + product_passes);
      epilogue(acc);
    }
  }

  // Per thread: the offsets of its rows in u, the last row for those beyond M, and the exponents of their scales. They
  // are in shared memory, because registers are few.
  struct alignas(16) RowScratch {
    int u_offset[MT][2], exponent[MT][2];
  };
  DEVICE RowScratch* row_scratch() const {
    return reinterpret_cast<RowScratch*>(smem + Shape::ROW_SCRATCH_OFFSET) + thread() - WARPGROUP;
  }
  DEVICE int exponent(int mt, int h) const {
    if constexpr (is_scaled<T>) return row_scratch()->exponent[mt][h];
    return 0;
  }

  // Load u of the four c from c_begin + c on: one for each of four lanes; beyond the end, u of the last c.
  DEVICE void load_u(T (&u)[MT][2], int c) const {
    const RowScratch scratch = *row_scratch();
    const int c_offset = least(c_begin + c + thread() % 4, c_end - 1) * static_cast<int>(f.u.stride);
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int h = 0; h < 2; ++h) u[mt][h] = f.u.data[scratch.u_offset[mt][h] + c_offset];
  }

  // COUNT is pass.steps, as a constant. Each step has registers of its own for the left operand, which wgmma reads
  // while the next one is generated; a single step needs those of two c.
  template <int COUNT>
  DEVICE void multiply_pass(float (&acc)[MT][BN / 2], const Pass& pass) {
    uint32_t v[MT][COUNT][4], words[MT][2];
    T next[MT][2];
    load_fragments(v, pass.k0, SMALL_K ? params.steps_per_c() : STEPS, f.v, f.K, f.v_aligned);
    load_u(next, 0);
    int k = 0;
    do {
      multiply_tile(acc, v, words, next, k);
      if constexpr (COUNT == 1) {
        if (++k == pass.k_tiles) break;
        multiply_tile(acc, v, words, next, k);
      }
    } while (++k < pass.k_tiles);
    wgmma_wait_group<0>();
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) fence_accumulator(acc[mt]);
    if (thread() % 32 == 0) pipeline.consumer_release_previous();
  }

  template <int COUNT>
  DEVICE void multiply_tile(
      float (&acc)[MT][BN / 2], const uint32_t (&v)[MT][COUNT][4], uint32_t (&words)[MT][2], T (&next)[MT][2], int k) {
    const int stride = SMALL_K ? params.c_per_tile : 1, c = k * stride;  // relative to c_begin
    if (c % U_GROUP == 0) {
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int h = 0; h < 2; ++h) words[mt][h] = replicate(scaled(next[mt][h], exponent(mt, h)));
      load_u(next, c + U_GROUP);
    }
    uint32_t u[MT][2];
    if constexpr (!SMALL_K) select_u(u, words, c);
#pragma unroll
    for (int j = 0; j < COUNT; ++j) {
      uint32_t a[MT][4];
      if constexpr (SMALL_K) select_u(u, words, c + j * stride / STEPS);
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int q = 0; q < 4; ++q) a[mt][q] = mul(v[mt][j][q], u[mt][q & 1], T{});
      if (j == 0) pipeline.consumer_wait();
      wgmma_fence();
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) wgmma<false>(acc[mt], a[mt], tile_descriptor() + j * K_MAJOR_STEP, T{});
      wgmma_commit_group();
      wgmma_wait_group<1>();  // the previous group is done; after a tile's first group, so is the previous tile
      if (j == 0 && k > 0 && thread() % 32 == 0) pipeline.consumer_release_previous();
    }
    pipeline.advance();
  }

  DEVICE uint64_t tile_descriptor() const { return k_major(smem_address(smem) + pipeline.stage * Shape::TILE_BYTES); }

  // Multiply one tile of A or C by u or v.
  DEVICE void multiply_plain(float (&acc)[MT][BN / 2], const Pass& pass) {
    uint32_t a[MT][STEPS][4];
    if (pass.term == a_term) load_fragments(a, pass.k0, STEPS, f.u, f.C, f.u_aligned);
    else load_fragments(a, pass.k0, STEPS, f.v, f.K, f.v_aligned);
    pipeline.consumer_wait();
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < STEPS; ++j)
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) wgmma<false>(acc[mt], a[mt][j], tile_descriptor() + j * K_MAJOR_STEP, T{});
    wgmma_commit_group();
    wgmma_wait_group<0>();
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) fence_accumulator(acc[mt]);
    if (thread() % 32 == 0) pipeline.consumer_release();
    pipeline.advance();
  }

  // Select u of c_begin + c from the lane that loaded it; zero beyond the last c.
  DEVICE void select_u(uint32_t (&u)[MT][2], const uint32_t (&words)[MT][2], int c) const {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        u[mt][h] = shuffle(words[mt][h], (thread() & 28) | c % U_GROUP);
        if (SMALL_K && c_begin + c >= c_end) u[mt][h] = 0;
      }
  }

  // Load fragments of rows from k0 on, with zeros beyond `limit`. They repeat after `steps` k-steps.
  template <int COUNT>
  DEVICE void load_fragments(
      uint32_t (&v)[MT][COUNT][4], int k0, int steps, const RowView<T>& rows, int limit, bool aligned) const {
    if (limit % 2 == 0 && aligned)
      load_fragments_with(v, k0, steps, rows, [&](const T* row, int k) {
        return k < limit ? *reinterpret_cast<const uint32_t*>(row + k) : 0;
      });
    else
      load_fragments_with(v, k0, steps, rows, [&](const T* row, int k) {
        const T low = k < limit ? row[k * rows.stride] : T(0.f);
        return pack(low, k + 1 < limit ? row[(k + 1) * rows.stride] : T(0.f));
      });
  }
  template <int COUNT, class Load>
  DEVICE void load_fragments_with(
      uint32_t (&v)[MT][COUNT][4], int k0, int steps, const RowView<T>& rows, Load load) const {
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

  // float16: return the exponent of a row's scale. The scale multiplies u, and the epilogue divides by it.
  DEVICE int row_exponent(int m) const {
    float max_u = 0.f, max_v = 0.f;
    if (m < f.M) {
      const T *const u = f.u.row(m, f.N), *const v = f.v.row(m, f.N);
      for (int c = c_begin + thread() % 4; c < c_end; c += 4)
        max_u = finite_max(max_u, static_cast<float>(u[c * f.u.stride]));
      for (int k = thread() % 4; k < f.K; k += 4) max_v = finite_max(max_v, static_cast<float>(v[k * f.v.stride]));
    }
    return range_exponent(max_of_lanes<4>(max_u), max_of_lanes<4>(max_v));
  }
  DEVICE void scale(float (&acc)[MT][BN / 2]) const {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
      const float factors[2] = {power_of_two(exponent(mt, 0)), power_of_two(exponent(mt, 1))};
#pragma unroll
      for (int k = 0; k < BN / 2; ++k) acc[mt][k] *= factors[k / 2 % 2];
    }
  }

  DEVICE void epilogue(const float (&acc)[MT][BN / 2]) const {
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
      const bool in_range0 = p < f.P, in_range1 = p + 1 < f.P, add = f.d && split == 0;
      const float d0 = add && in_range0 ? static_cast<float>(f.d[p * f.d_p]) : 0.f;
      const float d1 = add && in_range1 ? static_cast<float>(f.d[(p + 1) * f.d_p]) : 0.f;
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int m = row(mt, h);
          const float unscale = power_of_two(-exponent(mt, h));
          const float low = acc[mt][j * 4 + 2 * h] * unscale + d0, high = acc[mt][j * 4 + 2 * h + 1] * unscale + d1;
          Out* const to = out + static_cast<int64_t>(m) * f.P + p;
          if constexpr (PAIRS) {
            if (m < f.M && in_range0) store_pair(to, low, high);
          } else {
            if (m < f.M && in_range0) to[0] = static_cast<Out>(low);
            if (m < f.M && in_range1) to[1] = static_cast<Out>(high);
          }
        }
    }
  }
};

}  // namespace fasthyper
