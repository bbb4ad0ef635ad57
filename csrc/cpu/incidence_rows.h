// The results of an incidence sum that belong to rows of x, z, g or y: out_w by `collect_rows`, out_u and out_v by
// `expand_rows`. Two parallel regions alternate: one computes messages for a chunk of blocks, one for each piece or
// term; the other adds them to the results.
#pragma once

#include "incidence_products.h"
#include "incidence_sums.h"

namespace fasthyper {

// A chunk of blocks with the rows of their factors and memory for messages.
class Chunk {
 public:
  // Numbers of floats of the messages of a piece, and of a term to u and to v.
  Chunk(const Terms& terms, const Limits& most, int64_t of_w, int64_t of_u, int64_t of_v, int64_t workspace)
      : terms_(terms), most_(most), of_w_(of_w), of_u_(of_u), of_v_(of_v), room_(workspace / 8 / sizeof(float)) {}

  // Takes the next blocks; false at the end of all rows.
  bool next() {
    blocks_.clear();
    slots_ = count_ = 0;
    while (blocks_.empty() || slots_ * (of_w_ + 2) + count_ * (of_u_ + of_v_ + 4) < room_) {
      Block block = next_block(terms_, most_, at_);
      if (block.pieces == 0) break;
      block.slot = slots_, block.term = count_;
      slots_ += block.slots(), count_ += block.terms;
      blocks_.push_back(block);
    }
    const int64_t floats = slots_ * of_w_ + count_ * (of_u_ + of_v_), found = slots_ + 2 * count_;
    if (floats > floats_.span().size()) floats_ = Scratch<float>(), floats_ = Scratch<float>(floats);
    if (found > found_.span().size()) found_ = Scratch<int64_t>(found);
    return !blocks_.empty();
  }

  int64_t size() const { return blocks_.size(); }
  const Block& block(int64_t k) const { return blocks_[k]; }

  // Finds the rows of a block. `pieces` has room for BLOCK_PIECES.
  BlockRows find(int64_t k, Piece* pieces) const {
    const Block& block = blocks_[k];
    Position at = block.from;
    next_block(terms_, most_, at, pieces);
    int64_t* const w = found_.at(block.slot, block.slots());
    int64_t* const u = found_.at(slots_ + block.term, block.terms);
    int64_t* const v = found_.at(slots_ + count_ + block.term, block.terms);
    find_rows(terms_, pieces, block, w);
    find_terms(terms_, pieces, block.pieces, u, v);
    return {pieces, w, u, v};
  }

  // The messages of a block.
  Span<float> to_w(const Block& b) const { return messages_w().data.subspan(b.slot * of_w_, b.slots() * of_w_); }
  Span<float> to_u(const Block& b) const { return messages_u().data.subspan(b.term * of_u_, b.terms * of_u_); }
  Span<float> to_v(const Block& b) const { return messages_v().data.subspan(b.term * of_v_, b.terms * of_v_); }

  // The messages of all blocks.
  Messages messages_w() const { return {floats_.subspan(0, slots_ * of_w_), of_w_, found_.subspan(0, slots_)}; }
  Messages messages_u() const {
    return {floats_.subspan(slots_ * of_w_, count_ * of_u_), of_u_, found_.subspan(slots_, count_)};
  }
  Messages messages_v() const {
    return {
        floats_.subspan(slots_ * of_w_ + count_ * of_u_, count_ * of_v_), of_v_,
        found_.subspan(slots_ + count_, count_)};
  }

