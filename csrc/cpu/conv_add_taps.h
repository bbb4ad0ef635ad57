// y of x, and dx of g: sums over source channels and taps, which are written to planes of target channels.
//
// A task has some targets of one group, or all targets of a few groups with few channels, and a strip of rows of p. It
// takes as many source channels at a time as fit into the nearest cache, and adds their taps to planes of the targets.
#pragma once

#include "conv_planes.h"
#include "conv_registers.h"
#include "rows.h"

namespace fasthyper {

// Weights of instance b, target t, source s (both of one group) and tap k: data + b·instance + t·target + s·source + k.
struct ConvWeights {
  const float* data;
  int64_t instance, group, target, source;
};

// A matrix of one number for each instance and target, or null.
struct Shift {
  const float* data;
  int64_t instance, target;
};

constexpr int64_t STRIP_CELLS = tile_size(512);        // cells p of a strip
constexpr int64_t SOURCE_FLOATS = tile_size(1 << 12);  // of the planes of some sources: they stay in the nearest cache
constexpr int64_t TARGET_FLOATS = tile_size(1 << 15);
constexpr int64_t CONV_TASKS = 32;    // tasks are divided until there are as many
constexpr int64_t CHANNELS = SQUARE;  // of several small groups that a task copies together

class AddTaps {
 public:
  AddTaps(
      const Images<const float>& source, const Images<float>& target, int64_t instances, int64_t groups,
      const ConvWeights& w, const Shift& shift, const PlaneAxis& rows, const PlaneAxis& columns)
      : source_(source),
        target_(target),
        groups_(groups),
        sources_(source.channels / groups),
        targets_(target.channels / groups),
        w_(w),
        shift_(shift),
        rows_(rows),
        columns_(columns),
        row_(columns.count + columns.span),
        strips_(ceil_div(rows.count, std::max<int64_t>(1, STRIP_CELLS / row_))),
        strip_(ceil_div(rows.count, strips_)),
        phase_(strip_ + rows.span),
        instances_(instances) {
    const int64_t source_phases = rows.source_phases.size() * columns.source_phases.size();
    cells_ = whole_registers((strip_ - 1) * row_ + columns.count);
    source_ld_ = packed_ld(source_phases * phase_ * row_ + WIDTH);
    phase_ *= row_;
    target_ld_ = packed_ld(cells_ * rows.target_phases.size() * columns.target_phases.size());
    const int64_t channels = std::max(sources_, targets_);
    block_ = std::clamp<int64_t>(CHANNELS / std::max<int64_t>(channels, 1), 1, groups);
    blocks_ = ceil_div(groups, block_);
    const int64_t all = std::max<int64_t>(sources_, 1);
    const int64_t reuse = rows.cell.size() * columns.cell.size() > 1 ? 1 : 4;  // one tap reads a plane only once
    at_once_ = block_ > 1 ? all : std::clamp<int64_t>(reuse * SOURCE_FLOATS / source_ld_, 1, all);
    parts_ = 1;
    if (block_ == 1) {
      const int64_t wanted = ceil_div(CONV_TASKS, instances * blocks_ * strips_), room = TARGET_FLOATS / target_ld_;
      const int64_t most = ceil_div(targets_, 16 * OUTPUTS);
      parts_ = std::clamp<int64_t>(
          std::max(wanted, ceil_div(targets_, std::max<int64_t>(room, 2 * OUTPUTS))), 1, std::max<int64_t>(most, 1));
    }
    find_taps();
  }

