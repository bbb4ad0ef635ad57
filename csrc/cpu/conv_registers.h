// Sums over taps, in registers. Cells p are side by side in registers, so a tap of several outputs reads one register
// of a plane and one weight for each output:
//
//   add_taps    out[k][p] = (out[k][p] or init[k]) + Σ_t w[k,t] plane[offset[t] + p]
//   dot_taps    dw[k,t] (+)= Σ_p g[k][p] plane[offset[t] + p]
#pragma once

#include <utility>

#include "pack.h"
#include "scratch.h"

namespace fasthyper {

// Outputs that share the registers of a plane, and registers of p for each: their product fills the register file.
constexpr int OUTPUTS = 4;
constexpr int registers_of(int outputs) { return outputs == 1 ? 8 : 12 / outputs; }

// Weights w[k,t] at data + k·output + t·tap.
struct TapWeights {
  const float* data;
  int64_t output, tap;
};

struct TapSum {
  const int64_t* offsets;
  int64_t taps;
  const float* plane;
  TapWeights w;
  float* out;
  int64_t ld;         // of outputs
  const float* init;  // of every output; null: added to `out`
};

template <int K, int R, int64_t TAP>
inline void add_taps_at(const TapSum& s, int64_t p) {
  Vec sum[K][R];
  for (int k = 0; k < K; ++k)
    for (int r = 0; r < R; ++r) sum[k][r] = s.init ? Vec{} + s.init[k] : load<Vec>(s.out + k * s.ld + p + r * WIDTH);
  const float* w[K];
  for (int k = 0; k < K; ++k) w[k] = s.w.data + k * s.w.output;
  const float* const plane = s.plane + p;
  for (int64_t t = 0; t < s.taps; ++t) {
    const float* const from = plane + s.offsets[t];
    if constexpr (K == 1) {  // each register of the plane has one use: it needs no name
      const Vec weight = Vec{} + w[0][t * TAP];
      for (int r = 0; r < R; ++r) sum[0][r] += load<Vec>(from + r * WIDTH) * weight;
      continue;
    }
    Vec x[R];
    for (int r = 0; r < R; ++r) x[r] = load<Vec>(from + r * WIDTH);
    for (int k = 0; k < K; ++k) {
      const float weight = w[k][t * TAP];
      for (int r = 0; r < R; ++r) sum[k][r] += x[r] * weight;
    }
  }
  for (int k = 0; k < K; ++k)
    for (int r = 0; r < R; ++r) store(s.out + k * s.ld + p + r * WIDTH, sum[k][r]);
}

template <int K, int R, int64_t TAP>
inline void add_taps_from(const TapSum& s, int64_t p, int64_t end) {
  for (; p + R * WIDTH <= end; p += R * WIDTH) add_taps_at<K, R, TAP>(s, p);
  if constexpr (R > 1)
    if (p < end) add_taps_from<K, (R + 1) / 2, TAP>(s, p, end);
}

// For K outputs and cells 0 to n, a multiple of WIDTH. TAP is the stride of taps.
template <int K, int64_t TAP>
void add_taps(const TapSum& s, int64_t n) {
  add_taps_from<K, registers_of(K), TAP>(s, 0, n);
}

// Adds the halves of groups of 2·LANE numbers, of a and then of b.
template <int LANE, size_t... L>
inline Vec add_halves(Vec a, Vec b, std::index_sequence<L...>) {
  return __builtin_shufflevector(a, b, int(L / LANE * 2 * LANE + L % LANE)...) +
         __builtin_shufflevector(a, b, int(L / LANE * 2 * LANE + LANE + L % LANE)...);
}

// Partial sums of WIDTH / LANE registers, each in LANE numbers. With LANE = 1, number k is the sum of register k.
template <int LANE>
inline Vec partial_sums(const Vec* from) {
  if constexpr (LANE == WIDTH) {
    return from[0];
  } else {
    const Vec a = partial_sums<2 * LANE>(from), b = partial_sums<2 * LANE>(from + WIDTH / (2 * LANE));
    return add_halves<LANE>(a, b, std::make_index_sequence<WIDTH>());
  }
}

struct TapDot {
  const int64_t* offsets;
  const float* plane;
  const float* g;
  int64_t ld;  // of outputs in g
  int64_t n;   // cells, a multiple of WIDTH
  float* dw;
  int64_t output;  // stride of dw; taps are contiguous
  bool add;
};

template <int K, int T>
inline void dot_taps(const TapDot& s) {
  constexpr int PADDED = (K * T + WIDTH - 1) / WIDTH * WIDTH;
  Vec sum[PADDED] = {};
  const float* planes[T];
  for (int t = 0; t < T; ++t) planes[t] = s.plane + s.offsets[t];
  for (int64_t p = 0; p < s.n; p += WIDTH) {
    Vec g[K];
    for (int k = 0; k < K; ++k) g[k] = load<Vec>(s.g + k * s.ld + p);
    for (int t = 0; t < T; ++t) {
      const Vec x = load<Vec>(planes[t] + p);
      for (int k = 0; k < K; ++k) sum[k * T + t] += g[k] * x;
    }
  }
  float total[PADDED];
  for (int j = 0; j < PADDED; j += WIDTH) store(total + j, partial_sums<1>(sum + j));
  for (int k = 0; k < K; ++k)
    for (int t = 0; t < T; ++t) {
      float& to = s.dw[k * s.output + t];
      to = s.add ? to + total[k * T + t] : total[k * T + t];
    }
}

}  // namespace fasthyper
