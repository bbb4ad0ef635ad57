// `contract` without a tile of t, which lives in registers from its sum to its reduction:
//
//   t[p,q] = Σ_c H[p,q,c] u_c[c]      out_p[p] += Σ_q t[p,q] u_q[q]      out_q[q] += Σ_p t[p,q] u_p[p]
//
// A product of oneDNN's writes t and has it read back, which where the sum over c is short costs more than the sum.
// Each number of H is broadcast to all lanes, so H is read as it comes where q is its last axis.
#pragma once

#include "operands.h"

namespace fasthyper {

constexpr int64_t VECS = std::min<int64_t>(4, LANES / WIDTH);  // vectors of lanes that are in registers together
constexpr int64_t COLS = 12 / VECS;          // with so many columns q: twelve sums hide the latency of an addition
constexpr int64_t PIECE = tile_of(1 << 14);  // numbers of H that stay in cache while the blocks of a group meet them
constexpr int64_t DEEP = tile_of(128);       // c of a piece, at most
constexpr int64_t NEAR = tile_of(192);       // rows of lanes that stay closest: those of c, and u_q and out_q
constexpr int64_t FEW = 8;                   // blocks that are not worth packing for

// A piece of H, and how far its numbers are apart: those of a row, of `COLS` columns, of a column, of a c.
struct Piece {
  const float* data;
  int64_t np, nq, nc;
  int64_t sp, columns, sq, sc;
};

// Lanes of the factors and of the sums, from the first p, q and c of a piece; null where not asked for.
struct Meeting {
  const float *u_c, *u_p, *u_q;
  float *out_p, *out_q;
};

// `count` features from one on, in lanes.
template <class F>
inline F* lanes_of(Block<F> lanes, int64_t feature, int64_t count) {
  return lanes ? lanes.at(feature * LANES, count * LANES) : nullptr;
}

template <class F>
inline F* row(F* lanes, int64_t feature, int64_t l) {
  return lanes ? lanes + feature * LANES + l : nullptr;
}

// Q columns from q on of a row p, V vectors of lanes from l on; `sum` is what they add to out_p.
template <int Q, int V, bool OutP, bool OutQ>
inline void columns(
    const Piece& h, const float* from, const Meeting& m, int64_t p, int64_t q, int64_t l, Vec (&sum)[V]) {
  const float *u_c = m.u_c + l, *u_p = row(m.u_p, p, l), *u_q = row(m.u_q, q, l);
  float* const out_q = row(m.out_q, q, l);
  const int64_t nc = h.nc, sq = h.sq, sc = h.sc;
  Vec t[Q][V] = {};
  for (int64_t c = 0; c < nc; ++c)
    for (int v = 0; v < V; ++v) {
      const Vec u = load<Vec>(u_c + c * LANES + v * WIDTH);
      for (int k = 0; k < Q; ++k) t[k][v] += from[c * sc + k * sq] * u;
    }
  for (int v = 0; v < V; ++v)
    for (int k = 0; k < Q; ++k) {
      const int64_t at = k * LANES + v * WIDTH;
      if constexpr (OutP) sum[v] += t[k][v] * load<Vec>(u_q + at);
      if constexpr (OutQ) store(out_q + at, load<Vec>(out_q + at) + t[k][v] * load<Vec>(u_p + v * WIDTH));
    }
}

// The last columns, fewer than Q of them.
template <int Q, int V, bool OutP, bool OutQ>
inline void rest(const Piece& h, const float* from, const Meeting& m, int64_t p, int64_t q, int64_t l, Vec (&sum)[V]) {
  if constexpr (Q > 1) {
    if (h.nq - q == Q - 1) columns<Q - 1, V, OutP, OutQ>(h, from, m, p, q, l, sum);
    else rest<Q - 1, V, OutP, OutQ>(h, from, m, p, q, l, sum);
  }
}

template <int V, bool OutP, bool OutQ>
void meet(const Piece& h, const Meeting& m, int64_t width) {
  for (int64_t l = 0; l < width; l += V * WIDTH)
    for (int64_t p = 0; p < h.np; ++p) {
      Vec sum[V] = {};
      const float* from = h.data + p * h.sp;
      int64_t q = 0;
      for (; q + COLS <= h.nq; q += COLS, from += h.columns) columns<COLS, V, OutP, OutQ>(h, from, m, p, q, l, sum);
      rest<COLS, V, OutP, OutQ>(h, from, m, p, q, l, sum);
      if constexpr (OutP)
        for (int v = 0; v < V; ++v) {
          float* const out = row(m.out_p, p, l + v * WIDTH);
          store(out, load<Vec>(out) + sum[v]);
        }
    }
}

// A block of so many lanes meets a piece.
template <int V>
void meet(const Piece& h, const Meeting& m, int64_t width) {
  if constexpr (V > 1)
    if (width <= V / 2 * WIDTH) return meet<V / 2>(h, m, width);
  if (m.out_p && m.out_q) meet<V, true, true>(h, m, width);
  else if (m.out_p) meet<V, true, false>(h, m, width);
  else meet<V, false, true>(h, m, width);
}

// packed[p][q / COLS][c][q % COLS] = H[p,q,c]
template <class S>
Piece pack_piece(const Head<S>& h, Block<float> packed) {
  const int64_t each = round_up(h.q, COLS) * h.c;
  float* const first = packed.at(0, h.p * each);
  const Piece piece{first, h.p, h.q, h.c, each, COLS * h.c, 1, COLS};
  for (int64_t p = 0; p < h.p; ++p)
    for (int64_t c = 0; c < h.c; ++c) {
      const S* from = h.data + p * h.sp + c * h.sc;
      float* to = first + p * each + c * COLS;
      int64_t q = 0;
      if (h.sq == 1)
        for (; q + COLS <= h.q; q += COLS, to += piece.columns) convert(from + q, to, COLS);
      for (; q < h.q; ++q) to[q % COLS] = from[q * h.sq], to += (q + 1) % COLS ? 0 : piece.columns;
    }
  return piece;
}

// The size of equal parts of at most `most`, a multiple of `step`.
inline int64_t even_share(int64_t size, int64_t most, int64_t step) {
  const int64_t parts = ceil_div(size, most);
  return std::min(size, round_up(ceil_div(size, parts), step));
}

// Whether to read H where it lies: few blocks, and rows of c that do not evict each other from the cache.
template <class S>
bool as_it_lies(const Head<S>& h, const Group& group) {
  if (!std::is_same_v<S, float>) return false;
  return h.sc == 1 || (h.sq == 1 && group.blocks <= FEW && (h.c <= 16 || h.sc % 512 != 0));
}

template <class S>
void contract_in_registers(
    const Head<S>& h, const Group& group, Block<const float> u_c, Block<const float> u_p, Block<const float> u_q,
    Block<float> out_p, Block<float> out_q) {
  const int64_t nc = even_share(h.c, DEEP, 1), nq = even_share(h.q, (NEAR - nc) / (out_q ? 2 : 1), COLS);
  const int64_t np = std::clamp<int64_t>(PIECE / (nc * nq), 1, h.p);
  const bool direct = as_it_lies(h, group);
  Scratch<float> packed(direct ? 0 : np * round_up(nq, COLS) * nc);
  for (int64_t c0 = 0; c0 < h.c; c0 += nc)
    for (int64_t p0 = 0; p0 < h.p; p0 += np)
      for (int64_t q0 = 0; q0 < h.q; q0 += nq) {
        const Head<S> part{
            h.data + p0 * h.sp + q0 * h.sq + c0 * h.sc,
            std::min(np, h.p - p0),
            std::min(nq, h.q - q0),
            std::min(nc, h.c - c0),
            h.sp,
            h.sq,
            h.sc};
        Piece piece;
        if constexpr (std::is_same_v<S, float>)
          if (direct) piece = {part.data, part.p, part.q, part.c, part.sp, COLS * part.sq, part.sq, part.sc};
        if (!direct) piece = pack_piece(part, packed);
        for (int64_t k = 0; k < group.blocks; ++k)
          meet<VECS>(
              piece,
              {lanes_of(u_c, k * h.c + c0, part.c), lanes_of(u_p, k * h.p + p0, part.p),
               lanes_of(u_q, k * h.q + q0, part.q), lanes_of(out_p, k * h.p + p0, part.p),
               lanes_of(out_q, k * h.q + q0, part.q)},
              group.width(k));
      }
}

}  // namespace fasthyper
