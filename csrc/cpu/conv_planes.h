// Planes: contiguous copies of channels of an image, with zeros around them, and the numbers of a phase side by side.
// A row of a plane has `row` cells. Sums over cells run through several rows at once: cells at the end of a row of p
// are computed, but not used.
#pragma once

#include "conv.h"
#include "pack.h"
#include "scratch.h"

namespace fasthyper {

// Images (instances, channels, rows, columns) with any strides.
template <class S>
struct Images {
  S* data;
  int64_t instance, channel, row, column;  // strides
  int64_t channels, rows, columns;         // sizes
};

// The numbers of an image that are cells of a plane: `rows` × `columns` of them, from cell `first` on.
template <class S>
struct Window {
  S* data;
  int64_t row, column;  // strides
  int64_t rows, columns, first;

  Window(const Images<S>& t, int64_t b, int64_t c, const Cells& k, const Cells& l, int64_t plane_row) {
    const int64_t k0 = k.first(), l0 = l.first();
    rows = k.last(t.rows) - k0, columns = l.last(t.columns) - l0;
    row = k.step * t.row, column = l.step * t.column;
    first = k0 * plane_row + l0;
    if (rows <= 0 || columns <= 0) {
      rows = 0;
      return;
    }
    data = t.data + b * t.instance + c * t.channel + k.number(k0) * t.row + l.number(l0) * t.column;
    if (columns == plane_row && row == columns * column) columns *= rows, rows = 1;  // one long row
  }
};

// Copies n floats, W or fewer at a time; the last ones may overlap those before them. Most rows are short.
template <int64_t W = WIDTH>
inline void copy_row(const float* src, float* dst, int64_t n) {
  if constexpr (W > 1)
    if (n < W) return copy_row<W / 2>(src, dst, n);
  if (n == 0) return;
  for (int64_t i = 0; i + W < n; i += W) std::memcpy(dst + i, src + i, W * sizeof(float));
  std::memcpy(dst + n - W, src + n - W, W * sizeof(float));
}

// dst[i·to] = src[i·from].
inline void copy_row(const float* src, int64_t from, float* dst, int64_t to, int64_t n) {
  if (from == 1 && to == 1) return copy_row(src, dst, n);
  for (int64_t i = 0; i < n; ++i) dst[i * to] = src[i * from];
}

// Fills planes[c][k·row + l] with cells (k, l) of channel c0 + c; channels are `ld` apart.
inline void load_planes(
    const Images<const float>& t, int64_t b, int64_t c0, int64_t channels, const Cells& k, const Cells& l,
    Span<float> planes, int64_t ld, int64_t row) {
  const Window<const float> w(t, b, c0, k, l, row);
  for (int64_t c = 0; c < channels; ++c)
    if (w.rows * w.columns < k.count * row) std::fill_n(planes.at(c * ld, k.count * row), k.count * row, 0.f);
  if (w.rows == 0) return;
  if (t.channel == 1 && channels > 1) {
    const int64_t room = w.rows == 1 ? w.columns : row - l.first();  // zeros may be written to the end of a row
    for (int64_t i = 0; i < w.rows; ++i)
      pack(
          w.data + i * w.row, 1, w.column, planes.at(w.first + i * row, (channels - 1) * ld + room), ld, channels,
          w.columns, room);
    return;
  }
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = 0; i < w.rows; ++i)
      copy_row(
          w.data + c * t.channel + i * w.row, w.column, planes.at(c * ld + w.first + i * row, w.columns), 1, w.columns);
}

// The inverse of load_planes: writes all numbers of the image that are cells.
inline void store_planes(
    Span<const float> planes, int64_t ld, int64_t row, const Images<float>& t, int64_t b, int64_t c0, int64_t channels,
    const Cells& k, const Cells& l) {
  const Window<float> w(t, b, c0, k, l, row);
  if (w.rows == 0) return;
  if (t.channel == 1 && channels > 1) {
    for (int64_t i = 0; i < w.rows; ++i)
      pack(
          planes.at(w.first + i * row, (channels - 1) * ld + w.columns), 1, ld, w.data + i * w.row, w.column, w.columns,
          channels);
    return;
  }
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = 0; i < w.rows; ++i)
      copy_row(
          planes.at(c * ld + w.first + i * row, w.columns), 1, w.data + c * t.channel + i * w.row, w.column, w.columns);
}

// Fills cells[k·row + l][c], `ld` apart, with cells (k, l) of channel c0 + c.
inline void load_cells(
    const Images<const float>& t, int64_t b, int64_t c0, int64_t channels, const Cells& k, const Cells& l,
    Span<float> cells, int64_t ld, int64_t row) {
  const Window<const float> w(t, b, c0, k, l, row);
  const int64_t numbers = k.count * row * ld;
  if (w.rows * w.columns < k.count * row || channels < ld) std::fill_n(cells.at(0, numbers), numbers, 0.f);
  for (int64_t i = 0; i < w.rows; ++i)
    pack(
        w.data + i * w.row, w.column, t.channel, cells.at((w.first + i * row) * ld, extent(w.columns, ld, ld)), ld,
        w.columns, channels, ld);
}

}  // namespace fasthyper
