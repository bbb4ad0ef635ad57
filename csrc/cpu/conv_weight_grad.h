// dw of groups with many channels: inputs i are side by side in registers, and p is the axis of the sum,
//
//   dw[o,i,u,v] = Σ_p g[o,p] cells[offset(u,v) + p][i],
//
// which needs no sums within registers. A task has some outputs and some inputs of a group. It adds up strips of rows
// of p in memory of its own, (o, u, v, i).
#pragma once

#include "conv_dot_taps.h"

namespace fasthyper {

constexpr int64_t TILE_INPUTS = registers_of(OUTPUTS) * WIDTH;  // that one step of the innermost loop takes
constexpr int64_t CELL_FLOATS = tile_size(1 << 14);             // of x in a strip, for some inputs
constexpr int64_t GRAD_FLOATS = tile_size(1 << 16);             // of dw of a task

class ConvWeightGrad {
 public:
  ConvWeightGrad(
      const Images<const float>& x, const Images<const float>& g, int64_t instances, int64_t groups,
      const ConvWeightsOut& dw, const PlaneAxis& rows, const PlaneAxis& columns)
      : x_(x),
        g_(g),
        instances_(instances),
        groups_(groups),
        inputs_(x.channels / groups),
        outputs_(g.channels / groups),
        taps_(rows.cell.size() * columns.cell.size()),
        dw_(dw),
        rows_(rows),
        columns_(columns),
        row_(columns.count + columns.span),
        strips_(ceil_div(rows.count, std::max<int64_t>(1, STRIP_CELLS / row_))),
        strip_(ceil_div(rows.count, strips_)),
        phase_((strip_ + rows.span) * row_),
        cells_(rows.source_phases.size() * columns.source_phases.size() * phase_) {
    const int64_t most = std::max<int64_t>(CELL_FLOATS / cells_ / TILE_INPUTS, 1) * TILE_INPUTS;
    input_parts_ = ceil_div(inputs_, most);
    ld_ = whole_registers(ceil_div(inputs_, input_parts_));
    const int64_t room = std::max<int64_t>(OUTPUTS, GRAD_FLOATS / (taps_ * ld_));
    const int64_t wanted = ceil_div(CONV_TASKS, instances * groups * input_parts_);
    output_parts_ = std::clamp<int64_t>(
        wanted, ceil_div(outputs_, room), std::max(ceil_div(outputs_, room), ceil_div(outputs_, 2 * OUTPUTS)));
    for (int64_t k = 0; k < strip_; ++k)
      for (int64_t l = 0; l < columns.count; ++l) offsets_.push_back((k * row_ + l) * ld_);
  }

