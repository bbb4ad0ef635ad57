// What a block of pieces computes: the small products of terms.h, and products with H.
//
//   collect   A[ρ,q,c] = Σ_{e in ρ} u[e,q] v[e,c]      out_w[ρ,p] = Σ_{q,c} H[p,q,c] A[ρ,q,c]
//             dH[p,q,c] = Σ_ρ w[ρ,p] A[ρ,q,c]
//   expand    M[ρ,q,c] = Σ_p H[p,q,c] w[ρ,p]           out_u[e,q] = Σ_c M[ρ,q,c] v[e,c]
//                                                      out_v[e,c] = Σ_q M[ρ,q,c] u[e,q]
//
// A and M exist for one slab of q at a time. Products with H take operands of T, the small products are in float32.
#pragma once

#include "incidence_head.h"
#include "terms.h"

namespace fasthyper {

// The pieces and the rows of the factors of a block. The rows of its terms belong to u and v.
struct BlockRows {
  const Piece* pieces;
  const int64_t *w, *u, *v;
};

// Calls f(piece, its first term) for the pieces of a block.
template <class F>
inline void for_pieces(const Block& block, const BlockRows& rows, F&& f) {
  for (int64_t k = 0, term = 0; k < block.pieces; term += rows.pieces[k++].count) f(k, term);
}

// Writes A for a slab; zeros for empty pieces. u has the columns of the slab only.
inline void collect_slab(
    const Tiling& tiling, const Block& block, const BlockRows& rows, Span<const float> u, int64_t ld_u, int64_t first_q,
    int64_t qs, Span<const float> v, Span<float> slab) {
  const int64_t n = tiling.ld_v / WIDTH, numbers = qs * tiling.ld_v;
  for_pieces(block, rows, [&](int64_t k, int64_t term) {
    const int64_t count = rows.pieces[k].count;
    gather_outer(
        {u.at(term * ld_u + first_q, extent(count, ld_u, qs)), ld_u},
        {v.at(term * tiling.ld_v, count * tiling.ld_v), tiling.ld_v}, count, qs, n, slab.at(k * tiling.ld, numbers));
  });
  for (int64_t k = block.pieces; k < block.slots(); ++k) slab.subspan(k * tiling.ld, numbers).fill(0.f);
}

// The floats of scratch memory of a block, in the order of their use.
class Own {
 public:
  explicit Own(Span<float> floats) : floats_(floats) {}

  Span<float> take(int64_t count) {
    const auto taken = floats_.subspan(next_, count);
    next_ += round_up(count, LINE);
    return taken;
  }

  template <class T>
  Span<T> take_as(int64_t numbers) {
    return view_as<T>(take(floats_for<T>(numbers)));
  }

  static int64_t sum(std::initializer_list<int64_t> counts) {
    int64_t total = 0;
    for (const int64_t count : counts) total += round_up(count, LINE);
    return total;
  }

 private:
  Span<float> floats_;
  int64_t next_ = 0;
};

template <class S, class T>
class Collect {
 public:
  Collect(const IncidenceSum<S>& sum, const Tiling& tiling, int64_t workspace)
      : sum_(sum), tiling_(tiling), head_(sum.h, tiling, Product::collect, workspace) {}

  int64_t floats() const {
    return Own::sum(
        {tiling_.most.terms * tiling_.ld_u, tiling_.most.terms * tiling_.ld_v, tiling_.most.pieces * tiling_.ld,
         operand_floats(), head_.floats_for_panel()});
  }

  // out_w of the pieces of a block, p contiguous.
  void run(const Block& block, const BlockRows& rows, Span<float> scratch, Span<float> out) const {
    Own own(scratch);
    const Head<S>& h = sum_.h;
    const auto u = own.take(tiling_.most.terms * tiling_.ld_u), v = own.take(tiling_.most.terms * tiling_.ld_v);
    const auto slab = own.take(tiling_.most.pieces * tiling_.ld);
    const auto operand = own.take_as<T>(operand_numbers());
    const auto panel = own.take(head_.floats_for_panel());
    gather_rows(sum_.u, rows.u, block.terms, u, tiling_.ld_u);
    gather_rows(sum_.v, rows.v, block.terms, v, tiling_.ld_v);
    const int64_t m = block.slots();
    for (int64_t k = 0; k < tiling_.slabs; ++k) {
      const Range q = tiling_.slab(h, k);
      const int64_t depth = q.size() * tiling_.ld_v, read = extent(m, tiling_.ld, depth);
      collect_slab(tiling_, block, rows, u, tiling_.ld_u, q.begin, q.size(), v, slab);
      const T* a;
      if constexpr (std::is_same_v<T, float>) {
        a = slab.at(0, read);
      } else {
        for (int64_t i = 0; i < m; ++i)
          convert(slab.at(i * tiling_.ld, depth), operand.at(i * tiling_.ld, depth), depth);
        a = operand.at(0, read);
      }
      for (int64_t p = 0; p < h.p; p += RIGHT_COLUMNS)
        gemm(
            m, head_.width(q, p), depth, a, tiling_.ld, head_.panel(k, p, panel), head_.width(q, p),
            out.at(p, extent(m, h.p, head_.width(q, p))), h.p, k > 0);
    }
  }

