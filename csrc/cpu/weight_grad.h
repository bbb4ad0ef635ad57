// dH[o,i,r] = Σ_q x[q,i] z[q,r] g[q,o], q = (b, n).
//
//   fold       gᵀ · (x ⊗ z):   rows o, columns (i, r)
//   generate   (g ⊗ x)ᵀ · z:   rows (o, i), columns r
//
// A thread owns a slice of dH and adds up all instances in float32, so the number of threads changes no bit.
#pragma once

#include "rows.h"

namespace fasthyper {

constexpr int64_t DEPTH = tile_of(128, LANES);    // instances that one product contracts
constexpr int64_t COLUMNS = tile_of(128, LANES);  // of dH that one product writes
constexpr int64_t SLICE = tile_of(1 << 16);       // floats of dH that stay in cache

// Rows [q0, q1) with the features as they come, padded with zeros to (depth, ld).
template <class S>
void load_rows(const Rows<const S>& t, int64_t q0, int64_t q1, Block<float> to, int64_t ld, int64_t depth) {
  float* const out = to.at(0, depth * ld);
  t.stretches(q0, q1, [&](int64_t q, int64_t count, int64_t stride) {
    pack(t.row(q), stride, t.feature, out + (q - q0) * ld, ld, count, t.features);
  });
  for (int64_t q = 0; q < q1 - q0; ++q) std::fill(out + q * ld + t.features, out + (q + 1) * ld, 0.f);
  std::fill(out + (q1 - q0) * ld, out + depth * ld, 0.f);
}

// A slice of dH in float32: in place where that can be, else beside it and stored at the end. Its rows are `ld` apart,
// and every `run` of them is followed by the `pitch` - `run` rows of other slices.
template <class S>
class Slice {
 public:
  Slice(S* out, int64_t ld, int64_t rows, int64_t cols, int64_t run, int64_t pitch, bool at_once = false)
      : out_(out),
        ld_(ld),
        rows_(rows),
        cols_(cols),
        run_(run),
        pitch_(pitch),
        padded_(whole_registers(cols)),
        direct_(std::is_same_v<S, float> && padded_ == cols),
        own_(direct_ || at_once ? 0 : rows * padded_) {}

  bool direct() const { return direct_; }
  int64_t ld() const { return direct_ ? ld_ : padded_; }
  int64_t cols() const { return padded_; }
  bool whole() const { return own_ || run_ == pitch_; }  // whether rows are ld() apart without a gap

  // `count` rows from m on, within a run.
  float* rows(int64_t m, int64_t count) const {
    return direct_ ? reinterpret_cast<float*>(place(m)) : own_.at(m * padded_, count * padded_);
  }

  // Writes `count` finished rows from m on, within a run.
  void store(int64_t m, int64_t count, const float* rows) const { pack(rows, padded_, 1, place(m), ld_, count, cols_); }

  void finish() const {
    for (int64_t m = 0; own_ && m < rows_; m += run_) store(m, run_, rows(m, run_));
  }

 private:
  S* place(int64_t m) const { return out_ + (m / run_ * pitch_ + m % run_) * ld_; }

