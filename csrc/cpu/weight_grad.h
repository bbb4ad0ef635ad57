// The gradient of H from all rows q = (b, n): dH[o,i,r] = Σ_q x[q,i] z[q,r] g[q,o], as one of two products:
//
//   fold       gᵀ · (x ⊗ z):   rows o, columns (i, r)
//   generate   (g ⊗ x)ᵀ · z:   rows (o, i), columns r
//
// Each task owns a slice of dH and sums over all q in float32, so that results do not depend on the number of threads.
#pragma once

#include "rows.h"

namespace fasthyper {

constexpr int64_t DH_DEPTH = tile_size(128, LANES);    // q of one product, at most
constexpr int64_t DH_COLUMNS = tile_size(128, LANES);  // columns of one product, at most
constexpr int64_t DH_SLICE = tile_size(1 << 16);       // floats of a slice of dH, which stays in cache

// The rows q0 to q1 with contiguous features, padded with zeros to (depth, ld).
template <class S>
void load_rows(const Rows<const S>& t, int64_t q0, int64_t q1, Span<float> to, int64_t ld, int64_t depth) {
  float* const out = to.at(0, depth * ld);
  t.stretches(q0, q1, [&](int64_t q, int64_t count, int64_t stride) {
    pack(t.row(q), stride, t.feature, out + (q - q0) * ld, ld, count, t.features);
  });
  for (int64_t q = 0; q < q1 - q0; ++q) std::fill(out + q * ld + t.features, out + (q + 1) * ld, 0.f);
  std::fill(out + (q1 - q0) * ld, out + depth * ld, 0.f);
}

// A slice of dH in float32: in place if possible, else in its own memory and stored at the end. Rows of dH are `ld`
// apart. Of every `pitch` rows, the slice has `run`; the others belong to other slices. `at_once`: the caller computes
// each row once and passes it to `store`, so the slice needs no memory.
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
  bool contiguous() const { return own_ || run_ == pitch_; }  // whether all rows are ld() apart