 private:
  int64_t operand_numbers() const { return std::is_same_v<T, float> ? 0 : tiling_.most.pieces * tiling_.ld; }
  int64_t operand_floats() const { return floats_for<T>(operand_numbers()); }

  const IncidenceSum<S>& sum_;
  const Tiling& tiling_;
  const RightHead<S, T> head_;
};

template <class S, class T>
class Expand {
 public:
  Expand(const IncidenceSum<S>& sum, const Tiling& tiling, bool to_u, bool to_v, int64_t workspace)
      : sum_(sum), tiling_(tiling), to_u_(to_u), to_v_(to_v), head_(sum.h, tiling, Product::expand, workspace) {}

  int64_t floats() const {
    return Own::sum(
        {tiling_.most.terms * tiling_.ld_u, tiling_.most.terms * tiling_.ld_v, tiling_.most.pieces * tiling_.ld,
         tiling_.most.pieces * ld_w(), floats_for<T>(operand_numbers()), head_.floats_for_panel()});
  }

  // out_u and out_v of the terms of a block; rows are ld_u and ld_v apart. Either may be null.
  void run(const Block& block, const BlockRows& rows, Span<float> scratch, Span<float> out_u, Span<float> out_v) const {
    Own own(scratch);
    const Head<S>& h = sum_.h;
    const auto u = own.take(tiling_.most.terms * tiling_.ld_u), v = own.take(tiling_.most.terms * tiling_.ld_v);
    const auto slab = own.take(tiling_.most.pieces * tiling_.ld), w = own.take(tiling_.most.pieces * ld_w());
    const auto operand = own.take_as<T>(operand_numbers());
    const auto panel = own.take(head_.floats_for_panel());
    if (to_v_) gather_rows(sum_.u, rows.u, block.terms, u, tiling_.ld_u);
    if (to_u_) gather_rows(sum_.v, rows.v, block.terms, v, tiling_.ld_v);
    const int64_t m = block.slots();
    gather_rows(sum_.w, rows.w, m, w, ld_w());
    const T* left;
    if constexpr (std::is_same_v<T, float>) left = w.at(0, m * ld_w());
    else convert(w.at(0, m * ld_w()), operand.at(0, m * ld_w()), m * ld_w()), left = operand.at(0, m * ld_w());
    for (int64_t k = 0; k < tiling_.slabs; ++k) {
      const Range q = tiling_.slab(h, k);
      const int64_t columns = head_.columns(q);
      for (int64_t j = 0; j < columns; j += RIGHT_COLUMNS) {
        const int64_t width = head_.width(q, j);
        gemm(
            m, width, h.p, left, ld_w(), head_.panel(k, j, panel), width, slab.at(j, extent(m, tiling_.ld, width)),
            tiling_.ld, false);
      }
      spread(block, rows, q, slab, u, v, out_u, out_v);
    }
  }

 private:
  int64_t ld_w() const { return packed_ld(sum_.h.p); }
  int64_t operand_numbers() const { return std::is_same_v<T, float> ? 0 : tiling_.most.pieces * ld_w(); }

  // Adds a slab of M to the results of all terms.
  void spread(
      const Block& block, const BlockRows& rows, Range q, Span<const float> slab, Span<const float> u,
      Span<const float> v, Span<float> out_u, Span<float> out_v) const {
    const int64_t ld_u = tiling_.ld_u, ld_v = tiling_.ld_v, n = ld_v / WIDTH;
    for_pieces(block, rows, [&](int64_t k, int64_t term) {
      const int64_t count = rows.pieces[k].count;
      const float* const m = slab.at(k * tiling_.ld, q.size() * ld_v);
      if (to_u_)
        spread_dots(
            m, {v.at(term * ld_v, count * ld_v), ld_v}, count, q.size(), n,
            {out_u.at(term * ld_u + q.begin, extent(count, ld_u, round_up(q.size(), DOTS))), ld_u});
      if (to_v_)
        spread_rows(
            {u.at(term * ld_u + q.begin, extent(count, ld_u, q.size())), ld_u}, m, count, q.size(), n,
            {out_v.at(term * ld_v, count * ld_v), ld_v}, q.begin > 0);
    });
  }

  const IncidenceSum<S>& sum_;
  const Tiling& tiling_;
  const bool to_u_, to_v_;
  const RightHead<S, T> head_;
};

}  // namespace fasthyper
