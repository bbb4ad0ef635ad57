// The terms of an incidence sum, and their division into pieces and blocks.
//
//   y[t(e),n,o] += Σ_{i,r} H[o,i,r] x[s(e),n,i] z[c(e),r]        for every term e = 1 … E and every point n
//
// A schedule chooses one of the three factors: its rows are the rows of the call. That factor is w, with features p;
// the two other factors of a term are u, with features q, and v, with features c. The terms of a row are one after the
// other in `order`. A piece is a range of the terms of one row; a block is a few pieces, which one thread computes
// together. Pieces and blocks depend on sizes and on the incidence alone, so that results do not depend on the number
// of threads.
#pragma once

#include "many_points.h"

namespace fasthyper {

constexpr int64_t PIECE_STEP = 8;                            // a block is computed as a multiple of so many pieces
constexpr int64_t BLOCK_PIECES = tile_size(64, PIECE_STEP);  // of a block, at most
constexpr int64_t BLOCK_TERMS = tile_size(2048);             // of a block, at most
constexpr int64_t BLOCK_NUMBERS = tile_size(1 << 16);        // of u and v of a block
constexpr int64_t SLAB_NUMBERS = tile_size(1 << 15);         // of A or M of a block, for a range of q
constexpr int64_t LEAST_SLABS = 4;                           // of a gradient of H, if each has four q
constexpr int64_t SHORT_ROW = tile_size(64);                 // terms of a row that is one piece, if they fit in a block
constexpr int64_t RIGHT_COLUMNS = tile_size(64, WIDTH);      // of one right operand

// Where a factor has the row of a term (e, n).
struct Place {
  const int64_t* index = nullptr;  // null: row e
  bool points = false;             // whether each point has its own row

  int64_t row(int64_t e, int64_t n, int64_t N) const {
    const int64_t k = index ? index[e] : e;
    return points ? k * N + n : k;
  }
};

// A row belongs to a node: an instance of the factor w. Without `order` and `ptr`, node k has the term e = k.
struct Terms {
  int64_t E, N, nodes;
  bool row_has_points;  // the points of a node are terms of its one row; otherwise each point is a row
  const int64_t *order, *ptr;
  Place w, u, v;

  int64_t rows() const { return row_has_points ? nodes : nodes * N; }
  int64_t count() const { return E * N; }
  int64_t node(int64_t row) const { return row_has_points || N == 1 ? row : row / N; }
  int64_t degree(int64_t row) const {
    const int64_t k = node(row), each = row_has_points ? N : 1;
    return ptr ? (ptr[k + 1] - ptr[k]) * each : each;
  }
};

// The terms from `first` on of a row.
struct Piece {
  int64_t row, first, count;
};

struct Position {
  int64_t row = 0, first = 0;
};

struct Block {
  Position from;
  int64_t pieces = 0, terms = 0;
  int64_t slot = 0, term = 0;  // its first piece and term in a chunk of blocks

  // The pieces that are computed, of which the last ones are empty.
  int64_t slots() const { return round_up(pieces, PIECE_STEP); }
};

struct Limits {
  int64_t pieces, terms;  // of a block
  int64_t piece_terms;
};

// The next block, empty at the end of all rows. It writes the pieces, if they are wanted, and advances `at`.
inline Block next_block(const Terms& t, const Limits& most, Position& at, Piece* pieces = nullptr) {
  Block block;
  const int64_t rows = t.rows();
  while (at.row < rows && block.pieces < most.pieces) {
    const int64_t degree = t.degree(at.row), left = degree - at.first;
    if (left <= 0) {
      ++at.row, at.first = 0;
      continue;
    }
    const int64_t each = ceil_div(degree, ceil_div(degree, most.piece_terms)), count = std::min(left, each);
    if (block.pieces > 0 && block.terms + count > most.terms) break;
    if (block.pieces == 0) block.from = at;
    if (pieces) pieces[block.pieces] = {at.row, at.first, count};
    ++block.pieces, block.terms += count, at.first += count;
  }
  return block;
}

// Writes the rows of u and of v for the terms of a block.
inline void find_terms(const Terms& t, const Piece* pieces, int64_t count, int64_t* u, int64_t* v) {
  for (const Piece* piece = pieces; piece < pieces + count; ++piece) {
    const int64_t node = t.node(piece->row), begin = t.ptr ? t.ptr[node] : node;
    int64_t n = t.row_has_points ? piece->first % t.N : piece->row - node * t.N;
    int64_t k = begin + (t.row_has_points ? piece->first / t.N : piece->first);
    for (int64_t j = 0; j < piece->count; ++j) {
      const int64_t e = t.order ? t.order[k] : k;
      *u++ = t.u.row(e, n, t.N), *v++ = t.v.row(e, n, t.N);
      if (!t.row_has_points) ++k;
      else if (++n == t.N) n = 0, ++k;
    }
  }
}

// Writes the rows of w for the pieces of a block; -1 for those that are empty.
inline void find_rows(const Terms& t, const Piece* pieces, const Block& block, int64_t* w) {
  for (int64_t k = 0; k < block.pieces; ++k) {
    const int64_t node = t.node(pieces[k].row);
    w[k] = t.w.row(node, t.row_has_points ? 0 : pieces[k].row - node * t.N, t.N);
  }
  std::fill(w + block.pieces, w + block.slots(), -1);
}

// A sum for one schedule: its terms, its factors, and H with the axes of w, u and v.
template <class S>
struct IncidenceSum {
  Terms terms;
  Rows<const S> w, u, v;
  Head<S> h;