  // A pointer to `count` rows from m on, within a run.
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

// `fold` for a range of rows o and a range of columns (i, r).
template <class S, class T>
void fold_slice(const Factors<S>& f, Range o, Range columns, S* dh, int64_t deepest) {
  const int64_t Q = f.B * f.N, RP = whole_registers(f.R), i0 = columns.begin / f.R;
  const int64_t RZ = RP + WIDTH;  // whole registers of a row of z are read from any r on
  const Range i{i0, (columns.end - 1) / f.R + 1};
  const Slice<S> slice(
      dh + o.begin * f.I * f.R + columns.begin, f.I * f.R, o.size(), columns.size(), o.size(), o.size());
  const Scratch<T> g(o.size() * deepest), operand(std::is_same_v<T, float> ? 0 : deepest * DH_COLUMNS);
  const Scratch<float> z(deepest * RZ), x(deepest * i.size()), xz(deepest * DH_COLUMNS),
      row(DH_COLUMNS + 2 * (f.R + WIDTH));
  for (int64_t q = 0; q < Q; q += deepest) {
    const int64_t end = std::min(Q, q + deepest), depth = std::min(deepest, whole_lanes(end - q));
    load_lanes<S, T>(f.g.columns(o.begin, o.end), q, end, g, deepest, depth);
    load_rows(f.z, q, end, z, RZ, depth);
    load_rows(f.x.columns(i.begin, i.end), q, end, x, i.size(), depth);
    for (int64_t c = 0; c < columns.size(); c += DH_COLUMNS) {
      const int64_t first = columns.begin + c, width = std::min(DH_COLUMNS, columns.size() - c),
                    cols = whole_registers(width);
      const int64_t skip = first % f.R, start = first / f.R - i.begin,
                    count = (first + width - 1) / f.R - first / f.R + 1;
      for (int64_t k = 0; k < depth; ++k) {
        const float* const xk = x.at(k * i.size() + start, count);
        float* const to = xz.at(k * DH_COLUMNS, cols);
        if (count == 1) {  // all columns have the same i
          const float* const zk = z.at(k * RZ + skip, cols);
          for (int64_t l = 0; l < cols; l += WIDTH) store(to + l, load<Vec>(zk + l) * xk[0]);
          continue;
        }
        const float* const zk = z.at(k * RZ, RP);
        float* run = row.at(0, (count - 1) * f.R + RP);  // in whole registers: each i overwrites the excess of the last
        for (int64_t j = 0; j < count; ++j, run += f.R)
          for (int64_t l = 0; l < f.R; l += WIDTH) store(run + l, load<Vec>(zk + l) * xk[j]);
        std::memcpy(to, row.at(skip, cols), cols * sizeof(float));
      }
      const T* b = right_operand(xz.at(0, depth * DH_COLUMNS), operand, depth, DH_COLUMNS);
      gemm(
          o.size(), cols, end - q, (const T*)g.at(0, o.size() * deepest), deepest, b, DH_COLUMNS,
          slice.rows(0, o.size()) + c, slice.ld(), q > 0);
    }
  }
  slice.finish();
}

// The number of o in one tile of rows (o, i).
inline int64_t outputs_per_tile(int64_t I) { return std::max<int64_t>(1, 64 / I); }

// `generate` for a range of o and a range of i, and all columns r.
template <class S, class T>
void generate_slice(const Factors<S>& f, Range o, Range i, S* dh, int64_t most) {
  const int64_t Q = f.B * f.N, RP = round_up(f.R, DH_COLUMNS), I = i.size(), rows = o.size() * I;
  const bool at_once = Q <= 2 * DH_DEPTH && f.R <= DH_COLUMNS;
  const int64_t deepest = at_once ? whole_lanes(Q) : most;
  const Slice<S> slice(dh + (o.begin * f.I + i.begin) * f.R, f.R, rows, f.R, I, f.I, at_once);
  // Every run of rows starts a new tile, because some products round differently for different numbers of rows. So the
  // tiles do not depend on how tasks divide o.
  const int64_t run = I * (slice.contiguous() ? outputs_per_tile(f.I) : 1), M = equal_size(run, 64, 6);
  const bool in_place = readable_in_place<S, T>(f.z.feature, f.R) && K_STEP<T> == 1 && f.N == 1 && f.R % WIDTH == 0;
  const Scratch<float> g(o.size() * deepest), x(I * deepest), z(in_place ? 0 : deepest * RP), gx(M * deepest);
  const Scratch<float> tile(at_once && !slice.direct() ? M * slice.cols() : 0);
  const Scratch<T> operand_gx(std::is_same_v<T, float> ? 0 : M * deepest),
      operand(std::is_same_v<T, float> ? 0 : deepest * RP);
  for (int64_t q = 0; q < Q; q += deepest) {
    const int64_t end = std::min(Q, q + deepest), depth = std::min(deepest, whole_lanes(end - q));
    load_lanes<S, float>(f.g.columns(o.begin, o.end), q, end, g, deepest, depth);
    load_lanes<S, float>(f.x.columns(i.begin, i.end), q, end, x, deepest, depth);
    for (int64_t c = 0; c < f.R && !in_place; c += DH_COLUMNS) {  // contiguous panels of columns
      const auto panel = z.subspan(c * deepest, depth * DH_COLUMNS);
      load_rows(f.z.columns(c, std::min(f.R, c + DH_COLUMNS)), q, end, panel, DH_COLUMNS, depth);
      if constexpr (!std::is_same_v<T, float>)
        right_operand(
            panel.at(0, depth * DH_COLUMNS), operand.subspan(c * deepest, depth * DH_COLUMNS), depth, DH_COLUMNS);
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
      else convert(gx.at(0, read), operand_gx.at(0, read), read), a = operand_gx.at(0, read);
      float* const to = tile ? tile.at(0, count * slice.cols()) : slice.rows(m, count);
      for (int64_t c = 0; c < f.R; c += DH_COLUMNS) {
        const T* b;
        int64_t ld = DH_COLUMNS;
        if constexpr (std::is_same_v<T, float>) b = in_place ? nullptr : z.at(c * deepest, depth * DH_COLUMNS);
        else b = operand.at(c * deepest, depth * DH_COLUMNS);
        if constexpr (std::is_same_v<S, T>)
          if (in_place) b = f.z.row(q) + c, ld = f.z.instance;
        gemm(count, std::min(DH_COLUMNS, slice.cols() - c), end - q, a, deepest, b, ld, to + c, slice.ld(), q > 0);
      }
      if (tile) slice.store(m, count, to);
    }
  }
  slice.finish();
}

// dH by either schedule; `project` takes generate's.
template <class S, class T>
void weight_grad(const Factors<S>& f, S* dh, Schedule schedule, int64_t workspace) {
  const double work = f.multiplications();
  const int64_t tasks = std::clamp<int64_t>(to_count(work / THREAD_WORK), 1, at::get_num_threads());
  // The q of one product: fewer if R is so large that z of these q would fill the workspace.
  const int64_t rows_of_z = workspace / 8 / int64_t(sizeof(float)) / (f.R + DH_COLUMNS);
  const int64_t deepest = std::clamp(rows_of_z / LANES * LANES, LANES, DH_DEPTH);
  const int64_t together = std::max<int64_t>(1, workspace / 2 / (4 * (3 * DH_SLICE + 2 * DH_DEPTH * f.R)));
  const auto grain = [&](int64_t count) { return std::max(tasks_per_thread(count, work), ceil_div(count, together)); };
  if (schedule == Schedule::fold) {
    const int64_t o_parts = ceil_div(f.O, 512), o_size = ceil_div(f.O, o_parts);
    const int64_t total = f.I * f.R, room = std::max(DH_COLUMNS, DH_SLICE / o_size / DH_COLUMNS * DH_COLUMNS);
    const int64_t wanted = ceil_div(tasks, o_parts);
    const int64_t each = std::min(room, round_up(ceil_div(total, wanted), DH_COLUMNS)), parts = ceil_div(total, each);
    at::parallel_for(0, o_parts * parts, grain(o_parts * parts), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        fold_slice<S, T>(
            f, share(f.O, t / parts, o_parts), {t % parts * each, std::min(total, (t % parts + 1) * each)}, dh,
            deepest);
      release_matrix_unit<T>();
    });
  } else {
    const int64_t room = std::clamp<int64_t>(DH_SLICE / f.R, 64, 4096);
    const int64_t each = outputs_per_tile(f.I), units = ceil_div(f.O, each);
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
      release_matrix_unit<T>();
    });
  }
}

}  // namespace fasthyper