  S* out_;
  int64_t ld_, rows_, cols_, run_, pitch_, padded_;
  bool direct_;
  Scratch<float> own_;
};

// Rows o of this range, columns (i, r) of these.
template <class S, class T>
void fold_slice(const Factors<S>& f, Range o, Range columns, S* dh, int64_t deepest) {
  const int64_t Q = f.B * f.N, RP = whole_registers(f.R), i0 = columns.begin / f.R;
  const int64_t RZ = RP + WIDTH;  // a row of z may be read in whole registers from any r on
  const Range i{i0, (columns.end - 1) / f.R + 1};
  const Slice<S> slice(
      dh + o.begin * f.I * f.R + columns.begin, f.I * f.R, o.size(), columns.size(), o.size(), o.size());
  const Scratch<T> g(o.size() * deepest), operand(std::is_same_v<T, float> ? 0 : deepest * COLUMNS);
  const Scratch<float> z(deepest * RZ), x(deepest * i.size()), xz(deepest * COLUMNS), row(COLUMNS + 2 * (f.R + WIDTH));
  for (int64_t q = 0; q < Q; q += deepest) {
    const int64_t end = std::min(Q, q + deepest), depth = std::min(deepest, whole_lanes(end - q));
    load_lanes<S, T>(f.g.columns(o.begin, o.end), q, end, g, deepest, depth);
    load_rows(f.z, q, end, z, RZ, depth);
    load_rows(f.x.columns(i.begin, i.end), q, end, x, i.size(), depth);
    for (int64_t c = 0; c < columns.size(); c += COLUMNS) {
      const int64_t first = columns.begin + c, width = std::min(COLUMNS, columns.size() - c),
                    cols = whole_registers(width);
      const int64_t skip = first % f.R, start = first / f.R - i.begin,
                    count = (first + width - 1) / f.R - first / f.R + 1;
      for (int64_t k = 0; k < depth; ++k) {
        const float* const xk = x.at(k * i.size() + start, count);
        float* const to = xz.at(k * COLUMNS, cols);
        if (count == 1) {  // within one i
          const float* const zk = z.at(k * RZ + skip, cols);
          for (int64_t l = 0; l < cols; l += WIDTH) store(to + l, load<Vec>(zk + l) * xk[0]);
          continue;
        }
        const float* const zk = z.at(k * RZ, RP);
        float* run =
            row.at(0, (count - 1) * f.R + RP);  // whole stretches of r, each overwriting the excess of the last
        for (int64_t j = 0; j < count; ++j, run += f.R)
          for (int64_t l = 0; l < f.R; l += WIDTH) store(run + l, load<Vec>(zk + l) * xk[j]);
        std::memcpy(to, row.at(skip, cols), cols * sizeof(float));
      }
      const T* b = right(xz.at(0, depth * COLUMNS), operand, depth, COLUMNS);
      gemm(
          o.size(), cols, end - q, (const T*)g.at(0, o.size() * deepest), deepest, b, COLUMNS,
          slice.rows(0, o.size()) + c, slice.ld(), q > 0);
    }
  }
  slice.finish();
}

// Rows o that a block of rows (o, i) spans.
inline int64_t rows_together(int64_t I) { return std::max<int64_t>(1, 64 / I); }

// Rows (o, i) of these ranges, all columns r.
template <class S, class T>
void generate_slice(const Factors<S>& f, Range o, Range i, S* dh, int64_t most) {
  const int64_t Q = f.B * f.N, RP = round_up(f.R, COLUMNS), I = i.size(), rows = o.size() * I;
  const bool at_once = Q <= 2 * DEPTH && f.R <= COLUMNS;
  const int64_t deepest = at_once ? whole_lanes(Q) : most;
  const Slice<S> slice(dh + (o.begin * f.I + i.begin) * f.R, f.R, rows, f.R, I, f.I, at_once);
  // Blocks of rows begin anew with every `run` of them: some products round by how many rows they have.
  const int64_t run = I * (slice.whole() ? rows_together(f.I) : 1), M = even_share(run, 64, 6);
  const bool in_place = readable<S, T>(f.z.feature, f.R) && K_STEP<T> == 1 && f.N == 1 && f.R % WIDTH == 0;
  const Scratch<float> g(o.size() * deepest), x(I * deepest), z(in_place ? 0 : deepest * RP), gx(M * deepest);
  const Scratch<float> tile(at_once && !slice.direct() ? M * slice.cols() : 0);
  const Scratch<T> left(std::is_same_v<T, float> ? 0 : M * deepest),
      operand(std::is_same_v<T, float> ? 0 : deepest * RP);
  for (int64_t q = 0; q < Q; q += deepest) {
    const int64_t end = std::min(Q, q + deepest), depth = std::min(deepest, whole_lanes(end - q));
    load_lanes<S, float>(f.g.columns(o.begin, o.end), q, end, g, deepest, depth);
    load_lanes<S, float>(f.x.columns(i.begin, i.end), q, end, x, deepest, depth);
    for (int64_t c = 0; c < f.R && !in_place; c += COLUMNS) {  // panels of columns, each contiguous
      const auto panel = z.part(c * deepest, depth * COLUMNS);
      load_rows(f.z.columns(c, std::min(f.R, c + COLUMNS)), q, end, panel, COLUMNS, depth);
      if constexpr (!std::is_same_v<T, float>)
        right(panel.at(0, depth * COLUMNS), operand.part(c * deepest, depth * COLUMNS), depth, COLUMNS);
    }
    for (int64_t m = 0, count; m < rows; m += count) {
      count = std::min({M, run - m % run, rows - m});
      for (int64_t k = 0; k < count; ++k) {
        const float* const a = g.at((m + k) / I * deepest, depth);
        const float* const b = x.at((m + k) % I * deepest, depth);
        float* const to = gx.at(k * deepest, depth);
        for (int64_t l = 0; l < depth; l += WIDTH) store(to + l, load<Vec>(a + l) * load<Vec>(b + l));
      }
      const int64_t read = extent(count, deepest, depth);
      const T* a;
      if constexpr (std::is_same_v<T, float>) a = gx.at(0, read);
      else convert(gx.at(0, read), left.at(0, read), read), a = left.at(0, read);
      float* const to = tile ? tile.at(0, count * slice.cols()) : slice.rows(m, count);
      for (int64_t c = 0; c < f.R; c += COLUMNS) {
        const T* b;
        int64_t ld = COLUMNS;
        if constexpr (std::is_same_v<T, float>) b = in_place ? nullptr : z.at(c * deepest, depth * COLUMNS);
        else b = operand.at(c * deepest, depth * COLUMNS);
        if constexpr (std::is_same_v<S, T>)
          if (in_place) b = f.z.row(q) + c, ld = f.z.instance;
        gemm(count, std::min(COLUMNS, slice.cols() - c), end - q, a, deepest, b, ld, to + c, slice.ld(), q > 0);
      }
      if (tile) slice.store(m, count, to);
    }
  }
  slice.finish();
}

template <class S, class T>
void weight_grad(const Factors<S>& f, S* dh, Schedule schedule, int64_t workspace) {
  const double work = f.multiplications();
  const int64_t tasks = std::clamp<int64_t>(many(work / WORTH), 1, at::get_num_threads());
  // Instances that one product contracts: fewer where there are so many features that their z would fill the workspace.
  const int64_t rows_of_z = workspace / 8 / int64_t(sizeof(float)) / (f.R + COLUMNS);
  const int64_t deepest = std::clamp(rows_of_z / LANES * LANES, LANES, DEPTH);
  const int64_t together = std::max<int64_t>(1, workspace / 2 / (4 * (3 * SLICE + 2 * DEPTH * f.R)));
  const auto grain = [&](int64_t count) { return std::max(tasks_per_thread(count, work), ceil_div(count, together)); };
  if (schedule == Schedule::fold) {
    const int64_t o_parts = ceil_div(f.O, 512), o_size = ceil_div(f.O, o_parts);
    const int64_t total = f.I * f.R, room = std::max(COLUMNS, SLICE / o_size / COLUMNS * COLUMNS);
    const int64_t wanted = ceil_div(tasks, o_parts);
    const int64_t each = std::min(room, round_up(ceil_div(total, wanted), COLUMNS)), parts = ceil_div(total, each);
    at::parallel_for(0, o_parts * parts, grain(o_parts * parts), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        fold_slice<S, T>(
            f, share(f.O, t / parts, o_parts), {t % parts * each, std::min(total, (t % parts + 1) * each)}, dh,
            deepest);
      release<T>();
    });
  } else {
    const int64_t room = std::clamp<int64_t>(SLICE / f.R, 64, 4096);
    const int64_t each = rows_together(f.I), units = ceil_div(f.O, each);
    const int64_t long_rows = f.I <= 2 * 64 ? 1 : round_up(ceil_div(f.I, 256), 2);
    const int64_t few_rows = std::bit_floor(uint64_t(std::min(ceil_div(f.I, 12), ceil_div(4, units))));
    const int64_t i_parts = std::max(long_rows, few_rows), i_size = ceil_div(f.I, i_parts);
    const int64_t wanted = std::max(ceil_div(tasks, i_parts), f.O * i_size / room);
    const int64_t o_parts = std::clamp<int64_t>(wanted, 1, units);
    at::parallel_for(0, o_parts * i_parts, grain(o_parts * i_parts), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const Range own = share(units, t / i_parts, o_parts), o{own.begin * each, std::min(f.O, own.end * each)};
        generate_slice<S, T>(f, o, share(f.I, t % i_parts, i_parts), dh, deepest);
      }
      release<T>();
    });
  }
}

}  // namespace fasthyper
