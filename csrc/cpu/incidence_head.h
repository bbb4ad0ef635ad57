// H as right operands of the products of an incidence sum, in panels of columns:
//
//   collect   rows (q, c), columns p:    out_w[p] = Σ_{q,c} A[q,c] H[p,q,c]
//   expand    rows p, columns (q, c):    M[q,c] = Σ_p w[p] H[p,q,c]
//
// H is packed once for a call, by all threads, if it fits in a part of the workspace; otherwise each panel is packed
// where it is used.
#pragma once

#include "incidence.h"

namespace fasthyper {

enum class Product { collect, expand };

template <class S, class T>
class RightHead {
 public:
  RightHead(const Head<S>& h, const Tiling& tiling, Product product, int64_t workspace)
      : h_(h), tiling_(tiling), product_(product) {
    slab_numbers_ = depth({0, tiling.q}) * columns({0, tiling.q});
    if (!fits_packed(h, tiling.ld_v, workspace)) return;
    const int64_t numbers = round_k<T>(h.p) * h.q * tiling.ld_v;
    packed_ = Scratch<T>(numbers);
    const int64_t panels = ceil_div(columns({0, tiling.q}), RIGHT_COLUMNS);
    for_units<T>(
        tiling.slabs * panels, double(numbers) * 8, std::max(LINE, floats_for_packing()), workspace,
        [&](int64_t unit, auto own) {
          const Range q = tiling_.slab(h_, unit / panels);
          const int64_t first = unit % panels * RIGHT_COLUMNS;
          if (first < columns(q)) pack_panel(q, first, place(unit / panels, q, first), own);
        });
  }

  int64_t columns(Range q) const { return product_ == Product::collect ? h_.p : q.size() * tiling_.ld_v; }

  int64_t width(Range q, int64_t first) const { return std::min(RIGHT_COLUMNS, columns(q) - first); }

  // Floats of scratch memory for `panel`.
  int64_t floats_for_panel() const {
    return packed_ ? 0 : floats_for_packing() + floats_for<T>(depth({0, tiling_.q}) * RIGHT_COLUMNS);
  }

  // The right operand of the columns from `first` on.
  const T* panel(int64_t slab, int64_t first, Span<float> own) const {
    const Range q = tiling_.slab(h_, slab);
    if (packed_) return place(slab, q, first).at(0, depth(q) * width(q, first));
    const int64_t room = floats_for_packing();
    const auto to = view_as<T>(own.subspan(room));
    pack_panel(q, first, to, own.subspan(0, room));
    return to.at(0, depth(q) * width(q, first));
  }

 private:
  int64_t depth(Range q) const { return round_k<T>(product_ == Product::collect ? q.size() * tiling_.ld_v : h_.p); }

  int64_t floats_for_packing() const { return std::is_same_v<T, float> ? 0 : depth({0, tiling_.q}) * RIGHT_COLUMNS; }

  Span<T> place(int64_t slab, Range q, int64_t first) const {
    return packed_.subspan(slab * slab_numbers_ + depth(q) * first, depth(q) * width(q, first));
  }

  void pack_panel(Range q, int64_t first, Span<T> to, Span<float> own) const {
    const int64_t cols = width(q, first), rows = product_ == Product::collect ? q.size() * tiling_.ld_v : h_.p;
    float* floats;
    if constexpr (std::is_same_v<T, float>) floats = to.at(0, rows * cols);
    else floats = own.at(0, rows * cols);
    if (product_ == Product::collect) pack_depth(q, first, cols, floats);
    else pack_columns(q, first, cols, floats);
    right_operand(floats, to, rows, cols);
  }

  // Rows (q, c), columns p from `first` on.
  void pack_depth(Range q, int64_t first, int64_t cols, float* to) const {
    const int64_t each = tiling_.ld_v * cols;
    for (int64_t k = q.begin; k < q.end; ++k, to += each) {
      pack(h_.data + k * h_.sq + first * h_.sp, h_.sc, h_.sp, to, cols, h_.c, cols, cols);
      std::fill(to + h_.c * cols, to + each, 0.f);
    }
  }

  // Rows p, columns (q, c) from `first` on.
  void pack_columns(Range q, int64_t first, int64_t cols, float* to) const {
    for (int64_t j = first, count; j < first + cols; j += count) {
      const int64_t k = q.begin + j / tiling_.ld_v, c = j % tiling_.ld_v;
      count = std::min(tiling_.ld_v - c, first + cols - j);
      const int64_t valid = std::clamp<int64_t>(h_.c - c, 0, count);
      float* const dst = to + (j - first);
      if (valid) pack(h_.data + k * h_.sq + c * h_.sc, h_.sp, h_.sc, dst, cols, h_.p, valid);
      for (int64_t p = 0; p < h_.p && valid < count; ++p)
        std::fill(dst + p * cols + valid, dst + p * cols + count, 0.f);
    }
  }

  const Head<S> h_;
  const Tiling& tiling_;
  const Product product_;
  int64_t slab_numbers_;
  Scratch<T> packed_;
};

}  // namespace fasthyper
