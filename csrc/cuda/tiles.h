// Tiles in shared memory: rows of 128 bytes, four k-steps. Their 16-byte chunks are swizzled, so that reading one
// column of eight rows has no bank conflicts.
#pragma once
#include <cstdint>

#include "instructions.h"
#include "numbers.h"
#include "views.h"

namespace fasthyper {

// Return the offset of a chunk of a row.
INLINE int swizzled(int row, int chunk) { return row * ROW_BYTES + ((chunk ^ (row & 7)) << 4); }

template <class T, int WIDTH, class SpanAt>
DEVICE void copy_tile(char* tile, int rows, int steps, int rank, int threads, SpanAt span_at) {
  constexpr int units = 32 / WIDTH;  // of a k-step
#pragma unroll 1
  for (int k = rank; k < rows * steps * units; k += threads) {
    const int unit = k % units, at = k / units, step = at % steps, row = at / steps;
    const Span<T> from = span_at(row, step);
    const int byte = unit * WIDTH, left = from.count * static_cast<int>(sizeof(T)) - byte;
    char* const to = tile + swizzled(row, 2 * step + byte / 16) + byte % 16;
    const int valid = left < 0 ? 0 : least(left, WIDTH);
    cp_async<WIDTH>(to, valid ? reinterpret_cast<const char*>(from.first) + byte : nullptr, valid);
  }
}

// Load a tile. span_at(row, step) returns the span that begins with a k-step of a row; its elements are `stride` apart.
// Contiguous copies of four bytes or more are asynchronous: they need a commit and a wait.
template <class T, class SpanAt>
DEVICE void load_tile(
    char* tile, int rows, int steps, int width, int64_t stride, int rank, int threads, SpanAt span_at) {
  if (width == 16) return copy_tile<T, 16>(tile, rows, steps, rank, threads, span_at);
  if (width >= 4 && stride == 1) return copy_tile<T, 4>(tile, rows, steps, rank, threads, span_at);
#pragma unroll 1
  for (int k = rank; k < rows * steps * per_step<T>; k += threads) {
    const int column = k % per_step<T>, at = k / per_step<T>, step = at % steps, row = at / steps;
    const Span<T> from = span_at(row, step);
    const int byte = column * static_cast<int>(sizeof(T));
    *reinterpret_cast<T*>(tile + swizzled(row, 2 * step + byte / 16) + byte % 16) =
        column < from.count ? from.first[column * stride] : T(0.f);
  }
}

// The k-th 16-byte chunk of a tile that a thread copies. It is the same chunk in every tile, so its address is computed
// only once.
template <class T, int THREADS>
struct CopySlot {
  static constexpr int ELEMENTS = 16 / sizeof(T);
  int row, chunk, offset;

  DEVICE explicit CopySlot(int k)
      : row((thread() + k * THREADS) / 8), chunk(thread() % 8), offset(swizzled(row, thread() % 8)) {}
  DEVICE int step() const { return chunk / 2; }
  DEVICE int column() const { return chunk % 2 * ELEMENTS; }  // in its k-step
  // Copy `count` elements that begin at `from`, at most a chunk, and fill the rest with zeros.
  DEVICE void copy(char* tile, const T* from, int count) const {
    cp_async<16>(tile + offset, from, count <= 0 ? 0 : least(count, ELEMENTS) * static_cast<int>(sizeof(T)));
  }
};

// Load the fragment of one k-step. A left fragment has 16 rows. A right fragment has 16 columns: words 0 and 1 are of
// the first eight columns, words 2 and 3 of the others. The rows of the tile are rows of the left or columns of the
// right operand.
DEVICE void load_left_fragment(uint32_t (&w)[4], const char* tile, int row0, int step, int lane) {
  ldmatrix(w, tile + swizzled(row0 + lane % 16, 2 * step + lane / 16));
}
DEVICE void load_right_fragment(uint32_t (&w)[4], const char* tile, int row0, int step, int lane) {
  ldmatrix(w, tile + swizzled(row0 + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
}

// Load a fragment of a tile whose rows are k, the summed axis: rows from k0 on, columns j0 to j0 + 15 of the tile.
template <class T>
DEVICE uint32_t swizzled_word(const char* tile, int row, int column) {
  return *reinterpret_cast<const uint32_t*>(tile + swizzled(row, column / 4) + column % 4 * 4);
}
template <class T>
DEVICE void load_left_fragment_transposed(uint32_t (&w)[4], const char* tile, int k0, int j0, int lane) {
  if constexpr (per_word<T> == 2)
    ldmatrix_trans(w, tile + swizzled(k0 + lane / 16 * 8 + lane % 8, j0 / 8 + lane / 8 % 2));
  else
    for (int q = 0; q < 4; ++q)
      w[q] = swizzled_word<T>(tile, k0 + lane % 4 + 4 * (q >> 1), j0 + lane / 4 + 8 * (q & 1));
}
template <class T>
DEVICE void load_right_fragment_transposed(uint32_t (&w)[4], const char* tile, int k0, int j0, int lane) {
  if constexpr (per_word<T> == 2) ldmatrix_trans(w, tile + swizzled(k0 + lane % 16, j0 / 8 + lane / 16));
  else
    for (int q = 0; q < 4; ++q)
      w[q] = swizzled_word<T>(tile, k0 + lane % 4 + 4 * (q & 1), j0 + lane / 4 + 8 * (q >> 1));
}

}  // namespace fasthyper
