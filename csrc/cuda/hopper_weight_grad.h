// dH for sm_90a. Rows (i, r) of the left operand are generated in registers; the sum is over the batch.
//
//     dH[o, i, r] = Σ_m (x[m, i] z[m, r]) g[m, o]
//
// A CTA computes four i, two per consumer warpgroup, by 64 r by BN o, for the rows m of a split. A stage has 64 rows m:
// TMA loads z and g; two producer warps load x, which may have any strides, through registers. Consumers read z with
// ldmatrix_trans, once for both i of a warpgroup. g, whose o are contiguous, is the MN-major right operand. The CTAs of
// a cluster have different i; each loads z and g of a part of the rows m for all.
#pragma once
#include <cstdint>

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
  static constexpr int THREADS = WARPGROUP * (CONSUMERS + 1), STAGES = BN > 64 ? 6 : 8;
  static constexpr int BOX_BYTES = BATCH * ROW_BYTES, BOXES = 1 + (BN + 63) / 64, X_OFFSET = BOXES * BOX_BYTES,
                       STAGE_BYTES = X_OFFSET + SWIZZLE_ATOM_BYTES;
  static constexpr int MAXIMA_OFFSET = STAGES * STAGE_BYTES + Pipeline<STAGES>::BYTES;
  static constexpr int SMEM_BYTES = MAXIMA_OFFSET + THREADS / 32 * (INPUTS + 1) * sizeof(float);
};

template <class T, int BN>
class HopperWeightGradCta {
  using Shape = HopperWeightGradShape<BN>;
  static constexpr int MT = Shape::MT, BATCH = Shape::BATCH, INPUTS = Shape::INPUTS;
  static constexpr int X_PREFETCH = 4;  // stages of x that are loaded to registers ahead
  const HopperWeightGrad<T>& params;
  const WeightGrad<T>& f;
  char* const smem;
  Pipeline<Shape::STAGES> pipeline;
  int i0, r0, o0, split, m_begin, m_end, k_tiles;
  int exponents[INPUTS] = {};  // float16: of the scales of x

 public:
  // CTAs that run at the same time have different i of the same z and g.
  DEVICE HopperWeightGradCta(const HopperWeightGrad<T>& params, char* smem, int cta)
      : params(params),
        f(params.f),
        smem(smem),
        pipeline(reinterpret_cast<Mbarrier*>(smem + Shape::STAGES * Shape::STAGE_BYTES)) {
    const int i_tiles = cdiv(f.I, INPUTS * cluster_size()) * cluster_size(), r_tiles = cdiv(f.R, 64),
              o_tiles = cdiv(f.O, BN);
    i0 = cta % i_tiles * INPUTS;
    r0 = cta / i_tiles % r_tiles * 64;
    o0 = cta / i_tiles / r_tiles % o_tiles * BN;
    split = cta / i_tiles / r_tiles / o_tiles;
    m_begin = split * f.per_split;
    m_end = least(f.M, m_begin + f.per_split);
    k_tiles = cdiv(m_end - m_begin, BATCH);
  }

  DEVICE void run() {
    if (thread() == 0) pipeline.init(1 + Shape::X_THREADS, 4 * Shape::CONSUMERS * cluster_size());
    if constexpr (is_scaled<T>) find_exponents();
    sync_cluster();
    if (thread() < WARPGROUP) {
      setmaxnreg_dec<72>();
      if (thread() == 0) produce_z_and_g();
      else if (thread() / 32 == 1 || thread() / 32 == 2) produce_x(thread() - 32);
    } else {
      setmaxnreg_inc<216>();
      consume();
    }
    sync_cluster();  // the other CTA may still use this CTA's shared memory
  }

 private:
  DEVICE char* stage() const { return smem + pipeline.stage * Shape::STAGE_BYTES; }

  DEVICE void produce_z_and_g() {
    prefetch_tensormap(params.z);
    prefetch_tensormap(params.g);
    const int rows = BATCH / cluster_size(), row = cluster_rank() * rows;  // that this CTA loads
    for (int k = 0; k < k_tiles; ++k) {
      pipeline.producer_acquire();
      Mbarrier* const full = pipeline.full + pipeline.stage;
      char* const to = stage() + row * ROW_BYTES;
      const int m = m_begin + k * BATCH + row;
      mbarrier_arrive_expect_tx(full, Shape::BOXES * Shape::BOX_BYTES);
      cluster_load(to, params.z, r0, 0, m, full);
#pragma unroll
      for (int b = 1; b < Shape::BOXES; ++b)
        cluster_load(to + b * Shape::BOX_BYTES, params.g, o0 + (b - 1) * 64, 0, m, full);
      pipeline.advance();
    }
  }

