// dw of groups with few channels: a dot product over p for every tap, of planes of g and planes of x. A task has some
// outputs of one group, or all outputs of a few groups, and adds up strips of rows of p.
#pragma once

#include "conv_add_taps.h"

namespace fasthyper {

// dw of instance b, output o and tap (i, u, v): data + b·instance + o·output + (i·U + u)·V + v.
struct ConvWeightsOut {
  float* data;
  int64_t instance, output;
};

constexpr int64_t DOT_CELLS = tile_size(1024);  // cells p of a strip
constexpr int DOT_TAPS = 8;                     // that one output shares g of

class DotTaps {
 public:
  DotTaps(
      const Images<const float>& x, const Images<const float>& g, int64_t instances, int64_t groups,
      const ConvWeightsOut& dw, const PlaneAxis& rows, const PlaneAxis& columns)
      : x_(x),
        g_(g),
        groups_(groups),
        inputs_(x.channels / groups),
        outputs_(g.channels / groups),
        dw_(dw),
        rows_(rows),
        columns_(columns),
        row_(columns.count + columns.span),
        strips_(ceil_div(rows.count, std::max<int64_t>(1, DOT_CELLS / row_))),
        strip_(ceil_div(rows.count, strips_)),
        phase_((strip_ + rows.span) * row_),
        instances_(instances) {
    cells_ = whole_registers((strip_ - 1) * row_ + columns.count);
    x_ld_ = packed_ld(rows.source_phases.size() * columns.source_phases.size() * phase_ + WIDTH);
    g_ld_ = packed_ld(strip_ * row_ + WIDTH);
    taps_ = rows.cell.size() * columns.cell.size();
    block_ = std::clamp<int64_t>(CHANNELS / std::max(inputs_, outputs_), 1, groups);
    blocks_ = ceil_div(groups, block_);
    parts_ = block_ > 1 ? 1 : ceil_div(outputs_, 2 * OUTPUTS);
    for (int64_t i = 0; i < inputs_; ++i)
      for (size_t u = 0; u < rows.cell.size(); ++u)
        for (size_t v = 0; v < columns.cell.size(); ++v) {
          const int64_t plane = rows.source_phase[u] * columns.source_phases.size() + columns.source_phase[v];
          offsets_.push_back(i * x_ld_ + plane * phase_ + rows.cell[u] * row_ + columns.cell[v]);
        }
  }

  void run(int64_t workspace) const {
    const int64_t tasks = instances_ * blocks_ * parts_;
    const double work = double(instances_) * groups_ * inputs_ * outputs_ * rows_.count * row_ * taps_;
    const int64_t x_size = block_ * inputs_ * x_ld_, g_size = block_ * ceil_div(outputs_, parts_) * g_ld_;
    const int64_t together = std::max<int64_t>(1, workspace / 4 / int64_t(sizeof(float)) / (x_size + g_size));
    const int64_t grain = std::max(tasks_per_thread(tasks, work), ceil_div(tasks, together));
    at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      const Scratch<float> x(x_size), g(g_size);
      x.span().fill(0.f), g.span().fill(0.f);
      for (int64_t k = begin; k < end; ++k) run_task(k, x, g);
    });
  }

 private:
  void run_task(int64_t task, Span<float> x, Span<float> g) const {
    const Range o = share(outputs_, task % parts_, parts_);
    const int64_t block = task / parts_, b = block / blocks_;
    const int64_t g0 = block % blocks_ * block_, g1 = std::min(groups_, g0 + block_);
    for (int64_t strip = 0; strip < strips_; ++strip) {
      const Range p = share(rows_.count, strip, strips_);
      load(b, {g0 * inputs_, g1 * inputs_}, p, x);
      const int64_t first = g0 * outputs_ + o.begin;
      load_planes(g_, b, first, (g1 - g0) * o.size(), {p.begin, strip_, 1, 0}, {0, row_, 1, 0}, g, g_ld_, row_);
      if (p.size() < strip_)  // rows of the next strip
        for (int64_t k = 0; k < (g1 - g0) * o.size(); ++k)
          std::fill_n(g.at(k * g_ld_ + p.size() * row_, row_ * (strip_ - p.size())), row_ * (strip_ - p.size()), 0.f);
      for (int64_t k = g0; k < g1; ++k)
        for (int64_t j = 0; j < o.size(); j += OUTPUTS) {
          const int64_t n = std::min<int64_t>(OUTPUTS, o.size() - j), place = (k - g0) * o.size() + j;
          float* const to = dw_.data + b * dw_.instance + (k * outputs_ + o.begin + j) * dw_.output;
          add(x.subspan((k - g0) * inputs_ * x_ld_), g.subspan(place * g_ld_, n * g_ld_), n, to, strip > 0);
        }
    }
  }

  void load(int64_t b, Range channels, Range p, Span<float> x) const {
    const int64_t column_phases = columns_.source_phases.size();
    for (size_t k = 0; k < rows_.source_phases.size() * column_phases; ++k)
      load_planes(
          x_, b, channels.begin, channels.size(), rows_.source_cells(p.begin, strip_, k / column_phases),
          columns_.source_cells(0, columns_.count, k % column_phases), x.subspan(k * phase_), x_ld_, row_);
  }

  // All taps of n outputs of a group.
  void add(Span<const float> x, Span<const float> g, int64_t n, float* dw, bool add) const {
    const int64_t taps = offsets_.size();
    if (n == 1) {
      const int64_t parts = ceil_div(taps, DOT_TAPS);
      for (int64_t k = 0; k < parts; ++k) {
        const Range t = share(taps, k, parts);
        dot<1, DOT_TAPS>(x, g, t, dw, add);
      }
      return;
    }
    for (int64_t t = 0; t < taps; t += 3) {
      const Range some{t, std::min(t + 3, taps)};
      if (n == 4) dot<4, 3>(x, g, some, dw, add);
      else if (n == 3) dot<3, 3>(x, g, some, dw, add);
      else dot<2, 3>(x, g, some, dw, add);
    }
  }

  // T taps or fewer.
  template <int K, int T>
  void dot(Span<const float> x, Span<const float> g, Range t, float* dw, bool add) const {
    if constexpr (T > 0) {
      if (t.size() < T) return dot<K, T - 1>(x, g, t, dw, add);
      x.at(offsets_[t.end - 1], cells_);
      dot_taps<K, T>(
          {&offsets_[t.begin], x.at(0, 0), g.at(0, (K - 1) * g_ld_ + cells_), g_ld_, cells_, dw + t.begin, dw_.output,
           add});
    }
  }

  const Images<const float> x_, g_;
  const int64_t groups_, inputs_, outputs_;  // channels of a group
  const ConvWeightsOut dw_;
  const PlaneAxis &rows_, &columns_;
  const int64_t row_, strips_, strip_, phase_;  // as in AddTaps
  const int64_t instances_;
  int64_t cells_, x_ld_, g_ld_, taps_, block_, blocks_, parts_;
  std::vector<int64_t> offsets_;
};

}  // namespace fasthyper