  void run(int64_t workspace) const {
    const int64_t tasks = instances_ * blocks_ * strips_ * parts_;
    const double work = double(instances_) * groups_ * sources_ * targets_ * rows_.count * row_ * most_taps_;
    const int64_t floats = planes_size() + outputs_size() + packed_size();
    const int64_t together = std::max<int64_t>(1, workspace / 4 / int64_t(sizeof(float)) / floats);
    const int64_t grain = std::max(tasks_per_thread(tasks, work), ceil_div(tasks, together));
    at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      const Scratch<float> planes(planes_size()), outputs(outputs_size()), packed(packed_size());
      planes.span().fill(0.f);
      for (int64_t k = begin; k < end; ++k) run_task(k, planes, outputs, packed);
    });
  }

 private:
  // The taps of a target phase, for `at_once_` sources.
  struct Phase {
    std::vector<int64_t> offsets, index;
    int64_t taps;  // of one source
  };

  int64_t planes_size() const { return std::max<int64_t>(1, block_ * at_once_) * source_ld_; }
  int64_t outputs_size() const { return block_ * ceil_div(targets_, parts_) * target_ld_; }
  int64_t packed_size() const { return std::max<int64_t>(1, at_once_ * most_taps_ * OUTPUTS); }

  void find_taps() {
    const int64_t row_phases = rows_.target_phases.size(), column_phases = columns_.target_phases.size();
    const int64_t V = columns_.cell.size();
    phases_.resize(row_phases * column_phases);
    std::vector<std::vector<int64_t>> first(phases_.size());
    for (size_t u = 0; u < rows_.cell.size(); ++u)
      for (int64_t v = 0; v < V; ++v) {
        if (rows_.target_phase[u] >= row_phases || columns_.target_phase[v] >= column_phases)
          continue;  // no such numbers
        const int64_t target = rows_.target_phase[u] * column_phases + columns_.target_phase[v];
        const int64_t plane = rows_.source_phase[u] * columns_.source_phases.size() + columns_.source_phase[v];
        phases_[target].index.push_back(u * V + v);
        first[target].push_back(plane * phase_ + rows_.cell[u] * row_ + columns_.cell[v]);
      }
    for (size_t k = 0; k < phases_.size(); ++k) {
      phases_[k].taps = first[k].size();
      most_taps_ = std::max(most_taps_, phases_[k].taps);
      for (int64_t s = 0; s < at_once_; ++s)
        for (const int64_t offset : first[k]) phases_[k].offsets.push_back(s * source_ld_ + offset);
    }
    const int64_t all = rows_.cell.size() * V;
    in_place_ = phases_.size() == 1 && phases_[0].taps == all && (sources_ <= 1 || w_.source == all);
  }

  void run_task(int64_t task, Span<float> planes, Span<float> outputs, Span<float> packed) const {
    const Range targets = share(targets_, task % parts_, parts_);
    const int64_t strip = task / parts_ % strips_, block = task / parts_ / strips_;
    const int64_t b = block / blocks_, g0 = block % blocks_ * block_, g1 = std::min(groups_, g0 + block_);
    const Range p = share(rows_.count, strip, strips_);
    for (int64_t s = 0; s == 0 || s < sources_; s += at_once_) {
      const int64_t count = std::min(at_once_, sources_ - s);
      load(b, g0 * sources_ + s, (g1 - g0 - 1) * sources_ + count, p, planes);
      for (int64_t g = g0; g < g1; ++g)
        for (int64_t t = targets.begin; t < targets.end; t += OUTPUTS) {
          const int64_t place = (g - g0) * targets.size() + t - targets.begin,
                        n = std::min<int64_t>(OUTPUTS, targets.end - t);
          add(b, g, {t, t + n}, {s, s + count}, planes.subspan((g - g0) * sources_ * source_ld_),
              outputs.subspan(place * target_ld_, n * target_ld_), packed);
        }
    }
    const int64_t column_phases = columns_.target_phases.size();
    for (size_t k = 0; k < phases_.size(); ++k)
      store_planes(
          outputs.subspan(k * cells_), target_ld_, row_, target_, b, g0 * targets_ + targets.begin,
          (g1 - g0) * targets.size(), rows_.target_cells(p.begin, p.size(), k / column_phases),
          columns_.target_cells(0, columns_.count, k % column_phases));
  }

  void load(int64_t b, int64_t channel, int64_t channels, Range p, Span<float> planes) const {
    const int64_t column_phases = columns_.source_phases.size();
    for (size_t k = 0; k < rows_.source_phases.size() * column_phases; ++k)
      load_planes(
          source_, b, channel, channels, rows_.source_cells(p.begin, p.size(), k / column_phases),
          columns_.source_cells(0, columns_.count, k % column_phases), planes.subspan(k * phase_), source_ld_, row_);
  }

  // Adds the taps of some sources to some targets.
  void add(
      int64_t b, int64_t g, Range t, Range s, Span<const float> planes, Span<float> out, Span<float> packed) const {
    const float* const w = w_.data + b * w_.instance + g * w_.group + t.begin * w_.target + s.begin * w_.source;
    float init[OUTPUTS] = {};
    for (int64_t k = 0; k < t.size() && shift_.data; ++k)
      init[k] = shift_.data[b * shift_.instance + (g * targets_ + t.begin + k) * shift_.target];
    prefetch(w + OUTPUTS * w_.target, std::min<int64_t>(OUTPUTS, targets_ - t.end), s.size());
    for (size_t k = 0; k < phases_.size(); ++k) {
      const Phase& phase = phases_[k];
      TapSum sum{phase.offsets.data(), s.size() * phase.taps,   planes.at(0, 0), {w, w_.target}, out.at(k * cells_, 0),
                 target_ld_,           s.begin ? nullptr : init};
      out.at((t.size() - 1) * target_ld_ + k * cells_, cells_);
      if (sum.taps) planes.at(phase.offsets[sum.taps - 1], cells_);
      if (t.size() == 4) add_taps_of<4>(sum, phase, s.size(), packed);
      else if (t.size() == 3) add_taps_of<3>(sum, phase, s.size(), packed);
      else if (t.size() == 2) add_taps_of<2>(sum, phase, s.size(), packed);
      else add_taps_of<1>(sum, phase, s.size(), packed);
    }
  }

  // packed[(s, k)][t] = the weights of T targets, some sources and all taps of a phase.
  template <int64_t T>
  const float* pack_weights(const Phase& phase, const float* w, int64_t sources, Span<float> packed) const {
    float* to = packed.at(0, T * sources * phase.taps);
    for (int64_t s = 0; s < sources; ++s, w += w_.source)
      for (int64_t k = 0; k < phase.taps; ++k, to += T) {
        const float* const from = w + phase.index[k];
        for (int64_t t = 0; t < T; ++t) to[t] = from[t * w_.target];
      }
    return packed.at(0, 0);
  }

  template <int64_t T>
  void add_taps_of(TapSum sum, const Phase& phase, int64_t sources, Span<float> packed) const {
    if (in_place_) return add_taps<T, 1>(sum, cells_);
    sum.w = {pack_weights<T>(phase, sum.w.data, sources, packed), 1};
    add_taps<T, T>(sum, cells_);
  }

  // Requests the weights of the next targets: their rows are too short for the processor to foresee.
  void prefetch(const float* w, int64_t targets, int64_t sources) const {
    const int64_t taps = rows_.cell.size() * columns_.cell.size();
    const bool by_target = w_.source == taps;  // the sources of a target are side by side, else targets of a source
    const int64_t runs = by_target ? targets : sources, stride = by_target ? w_.target : w_.source;
    const int64_t numbers = (by_target ? sources : targets) * taps;
    for (int64_t k = 0; k < runs; ++k)
      for (int64_t j = 0; j < numbers; j += LINE) __builtin_prefetch(w + k * stride + j);
  }

  const Images<const float> source_;
  const Images<float> target_;
  const int64_t groups_, sources_, targets_;  // channels of a group
  const ConvWeights w_;
  const Shift shift_;
  const PlaneAxis &rows_, &columns_;
  const int64_t row_, strips_, strip_;  // cells of a row, strips, and rows of p of a strip
  int64_t phase_;                       // cells of a phase of the source
  const int64_t instances_;
  int64_t cells_, source_ld_, target_ld_;
  int64_t block_, blocks_, at_once_, parts_;  // groups of a task; sources that are added at once; parts of targets
  int64_t most_taps_ = 0;
  bool in_place_;  // whether the taps of a target are side by side in w
  std::vector<Phase> phases_;
};

}  // namespace fasthyper
