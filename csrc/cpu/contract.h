// The two orders in which H is contracted with the factors of a group of rows:
//
//   contract    t[p,q] = Σ_c H[p,q,c] u_c[c]      out_p[p] += Σ_q t[p,q] u_q[q]      out_q[q] += Σ_p t[p,q] u_p[p]
//   fold        out[p] += Σ_{q,c} H[p,q,c] (u_q[q] u_c[c])
//
// H has one axis for each factor: i for x, r for z, o for g. Here p, q and c are these axes, in any order. Factors
// and sums are in blocks of lanes. All blocks of a group use a tile of H while it is in cache.
#pragma once

#include "contract_registers.h"

namespace fasthyper {

// Adds PB rows p of t to out_p, to out_q or to both.
template <int PB, bool P, bool Q>
inline void reduce_rows(const float* t, int64_t nq, const float* up, const float* uq, float* out_p, float* out_q) {
  for (int64_t l = 0; l < LANES; l += WIDTH) {
    Vec sum[PB], u[PB];
    for (int k = 0; k < PB; ++k) {
      if constexpr (P) sum[k] = load<Vec>(out_p + k * LANES + l);
      if constexpr (Q) u[k] = load<Vec>(up + k * LANES + l);
    }
    for (int64_t q = 0; q < nq; ++q) {
      Vec x, total;
      if constexpr (P) x = load<Vec>(uq + q * LANES + l);
      if constexpr (Q) total = load<Vec>(out_q + q * LANES + l);
      for (int k = 0; k < PB; ++k) {
        const Vec v = load<Vec>(t + (k * nq + q) * LANES + l);
        if constexpr (P) sum[k] += v * x;
        if constexpr (Q) total += v * u[k];
      }
      if constexpr (Q) store(out_q + q * LANES + l, total);
    }
    if constexpr (P)
      for (int k = 0; k < PB; ++k) store(out_p + k * LANES + l, sum[k]);
  }
}

template <bool P, bool Q>
void reduce(const float* t, int64_t np, int64_t nq, const float* up, const float* uq, float* out_p, float* out_q) {
  const auto at = [](auto* base, int64_t p) { return base ? base + p * LANES : nullptr; };
  int64_t p = 0;
  for (; p + 4 <= np; p += 4) reduce_rows<4, P, Q>(t + p * nq * LANES, nq, at(up, p), uq, at(out_p, p), out_q);
  for (; p < np; ++p) reduce_rows<1, P, Q>(t + p * nq * LANES, nq, at(up, p), uq, at(out_p, p), out_q);
}

constexpr int64_t TILE_ROWS = tile_size(256);
constexpr int64_t FOLD_DEPTH = tile_size(256);
constexpr int64_t PACKED_NUMBERS = tile_size(1 << 17);  // numbers of H that are packed at a time, at most

// The number of rows or columns, of `each` numbers, that are packed at a time: at most `wanted`, whole cache lines.
inline int64_t packed_count(int64_t wanted, int64_t each) {
  return std::clamp<int64_t>(PACKED_NUMBERS / each / LINE * LINE, LINE, std::max(LINE, wanted));
}

// `contract` for 16-bit operands: oneDNN's products write t, a tile at a time.
template <class S, class T>
void contract_in_tiles(
    const Head<S>& h, const Group& group, Span<const T> u_c, Span<const float> u_p, Span<const float> u_q,
    Span<float> out_p, Span<float> out_q) {
  const int64_t depth = round_k<T>(h.c), ld = packed_ld(h.c);
  const bool both = out_p && out_q;  // a tile of several rows p, which must be packed, halves the traffic of `reduce`
  const int64_t tile_rows = packed_count(TILE_ROWS, ld);
  const int64_t nq = std::min(h.q, both ? tile_rows / 4 : tile_rows);
  const int64_t np = both ? std::min(h.p, tile_rows / nq) : nq < h.q ? 1 : std::max<int64_t>(1, tile_rows / h.q);
  const bool merged = np == 1 || (nq == h.q && h.sp == h.q * h.sq);
  const bool direct = merged && readable_in_place<S, T>(h.sc, h.c);
  const Scratch<float> tile(np * nq * LANES);
  const Scratch<T> packed(direct ? 0 : np * nq * ld);
  for (int64_t p0 = 0; p0 < h.p; p0 += np)
    for (int64_t q0 = 0; q0 < h.q; q0 += nq) {
      const int64_t ps = std::min(np, h.p - p0), qs = std::min(nq, h.q - q0);
      const S* src = h.data + p0 * h.sp + q0 * h.sq;
      Left<T> a;
      if (merged) {
        a = left_operand<S, T>(src, h.sq, h.sc, ps * qs, h.c, packed);
      } else {
        for (int64_t p = 0; p < ps; ++p)
          copy_rows<S, T>(src + p * h.sp, h.sq, h.sc, qs, h.c, packed.subspan(p * qs * ld, qs * ld), ld);
        a = {packed.at(0, ps * qs * ld), ld};
      }
      for (int64_t k = 0; k < group.blocks; ++k) {
        float* const t = tile.at(0, ps * qs * LANES);
        gemm(
            ps * qs, group.lanes_in(k), depth, a.data, a.ld, u_c.at(k * depth * LANES, depth * LANES), LANES, t, LANES,
            false);
        float* const to_p = feature_lanes(out_p, k * h.p + p0, ps);
        float* const to_q = feature_lanes(out_q, k * h.q + q0, qs);
        const float* const by_p = feature_lanes(u_p, k * h.p + p0, ps);
        const float* const by_q = feature_lanes(u_q, k * h.q + q0, qs);
        if (to_p && to_q) reduce<true, true>(t, ps, qs, by_p, by_q, to_p, to_q);
        else if (to_p) reduce<true, false>(t, ps, qs, by_p, by_q, to_p, to_q);
        else reduce<false, true>(t, ps, qs, by_p, by_q, to_p, to_q);
      }
    }
}

// out_p[p] += Σ_q t[p,q] u_q[q] and out_q[q] += Σ_p t[p,q] u_p[p], where t[p,q] = Σ_c H[p,q,c] u_c[c]. Either sum may
// be null. u_c is a right operand of T.
template <class S, class T>
void contract(
    const Head<S>& h, const Group& group, Span<const T> u_c, Span<const float> u_p, Span<const float> u_q,
    Span<float> out_p, Span<float> out_q) {
  if constexpr (std::is_same_v<T, float>) contract_in_registers(h, group, u_c, u_p, u_q, out_p, out_q);
  else contract_in_tiles(h, group, u_c, u_p, u_q, out_p, out_q);
}

// out[m] += Σ_k M[m,k] u[k], for a matrix M that all instances share; u is a right operand of T.
template <class S, class T>
void multiply(
    const S* m, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k, const Group& group, Span<const T> u,
    Span<float> out) {
  const int64_t depth = round_k<T>(k);
  const Scratch<T> packed(readable_in_place<S, T>(k_stride, k) ? 0 : std::min(rows, TILE_ROWS) * packed_ld(k));
  for (int64_t r = 0; r < rows; r += TILE_ROWS) {
    const int64_t count = std::min(TILE_ROWS, rows - r);
    const auto a = left_operand<S, T>(m + r * row_stride, row_stride, k_stride, count, k, packed);
    for (int64_t b = 0; b < group.blocks; ++b)
      gemm(
          count, group.lanes_in(b), depth, a.data, a.ld, u.at(b * depth * LANES, depth * LANES), LANES,
          out.at((b * rows + r) * LANES, count * LANES), LANES, true);
  }
}

// out[p] += Σ_{q,c} H[p,q,c] (u_q[q] u_c[c]). It computes a tile of the outer product u_q ⊗ u_c at a time.
template <class S, class T>
void fold(const Head<S>& h, const Group& group, Span<const float> u_q, Span<const float> u_c, Span<float> out) {
  const bool merged = h.sq == h.c * h.sc;
  const int64_t most = packed_count(FOLD_DEPTH, h.p);
  const int64_t nc = std::min(h.c, most), nq = nc < h.c ? 1 : std::max<int64_t>(1, most / h.c);
  const int64_t depth = round_k<T>(nq * nc), ld = packed_ld(nq * nc);
  const bool direct = readable_in_place<S, T>(h.sc, h.c) && (merged || nq == 1);
  const Scratch<float> products(depth * LANES);
  const Scratch<T> operand(std::is_same_v<T, float> ? 0 : depth * LANES), packed(direct ? 0 : h.p * ld);
  for (int64_t q0 = 0; q0 < h.q; q0 += nq)
    for (int64_t c0 = 0; c0 < h.c; c0 += nc) {
      const int64_t qs = std::min(nq, h.q - q0), cs = std::min(nc, h.c - c0), ks = qs * cs;
      const S* src = h.data + q0 * h.sq + c0 * h.sc;
      Left<T> a;
      if (direct || merged) {
        a = left_operand<S, T>(src, h.sp, h.sc, h.p, ks, packed);
      } else {
        T* const to = packed.at(0, h.p * ld);
        for (int64_t q = 0; q < qs; ++q) pack(src + q * h.sq, h.sp, h.sc, to + q * cs, ld, h.p, cs);
        if (round_k<T>(ks) > ks)
          for (int64_t p = 0; p < h.p; ++p) to[p * ld + ks] = T(0.f);
        a = {to, ld};
      }
      for (int64_t k = 0; k < group.blocks; ++k) {
        float *const first = products.at(0, ks * LANES), *f = first;
        for (int64_t q = 0; q < qs; ++q) {
          const float* const x = u_q.at((k * h.q + q0 + q) * LANES, LANES);
          const float* z = u_c.at((k * h.c + c0) * LANES, cs * LANES);
          for (int64_t c = 0; c < cs; ++c, z += LANES, f += LANES)
            for (int64_t l = 0; l < LANES; l += WIDTH) store(f + l, load<Vec>(x + l) * load<Vec>(z + l));
        }
        const T* b = right_operand(first, operand, ks, LANES);
        gemm(h.p, group.lanes_in(k), ks, a.data, a.ld, b, LANES, out.at(k * h.p * LANES, h.p * LANES), LANES, true);
      }
    }
}

}  // namespace fasthyper