 private:
  const Terms& terms_;
  const Limits& most_;
  const int64_t of_w_, of_u_, of_v_, room_;
  Position at_;
  std::vector<Block> blocks_;
  int64_t slots_ = 0, count_ = 0;
  Scratch<float> floats_;
  Scratch<int64_t> found_;
};

// A result of terms or of pieces: (rows, features), contiguous; null if it is not wanted.
template <class S>
struct RowsOut {
  S* data = nullptr;
  int64_t rows = 0, features = 0;
};

// The floats of a float32 copy of a result in 16 bits, at most.
inline int64_t copy_room(int64_t workspace) { return workspace / 16 / int64_t(sizeof(float)); }

// out_w of all rows; `out` is zero at first.
template <class S, class T>
void collect_rows(const IncidenceSum<S>& sum, const Tiling& tiling, RowsOut<S> out, int64_t workspace) {
  const Collect<S, T> collect(sum, tiling, workspace);
  const Destination<S> to(out.data, out.rows, out.features, copy_room(workspace));
  Chunk chunk(sum.terms, tiling.most, sum.h.p, 0, 0, workspace);
  const double flops = sum.multiplications(2, 2);
  while (chunk.next()) {
    for_units<T>(chunk.size(), flops, collect.floats(), workspace, [&](int64_t k, Span<float> own) {
      Piece pieces[BLOCK_PIECES];
      const BlockRows rows = chunk.find(k, pieces);
      collect.run(chunk.block(k), rows, own, chunk.to_w(chunk.block(k)));
    });
    to.add(chunk.messages_w());
  }
  to.finish();
}

// Whether each term has its own row of this factor, so that results are stored without a sum.
inline bool one_term_each(const Place& place, int64_t N) { return !place.index && (place.points || N == 1); }

// Writes rows of results, `ld` apart, to their places.
template <class S>
void store_each(Span<const float> from, int64_t ld, const int64_t* rows, int64_t count, const RowsOut<S>& to) {
  for (int64_t k = 0; k < count; ++k)
    convert(from.at(k * ld, to.features), to.data + rows[k] * to.features, to.features);
}

// out_u and out_v of all terms; results with sums are zero at first.
template <class S, class T>
void expand_rows(
    const IncidenceSum<S>& sum, const Tiling& tiling, RowsOut<S> out_u, RowsOut<S> out_v, int64_t workspace) {
  const Terms& terms = sum.terms;
  const bool each_u = one_term_each(terms.u, terms.N), each_v = one_term_each(terms.v, terms.N);
  const Expand<S, T> expand(sum, tiling, out_u.data, out_v.data, workspace);
  const bool sums_u = out_u.data && !each_u, sums_v = out_v.data && !each_v;
  Destination<S> to_u, to_v;
  if (sums_u) to_u = Destination<S>(out_u.data, out_u.rows, out_u.features, copy_room(workspace));
  if (sums_v) to_v = Destination<S>(out_v.data, out_v.rows, out_v.features, copy_room(workspace));
  Chunk chunk(terms, tiling.most, 0, sums_u ? tiling.ld_u : 0, sums_v ? tiling.ld_v : 0, workspace);
  const int64_t floats_u = out_u.data && each_u ? tiling.most.terms * tiling.ld_u : 0;
  const int64_t floats_v = out_v.data && each_v ? tiling.most.terms * tiling.ld_v : 0;
  const int64_t floats = Own::sum({floats_u, floats_v, expand.floats()});
  const double flops = sum.multiplications(2, 2 * (bool(out_u.data) + bool(out_v.data)));
  while (chunk.next()) {
    for_units<T>(chunk.size(), flops, floats, workspace, [&](int64_t k, Span<float> scratch) {
      Own own(scratch);
      const Span<float> own_u = own.take(floats_u), own_v = own.take(floats_v);
      Piece pieces[BLOCK_PIECES];
      const Block& block = chunk.block(k);
      const BlockRows rows = chunk.find(k, pieces);
      expand.run(
          block, rows, own.take(expand.floats()), sums_u ? chunk.to_u(block) : own_u,
          sums_v ? chunk.to_v(block) : own_v);
      if (floats_u) store_each<S>(own_u, tiling.ld_u, rows.u, block.terms, out_u);
      if (floats_v) store_each<S>(own_v, tiling.ld_v, rows.v, block.terms, out_v);
    });
    if (sums_u) to_u.add(chunk.messages_u());
    if (sums_v) to_v.add(chunk.messages_v());
  }
  if (sums_u) to_u.finish();
  if (sums_v) to_v.finish();
}

}  // namespace fasthyper