  // Store x of one row m of each stage. The order of rows makes the eight words of a consumer lane contiguous: those
  // with m = 16·j + 8·half + 2·(lane%4) and m + 1, for all j and halves.
  DEVICE void produce_x(int row) {
    const int offset = row / 2 % 4 * 16 + row / 8 * 2 + row % 2;
    T prefetched[X_PREFETCH][INPUTS];
#pragma unroll
    for (int a = 0; a < X_PREFETCH; ++a) load_x(prefetched[a], row + a * BATCH);
    for (int k = 0; k < k_tiles; k += X_PREFETCH)
#pragma unroll
      for (int a = 0; a < X_PREFETCH; ++a) {
        if (k + a >= k_tiles) break;
        pipeline.producer_acquire();
        T* const to = reinterpret_cast<T*>(stage() + Shape::X_OFFSET) + offset;
#pragma unroll
        for (int i = 0; i < INPUTS; ++i) to[i * BATCH] = scaled(prefetched[a][i], exponents[i]);
        mbarrier_arrive(pipeline.full + pipeline.stage);
        pipeline.advance();
        load_x(prefetched[a], row + (k + a + X_PREFETCH) * BATCH);
      }
  }
  DEVICE void load_x(T (&x)[INPUTS], int row) const {
    const T* const from = f.x.data + static_cast<int64_t>(m_begin + row) * f.x.instance_stride;
#pragma unroll
    for (int i = 0; i < INPUTS; ++i) {
      x[i] = T(0.f);
      if (m_begin + row < m_end && i0 + i < f.I) x[i] = from[(i0 + i) * f.x.stride];
    }
  }

  // Find the scale of each i from its largest |x|, and from the largest |z| of all r of the CTA, over the rows of the
  // split.
  DEVICE void find_exponents() {
    float maxima[INPUTS + 1] = {};
    for (int m = m_begin + thread() / 32; m < m_end; m += Shape::THREADS / 32) {
      const T *const x = f.x.data + m * f.x.instance_stride, *const z = f.z.data + m * f.z.instance_stride;
      const int lane = thread() % 32;
      if (lane < INPUTS && i0 + lane < f.I) {
        const float x_at_lane = static_cast<float>(x[(i0 + lane) * f.x.stride]);
#pragma unroll
        for (int i = 0; i < INPUTS; ++i)
          if (i == lane) maxima[i] = finite_max(maxima[i], x_at_lane);
      }
#pragma unroll
      for (int r = r0; r < r0 + 64; r += 32)
        if (r + lane < f.R) maxima[INPUTS] = finite_max(maxima[INPUTS], static_cast<float>(z[r + lane]));
    }
    float* const warp_maxima = reinterpret_cast<float*>(smem + Shape::MAXIMA_OFFSET);
#pragma unroll
    for (int k = 0; k <= INPUTS; ++k) {
      maxima[k] = max_of_lanes<32>(maxima[k]);
      if (thread() % 32 == 0) warp_maxima[thread() / 32 * (INPUTS + 1) + k] = maxima[k];
    }
    sync_threads();
#pragma unroll
    for (int k = 0; k <= INPUTS; ++k)
      for (int warp = 0; warp < Shape::THREADS / 32; ++warp)
        maxima[k] = fmaxf(maxima[k], warp_maxima[warp * (INPUTS + 1) + k]);
#pragma unroll
    for (int i = 0; i < INPUTS; ++i) exponents[i] = range_exponent(maxima[i], maxima[INPUTS]);
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
      pipeline.consumer_wait();
      uint32_t x[MT][2 * STEPS], z[STEPS][4];
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
        load_words(x[mt], stage() + Shape::X_OFFSET + (i_first + mt) * BATCH * sizeof(T) + lane % 4 * 32);
#pragma unroll
      for (int j = 0; j < STEPS; ++j) load_left_fragment_transposed<T>(z[j], stage(), 16 * j, 16 * warp, lane);
      const uint64_t g = mn_major(smem_address(stage()) + Shape::BOX_BYTES, Shape::BOX_BYTES);
#pragma unroll
      for (int j = 0; j < STEPS; ++j) {
        uint32_t a[MT][4];
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
          for (int q = 0; q < 4; ++q) a[mt][q] = mul(z[j][q], x[mt][2 * j + (q >> 1)], T{});
        wgmma_fence();
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) wgmma<true>(acc[mt], a[mt], g + j * MN_MAJOR_STEP, T{});
        wgmma_commit_group();
        wgmma_wait_group<1>();  // the previous group is done; after a stage's first group, so is the previous stage
        if (j == 0 && k > 0) pipeline.cluster_release_previous();
      }
      pipeline.advance();
    } while (++k < k_tiles);
    wgmma_wait_group<0>();
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) fence_accumulator(acc[mt]);
    epilogue(acc, i0 + i_first, r0 + 16 * warp + lane / 4, o0 + lane % 4 * 2);
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

  DEVICE void epilogue(const float (&acc)[MT][BN / 2], int i, int r, int o) const {
    const int64_t offset = split * f.partial_stride;
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
      int exponent = 0;
      if constexpr (is_scaled<T>)
#pragma unroll
        for (int k = 0; k < INPUTS; ++k) exponent = i + mt == i0 + k ? exponents[k] : exponent;
      const float unscale = power_of_two(-exponent);
#pragma unroll
      for (int k = 0; k < BN / 2; ++k) {
        const int row = r + k / 2 % 2 * 8, column = o + k / 4 * 8 + k % 2;
        if (i + mt < f.I && row < f.R && column < f.O)
          f.head.store(offset + (static_cast<int64_t>(column) * f.I + i + mt) * f.R + row, acc[mt][k] * unscale);
      }
    }
  }
};

}  // namespace fasthyper
