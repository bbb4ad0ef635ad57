// Adding rows of terms into rows of results: in the order of the terms, by any number of threads, without atomics. A
// task owns a range of the rows of the result and a slice of its features, and passes over all terms.
#pragma once

#include "incidence.h"

namespace fasthyper {

constexpr int64_t SUM_ROWS = tile_size(1 << 14);  // of a result in 16 bits that a task adds to at a time

// Calls f(first row, last row, features) in parallel. With few slices of features, the rows are divided, too.
template <class F>
void for_slices(int64_t rows, int64_t features, double numbers, F&& f) {
  const int64_t threads = std::clamp<int64_t>(to_count(numbers / (1 << 15)), 1, at::get_num_threads());
  const int64_t each = std::max(LINE, round_up(ceil_div(features, threads), LINE)), slices = ceil_div(features, each);
  const int64_t ranges = std::min(rows, ceil_div(threads, slices));
  at::parallel_for(0, slices * ranges, ceil_div(slices * ranges, threads), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const Range own = share(rows, k / slices, ranges);
      f(own.begin, own.end, Range{k % slices * each, std::min(features, (k % slices + 1) * each)});
    }
  });
}

inline void add_row(const float* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) store(to + i, load<Vec>(to + i) + load<Vec>(from + i));
  for (; i < n; ++i) to[i] += from[i];
}

template <class S>
void add_row(const float* from, S* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = S(float(to[i]) + from[i]);
}

// Rows of messages, `ld` apart, and for each the row that it is added to; -1 for none.
struct Messages {
  Span<float> data;
  int64_t ld;
  Span<const int64_t> rows;
};

// A result (rows, features), contiguous, that is zero at first. A result in 16 bits is summed in a copy in float32 if
// `room` floats suffice; otherwise it is rounded once for each call of `add`.
template <class S>
class Destination {
 public:
  Destination() = default;
  Destination(S* data, int64_t rows, int64_t features, int64_t room)
      : data_(data),
        rows_(rows),
        features_(features),
        copy_(std::is_same_v<S, float> || rows * features > room ? 0 : rows * features) {
    if (copy_) copy_.span().fill(0.f);
  }

  // Adds messages in their order.
  void add(const Messages& messages) const {
    const int64_t count = messages.rows.size();
    for_slices(rows_, features_, double(count) * features_, [&](int64_t begin, int64_t end, Range features) {
      if constexpr (std::is_same_v<S, float>) return add_floats(messages, data_, begin, end, features);
      if (copy_) return add_floats(messages, copy_.at(0, rows_ * features_), begin, end, features);
      for (int64_t row = begin; row < end; row += SUM_ROWS)
        add_rounded(messages, row, std::min(end, row + SUM_ROWS), features);
    });
  }

  void finish() const {
    if (!copy_) return;
    at::parallel_for(0, rows_ * features_, 1 << 15, [&](int64_t begin, int64_t end) {
      convert(copy_.at(begin, end - begin), data_ + begin, end - begin);
    });
  }

 private:
  void add_floats(const Messages& messages, float* to, int64_t begin, int64_t end, Range features) const {
    const int64_t count = messages.rows.size(), *const rows = messages.rows.at(0, count);
    for (int64_t k = 0; k < count; ++k)
      if (rows[k] >= begin && rows[k] < end)
        add_row(
            messages.data.at(k * messages.ld + features.begin, features.size()),
            to + rows[k] * features_ + features.begin, features.size());
  }

  // The first message to a row takes the sum of all of them.
  void add_rounded(const Messages& messages, int64_t begin, int64_t end, Range features) const {
    const int64_t count = messages.rows.size(), *const rows = messages.rows.at(0, count);
    const auto message = [&](int64_t k) { return messages.data.at(k * messages.ld + features.begin, features.size()); };
    const Scratch<int64_t> first(end - begin);
    first.span().fill(-1);
    for (int64_t k = 0; k < count; ++k) {
      if (rows[k] < begin || rows[k] >= end) continue;
      int64_t& sum = *first.at(rows[k] - begin, 1);
      if (sum < 0) sum = k;
      else add_row(message(k), message(sum), features.size());
    }
    for (int64_t row = begin; row < end; ++row)
      if (const int64_t k = *first.at(row - begin, 1); k >= 0)
        add_row(message(k), data_ + row * features_ + features.begin, features.size());
  }

  S* data_ = nullptr;
  int64_t rows_ = 0, features_ = 0;
  Scratch<float> copy_;
};

// out[target[e]] += rows[source[e]] for the E terms, in their order, where a missing index is the identity. Rows of
// both matrices are `ld_out` and `ld` apart. Sums are in float32.
template <class D, class S>
void sum_rows(
    D* out, int64_t ld_out, int64_t out_rows, const S* rows, int64_t ld, int64_t features, int64_t E,
    const int64_t* source, const int64_t* target, int64_t workspace) {
  const int64_t room = workspace / 4 / int64_t(sizeof(float)) / at::get_num_threads();
  for_slices(out_rows, features, double(E) * features, [&](int64_t begin, int64_t end, Range own) {
    const int64_t width = own.size();
    const Scratch<float> row(width);
    // Sums in float32: in place, or for a few rows of the result at a time.
    const int64_t most = std::is_same_v<D, float> ? end - begin : std::clamp<int64_t>(room / width, 1, end - begin);
    const Scratch<float> sums(std::is_same_v<D, float> ? 0 : most * width);
    for (int64_t first = begin; first < end; first += most) {
      const int64_t last = std::min(end, first + most);
      D* const to = out + first * ld_out + own.begin;
      if (sums) pack(to, ld_out, 1, sums.at(0, (last - first) * width), width, last - first, width);
      for (int64_t e = 0; e < E; ++e) {
        const int64_t t = (target ? target[e] : e) - first;
        if (t < 0 || t >= last - first) continue;
        const S* const from = rows + (source ? source[e] : e) * ld + own.begin;
        const float* floats;
        if constexpr (std::is_same_v<S, float>) floats = from;
        else convert(from, row.at(0, width), width), floats = row.at(0, width);
        if constexpr (std::is_same_v<D, float>) add_row(floats, to + t * ld_out, width);
        else add_row(floats, sums.at(t * width, width), width);
      }
      if (sums) pack((const float*)sums.at(0, (last - first) * width), width, 1, to, ld_out, last - first, width);
    }
  });
}

}  // namespace fasthyper