  double multiplications(double each_row, double each_term) const {
    return double(h.p) * double(h.q) * double(h.c) * double(std::min(terms.rows(), terms.count())) * each_row +
           double(h.q) * double(h.c) * double(terms.count()) * each_term;
  }
};

// Whether H, packed with c in whole registers, fits in a part of the workspace.
template <class S>
bool fits_packed(const Head<S>& h, int64_t ld_c, int64_t workspace) {
  return double(h.p) * double(h.q) * double(ld_c) <= double(workspace / 4 / int64_t(sizeof(float)));
}

// The division of a sum into blocks of pieces and slabs of q. A slab of A or M has, for each piece, rows q of c.
struct Tiling {
  int64_t ld_u, ld_v;  // between the rows of u and of v in scratch memory
  int64_t q, slabs;    // q of a slab
  int64_t ld;          // between the pieces of a slab
  Limits most;

  // `rows_in_parallel`: threads share the blocks; otherwise each thread takes all of them, and they may be larger.
  template <class S>
  Tiling(const IncidenceSum<S>& sum, bool rows_in_parallel, int64_t workspace) {
    const Head<S>& h = sum.h;
    ld_u = round_up(h.q + 3, 4), ld_v = whole_registers(h.c);  // four q may be stored from any q on
    // If H is too large to be packed once, each block packs it: larger blocks then pack it less often.
    const int64_t times = !rows_in_parallel ? 2 : fits_packed(h, ld_v, workspace) ? 1 : 4;
    const int64_t numbers = times * std::min(BLOCK_NUMBERS, workspace / 64);
    const int64_t room = times * std::min(SLAB_NUMBERS, workspace / 128);
    const int64_t rows = std::min(sum.terms.rows(), sum.terms.count());
    most.terms = std::clamp<int64_t>(numbers / (ld_u + ld_v), 1, BLOCK_TERMS);
    most.piece_terms = std::min(std::max(4 * h.p, SHORT_ROW), most.terms);
    // Products with H need some rows to be fast; a few blocks are left for other threads, and a slab stays in cache.
    const int64_t wanted = std::max<int64_t>(24, most.terms * rows / sum.terms.count());
    const int64_t share = rows_in_parallel ? std::max<int64_t>(24, rows / 8) : BLOCK_PIECES;
    const int64_t pieces = std::min({wanted, share, room / ld_v, BLOCK_PIECES});
    most.pieces = std::max(PIECE_STEP, pieces / PIECE_STEP * PIECE_STEP);
    q = std::clamp<int64_t>(room / (most.pieces * ld_v), 1, h.q);
    // A gradient of H has a task for each slab, so that a small one needs several.
    if (!rows_in_parallel) q = std::min(q, std::max<int64_t>(4, ceil_div(h.q, LEAST_SLABS)));
    if (q > 4) q = std::min(h.q, q / 4 * 4);
    slabs = ceil_div(h.q, q);
    ld = packed_ld(q * ld_v);
  }

  template <class S>
  Range slab(const Head<S>& h, int64_t k) const {
    return {k * q, std::min(h.q, (k + 1) * q)};
  }
};

}  // namespace fasthyper
