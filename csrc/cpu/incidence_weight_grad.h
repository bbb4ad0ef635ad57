// dH[p,q,c] = Σ_ρ w[ρ,p] A[ρ,q,c] for all rows ρ of an incidence sum.
//
// Each task owns a range of slabs of q and a range of p, and takes all blocks in order: results do not depend on the
// number of threads.
#pragma once

#include "incidence_products.h"

namespace fasthyper {

// A result with the axes of H in the order of an IncidenceSum; one of the axes is contiguous.
template <class S>
struct HeadOut {
  S* data;
  int64_t sp, sq, sc;  // strides
};

// Stores sums (p, q, c), of which rows p are `ld` apart and rows q are `ld_q` apart.
template <class S>
void store_head(const float* sums, int64_t ld, int64_t ld_q, int64_t p, int64_t q, int64_t c, const HeadOut<S>& to) {
  if (to.sc == 1)
    for (int64_t k = 0; k < q; ++k) pack(sums + k * ld_q, ld, 1, to.data + k * to.sq, to.sp, p, c);
  else if (to.sp == 1)
    for (int64_t k = 0; k < q; ++k) pack(sums + k * ld_q, 1, ld, to.data + k * to.sq, to.sc, c, p);
  else
    for (int64_t k = 0; k < p; ++k) pack(sums + k * ld, 1, ld_q, to.data + k * to.sp, to.sc, c, q);
}

template <class S, class T>
class IncidenceWeightGrad {
 public:
  IncidenceWeightGrad(const IncidenceSum<S>& sum, const Tiling& tiling, HeadOut<S> out, int64_t workspace)
      : sum_(sum), tiling_(tiling), out_(out), workspace_(workspace), ld_w_(packed_ld(tiling.most.pieces)) {
    const int64_t room = workspace / 8 / int64_t(sizeof(float)), each = tiling.q * tiling.ld_v;
    p_ = std::min(sum.h.p, std::max(PIECE_STEP, room / each / PIECE_STEP * PIECE_STEP));
    p_parts_ = ceil_div(sum.h.p, p_), p_ = ceil_div(sum.h.p, p_parts_);
    const int64_t threads = at::get_num_threads(), wanted = ceil_div(tiling.slabs * p_parts_, threads);
    slabs_ = std::clamp<int64_t>(std::min(wanted, room / threads / (each * p_)), 1, tiling.slabs);
    q_ = std::min(sum.h.q, slabs_ * tiling.q);
    ld_ = packed_ld(q_ * tiling.ld_v);
  }

  void run() const {
    const int64_t parts = ceil_div(tiling_.slabs, slabs_);
    for_units<T>(
        parts * p_parts_, sum_.multiplications(2, 2), floats(), workspace_, [&](int64_t unit, Span<float> own) {
          const int64_t first = unit % parts * slabs_, p = unit / parts * p_;
          run_part({first, std::min(tiling_.slabs, first + slabs_)}, {p, std::min(sum_.h.p, p + p_)}, Own(own));
        });
  }

 private:
  int64_t ld_u() const { return round_up(q_, 4); }
  int64_t operand_numbers() const { return std::is_same_v<T, float> ? 0 : tiling_.most.pieces * tiling_.ld; }

  int64_t floats() const {
    const Limits& most = tiling_.most;
    return Own::sum(
        {p_ * ld_, most.terms * ld_u(), most.terms * tiling_.ld_v, most.pieces * p_, floats_for<T>(p_ * ld_w_),
         most.pieces * tiling_.ld, floats_for<T>(operand_numbers())});
  }

  void run_part(Range slabs, Range p, Own own) const {
    const Limits& most = tiling_.most;
    const Head<S>& h = sum_.h;
    const Range q{slabs.begin * tiling_.q, std::min(h.q, slabs.end * tiling_.q)};
    const auto sums = own.take(p_ * ld_), u = own.take(most.terms * ld_u()), v = own.take(most.terms * tiling_.ld_v);
    const auto w = own.take(most.pieces * p_);
    const auto left = own.template take_as<T>(p_ * ld_w_);
    const auto slab = own.take(most.pieces * tiling_.ld);
    const auto operand = own.template take_as<T>(operand_numbers());
    const Scratch<int64_t> found(most.pieces + 2 * most.terms);
    int64_t* const at_w = found.at(0, most.pieces);
    int64_t* const at_u = found.at(most.pieces, most.terms);
    int64_t* const at_v = found.at(most.pieces + most.terms, most.terms);
    Piece pieces[BLOCK_PIECES];
    Position at;
    bool add = false;
    for (Block block; (block = next_block(sum_.terms, most, at, pieces)).pieces > 0; add = true) {
      find_rows(sum_.terms, pieces, block, at_w);
      find_terms(sum_.terms, pieces, block.pieces, at_u, at_v);
      gather_rows(sum_.u.columns(q.begin, q.end), at_u, block.terms, u, ld_u());
      gather_rows(sum_.v, at_v, block.terms, v, tiling_.ld_v);
      const int64_t m = block.slots(), ps = p.size();
      gather_rows(sum_.w.columns(p.begin, p.end), at_w, m, w, ps);
      pack((const float*)w.at(0, m * ps), 1, ps, left.at(0, ps * ld_w_), ld_w_, ps, m, ld_w_);
      for (int64_t k = slabs.begin; k < slabs.end; ++k) {
        const Range range = tiling_.slab(h, k);
        collect_slab(
            tiling_, block, {pieces, at_w, at_u, at_v}, u, ld_u(), range.begin - q.begin, range.size(), v, slab);
        add_slab(
            m, ps, range.size() * tiling_.ld_v, left, slab, operand,
            sums.subspan((range.begin - q.begin) * tiling_.ld_v), add);
      }
    }
    store_head(
        sums.at(0, extent(p.size(), ld_, q.size() * tiling_.ld_v)), ld_, tiling_.ld_v, p.size(), q.size(), h.c,
        HeadOut<S>{out_.data + p.begin * out_.sp + q.begin * out_.sq, out_.sp, out_.sq, out_.sc});
  }

  // sums[p] += Σ_ρ w[ρ,p] A[ρ] for the columns of a slab.
  void add_slab(
      int64_t m, int64_t ps, int64_t columns, Span<const T> left, Span<const float> slab, Span<T> operand,
      Span<float> sums, bool add) const {
    const T* right;
    if constexpr (std::is_same_v<T, float>) {
      right = slab.at(0, extent(m, tiling_.ld, columns));
    } else {
      for (int64_t i = 0; i < m; i += 2) {  // m is even
        const float* const a = slab.at(i * tiling_.ld, extent(2, tiling_.ld, columns));
        interleave(a, a + tiling_.ld, operand.at(i * tiling_.ld, 2 * columns), columns);
      }
      right = operand.at(0, extent(m / 2, 2 * tiling_.ld, 2 * columns));
    }
    for (int64_t j = 0; j < columns; j += RIGHT_COLUMNS) {
      const int64_t width = std::min(RIGHT_COLUMNS, columns - j);
      gemm(
          ps, width, m, left.at(0, extent(ps, ld_w_, m)), ld_w_, right + j * K_STEP<T>, tiling_.ld,
          sums.at(j, extent(ps, ld_, width)), ld_, add);
    }
  }

  const IncidenceSum<S>& sum_;
  const Tiling& tiling_;
  const HeadOut<S> out_;
  const int64_t workspace_, ld_w_;
  int64_t p_, p_parts_, slabs_, q_, ld_;
};

}  // namespace fasthyper
