// `contract` of contract.h in float32, with t in registers:
//
//   t[p,q] = Σ_c H[p,q,c] u_c[c]      out_p[p] += Σ_q t[p,q] u_q[q]      out_q[q] += Σ_p t[p,q] u_p[p]
//
// A product of oneDNN would write t to memory; if the sum over c is short, reading t back costs more than the sum. Here
// each number of H is broadcast to all lanes of a block, and t goes from its sum to its reduction in registers.
#pragma once

#include "operands.h"

namespace fasthyper {

constexpr int64_t VECS = std::min<int64_t>(4, LANES / WIDTH);  // vectors of lanes in registers at the same time
constexpr int64_t COLS = 12 / VECS;  // columns q in registers: twelve sums hide the latency of an addition
constexpr int64_t TILE_NUMBERS = tile_size(1 << 14);  // numbers of a tile of H, which stays in cache for all blocks
constexpr int64_t TILE_DEPTH = tile_size(128);        // c of a tile, at most
constexpr int64_t NEAR_FEATURES = tile_size(192);     // features in the nearest cache: those of u_c, u_q and out_q
constexpr int64_t FEW_BLOCKS = 8;                     // with at most so many blocks, H is not packed

// A tile of H, with the strides of p, of COLS columns q, of q and of c.
struct HeadTile {
  const float* data;
  int64_t np, nq, nc;
  int64_t sp, columns, sq, sc;
};

// The factors and sums of one block, from the first p, q and c of a tile; null if not needed.
struct BlockLanes {
  const float *u_c, *u_p, *u_q;
  float *out_p, *out_q;
};

// The lanes of `count` features from `feature` on; null if there are none.
template <class F>
inline F* feature_lanes(Span<F> lanes, int64_t feature, int64_t count) {
  return lanes ? lanes.at(feature * LANES, count * LANES) : nullptr;
}

template <class F>
inline F* lane(F* lanes, int64_t feature, int64_t l) {
  return lanes ? lanes + feature * LANES + l : nullptr;
}

// Adds Q columns of one p, beginning at q, for V vectors of lanes, beginning at l. `sum` collects out_p[p].
template <int Q, int V, bool OutP, bool OutQ>
inline void contract_columns(
    const HeadTile& h, const float* from, const BlockLanes& block, int64_t p, int64_t q, int64_t l, Vec (&sum)[V]) {
  const float *u_c = block.u_c + l, *u_p = lane(block.u_p, p, l), *u_q = lane(block.u_q, q, l);
  float* const out_q = lane(block.out_q, q, l);
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

// The same for the last columns, fewer than Q.
template <int Q, int V, bool OutP, bool OutQ>
inline void contract_last_columns(
    const HeadTile& h, const float* from, const BlockLanes& block, int64_t p, int64_t q, int64_t l, Vec (&sum)[V]) {
  if constexpr (Q > 1) {
    if (h.nq - q == Q - 1) contract_columns<Q - 1, V, OutP, OutQ>(h, from, block, p, q, l, sum);
    else contract_last_columns<Q - 1, V, OutP, OutQ>(h, from, block, p, q, l, sum);
  }
}

template <int V, bool OutP, bool OutQ>
void contract_block(const HeadTile& h, const BlockLanes& block, int64_t width) {
  for (int64_t l = 0; l < width; l += V * WIDTH)
    for (int64_t p = 0; p < h.np; ++p) {
      Vec sum[V] = {};
      const float* from = h.data + p * h.sp;
      int64_t q = 0;
      for (; q + COLS <= h.nq; q += COLS, from += h.columns)
        contract_columns<COLS, V, OutP, OutQ>(h, from, block, p, q, l, sum);
      contract_last_columns<COLS, V, OutP, OutQ>(h, from, block, p, q, l, sum);
      if constexpr (OutP)
        for (int v = 0; v < V; ++v) {
          float* const out = lane(block.out_p, p, l + v * WIDTH);
          store(out, load<Vec>(out) + sum[v]);
        }
    }
}

// Adds a tile of H to the sums of a block, of which the first `width` lanes are computed.
template <int V>
void contract_block(const HeadTile& h, const BlockLanes& block, int64_t width) {
  if constexpr (V > 1)
    if (width <= V / 2 * WIDTH) return contract_block<V / 2>(h, block, width);
  if (block.out_p && block.out_q) contract_block<V, true, true>(h, block, width);
  else if (block.out_p) contract_block<V, true, false>(h, block, width);
  else contract_block<V, false, true>(h, block, width);
}

// packed[p][q / COLS][c][q % COLS] = H[p,q,c]
template <class S>
HeadTile pack_tile(const Head<S>& h, Span<float> packed) {
  const int64_t each = round_up(h.q, COLS) * h.c;
  float* const first = packed.at(0, h.p * each);
  const HeadTile tile{first, h.p, h.q, h.c, each, COLS * h.c, 1, COLS};
  for (int64_t p = 0; p < h.p; ++p)
    for (int64_t c = 0; c < h.c; ++c) {
      const S* from = h.data + p * h.sp + c * h.sc;
      float* to = first + p * each + c * COLS;
      int64_t q = 0;
      if (h.sq == 1)
        for (; q + COLS <= h.q; q += COLS, to += tile.columns) convert(from + q, to, COLS);
      for (; q < h.q; ++q) to[q % COLS] = from[q * h.sq], to += (q + 1) % COLS ? 0 : tile.columns;
    }
  return tile;
}

// The tile size, at most `most` and a multiple of `step`, that divides `size` most evenly.
inline int64_t equal_size(int64_t size, int64_t most, int64_t step) {
  const int64_t tiles = ceil_div(size, most);
  return std::min(size, round_up(ceil_div(size, tiles), step));
}

// Whether to read H in place: rows of c do not evict each other from the cache, and only few blocks read them.
template <class S>
bool read_in_place(const Head<S>& h, const Group& group) {
  if (!std::is_same_v<S, float>) return false;
  return h.sc == 1 || (h.sq == 1 && group.blocks <= FEW_BLOCKS && (h.c <= 16 || h.sc % 512 != 0));
}

template <class S>
void contract_in_registers(
    const Head<S>& h, const Group& group, Span<const float> u_c, Span<const float> u_p, Span<const float> u_q,
    Span<float> out_p, Span<float> out_q) {
  const int64_t nc = equal_size(h.c, TILE_DEPTH, 1), nq = equal_size(h.q, (NEAR_FEATURES - nc) / (out_q ? 2 : 1), COLS);
  const int64_t np = std::clamp<int64_t>(TILE_NUMBERS / (nc * nq), 1, h.p);
  const bool direct = read_in_place(h, group);
  Scratch<float> packed(direct ? 0 : np * round_up(nq, COLS) * nc);
  for (int64_t c0 = 0; c0 < h.c; c0 += nc)
    for (int64_t p0 = 0; p0 < h.p; p0 += np)
      for (int64_t q0 = 0; q0 < h.q; q0 += nq) {
        const Head<S> sub{
            h.data + p0 * h.sp + q0 * h.sq + c0 * h.sc,
            std::min(np, h.p - p0),
            std::min(nq, h.q - q0),
            std::min(nc, h.c - c0),
            h.sp,
            h.sq,
            h.sc};
        HeadTile tile;
        if constexpr (std::is_same_v<S, float>)
          if (direct) tile = {sub.data, sub.p, sub.q, sub.c, sub.sp, COLS * sub.sq, sub.sq, sub.sc};
        if (!direct) tile = pack_tile(sub, packed);
        for (int64_t k = 0; k < group.blocks; ++k)
          contract_block<VECS>(
              tile,
              {feature_lanes(u_c, k * h.c + c0, sub.c), feature_lanes(u_p, k * h.p + p0, sub.p),
               feature_lanes(u_q, k * h.q + q0, sub.q), feature_lanes(out_p, k * h.p + p0, sub.p),
               feature_lanes(out_q, k * h.q + q0, sub.q)},
              group.lanes_in(k));
      }
}

}  // namespace fasthyper