  void run(int64_t workspace) const {
    const int64_t tasks = instances_ * groups_ * input_parts_ * output_parts_;
    const double work = double(instances_) * groups_ * inputs_ * outputs_ * offsets_.size() * strips_ * taps_;
    const int64_t outputs = ceil_div(outputs_, output_parts_);
    const int64_t x_size = cells_ * ld_, g_size = outputs * g_ld(), sum_size = outputs * taps_ * ld_;
    const int64_t together =
        std::max<int64_t>(1, workspace / 4 / int64_t(sizeof(float)) / (x_size + g_size + sum_size));
    const int64_t grain = std::max(tasks_per_thread(tasks, work), ceil_div(tasks, together));
    at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      const Scratch<float> x(x_size), g(g_size), sums(sum_size);
      for (int64_t k = begin; k < end; ++k) run_task(k, x, g, sums);
    });
  }

 private:
  int64_t g_ld() const { return packed_ld(strip_ * columns_.count); }

  void run_task(int64_t task, Span<float> x, Span<float> g, Span<float> sums) const {
    const Range o = share(outputs_, task % output_parts_, output_parts_);
    const int64_t rest = task / output_parts_, block = rest / input_parts_;
    const Range i = share(inputs_, rest % input_parts_, input_parts_);
    const int64_t b = block / groups_, group = block % groups_, column_phases = columns_.source_phases.size();
    for (int64_t strip = 0; strip < strips_; ++strip) {
      const Range p = share(rows_.count, strip, strips_);
      for (size_t k = 0; k < rows_.source_phases.size() * column_phases; ++k)
        load_cells(
            x_, b, group * inputs_ + i.begin, i.size(), rows_.source_cells(p.begin, p.size(), k / column_phases),
            columns_.source_cells(0, columns_.count, k % column_phases), x.subspan(k * phase_ * ld_), ld_, row_);
      load_planes(
          g_, b, group * outputs_ + o.begin, o.size(), {p.begin, p.size(), 1, 0}, {0, columns_.count, 1, 0}, g, g_ld(),
          columns_.count);
      for (int64_t l = 0; l < ld_; l += TILE_INPUTS)
        for (size_t u = 0; u < rows_.cell.size(); ++u)
          for (size_t v = 0; v < columns_.cell.size(); ++v) {
            const int64_t plane = rows_.source_phase[u] * column_phases + columns_.source_phase[v];
            const int64_t cell = plane * phase_ + rows_.cell[u] * row_ + columns_.cell[v];
            const int64_t tap = u * columns_.cell.size() + v;
            for (int64_t k = 0; k < o.size(); k += OUTPUTS)
              add(x, g, sums, cell * ld_ + l, (k * taps_ + tap) * ld_ + l, {k, std::min(k + OUTPUTS, o.size())},
                  p.size() * columns_.count, std::min(TILE_INPUTS, ld_ - l), strip == 0);
          }
    }
    for (int64_t k = 0; k < o.size(); ++k) {
      float* const to = dw_.data + b * dw_.instance + (group * outputs_ + o.begin + k) * dw_.output + i.begin * taps_;
      const float* const from = sums.at(k * taps_ * ld_, taps_ * ld_);
      if (taps_ == 1) copy_row(from, to, i.size());
      else pack(from, 1, ld_, to, taps_, i.size(), taps_);
    }
  }

  // Adds `cells` terms p to one tap of some outputs o and `n` inputs.
  void add(
      Span<const float> x, Span<const float> g, Span<float> sums, int64_t from, int64_t to, Range o, int64_t cells,
      int64_t n, bool first) const {
    static constexpr float zeros[OUTPUTS] = {};
    const int64_t K = o.size(), ld = taps_ * ld_;
    x.at(from + offsets_[cells - 1], n);
    const TapSum sum{
        offsets_.data(),
        cells,
        x.at(from, n),
        {g.at(o.begin * g_ld(), (K - 1) * g_ld() + cells), g_ld()},
        sums.at(to, (K - 1) * ld + n),
        ld,
        first ? zeros : nullptr};
    if (K == 4) add_taps<4, 1>(sum, n);
    else if (K == 3) add_taps<3, 1>(sum, n);
    else if (K == 2) add_taps<2, 1>(sum, n);
    else add_taps<1, 1>(sum, n);
  }

  const Images<const float> x_, g_;
  const int64_t instances_, groups_, inputs_, outputs_, taps_;  // channels of a group
  const ConvWeightsOut dw_;
  const PlaneAxis &rows_, &columns_;
  const int64_t row_, strips_, strip_, phase_, cells_;  // as in AddTaps; `cells_` of all phases of x
  int64_t input_parts_, output_parts_, ld_;             // parts of a group; inputs of a part, in whole registers
  std::vector<int64_t> offsets_;                        // of p
};

// dw by dot products if registers of inputs would be half empty.
inline void conv_weight_grad(
    const Images<const float>& x, const Images<const float>& g, int64_t instances, int64_t groups,
    const ConvWeightsOut& dw, const PlaneAxis& rows, const PlaneAxis& columns, int64_t workspace) {
  if (x.channels / groups <= 6) DotTaps(x, g, instances, groups, dw, rows, columns).run(workspace);
  else ConvWeightGrad(x, g, instances, groups, dw, rows, columns).run(workspace);
}

}  // namespace fasthyper
