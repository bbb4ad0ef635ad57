// The products of one piece of an incidence sum, in registers. Its terms k have rows u[k] and v[k] in float32; a slab
// of A or M has rows q, each of `n` registers of c.
//
//   gather_outer    A[q,c] = Σ_k u[k,q] v[k,c]
//   spread_rows     out_v[k,c] (+)= Σ_q u[k,q] M[q,c]
//   spread_dots     out_u[k,q] = Σ_c M[q,c] v[k,c]
#pragma once

#include <utility>

#include "incidence.h"

namespace fasthyper {

constexpr int64_t TERM_VECS = 2;  // registers of c at the same time
constexpr int64_t OUTER_Q = 4;    // q at the same time: 4 × 2 sums hide the latency of an addition
constexpr int64_t SPREAD_TERMS = 6;
constexpr int64_t DOT_TERMS = 2;
constexpr int64_t DOTS = 4;  // q of one `spread_dots`

// Rows in scratch memory, `ld` apart.
template <class F>
struct Strip {
  F* data;
  int64_t ld;
};

// Calls f with `n` as a constant, 1 ≤ n ≤ Most.
template <int Most, class F>
[[gnu::always_inline]] inline void with_count(int64_t n, F&& f) {
  if constexpr (Most > 1)
    if (n < Most) return with_count<Most - 1>(n, f);
  f(std::integral_constant<int, Most>{});
}

template <int Q, int V>
inline void outer_tile(
    const float* u, int64_t ld_u, const float* v, int64_t ld_v, int64_t terms, float* a, int64_t ld_a) {
  Vec sum[Q][V] = {};
  for (int64_t k = 0; k < terms; ++k, u += ld_u, v += ld_v)
    for (int j = 0; j < V; ++j) {
      const Vec x = load<Vec>(v + j * WIDTH);
      for (int q = 0; q < Q; ++q) sum[q][j] += u[q] * x;
    }
  for (int q = 0; q < Q; ++q)
    for (int j = 0; j < V; ++j) store(a + q * ld_a + j * WIDTH, sum[q][j]);
}

// A[q,c] = Σ_k u[k,q] v[k,c] for `qs` rows of A, which are n registers each.
inline void gather_outer(Strip<const float> u, Strip<const float> v, int64_t terms, int64_t qs, int64_t n, float* a) {
  for (int64_t j = 0; j < n; j += TERM_VECS)
    with_count<TERM_VECS>(std::min(TERM_VECS, n - j), [&](auto vecs) {
      constexpr int V = decltype(vecs)::value;
      const float* const from = v.data + j * WIDTH;
      float* const to = a + j * WIDTH;
      int64_t q = 0;
      for (; q + OUTER_Q <= qs; q += OUTER_Q)
        outer_tile<OUTER_Q, V>(u.data + q, u.ld, from, v.ld, terms, to + q * n * WIDTH, n * WIDTH);
      if (q < qs)
        with_count<OUTER_Q>(qs - q, [&](auto count) {
          outer_tile<decltype(count)::value, V>(u.data + q, u.ld, from, v.ld, terms, to + q * n * WIDTH, n * WIDTH);
        });
    });
}

template <int K, int V>
inline void rows_tile(
    const float* u, int64_t ld_u, const float* m, int64_t ld_m, int64_t qs, float* out, int64_t ld_out, bool add) {
  Vec sum[K][V] = {};
  if (add)
    for (int k = 0; k < K; ++k)
      for (int j = 0; j < V; ++j) sum[k][j] = load<Vec>(out + k * ld_out + j * WIDTH);
  for (int64_t q = 0; q < qs; ++q, m += ld_m)
    for (int j = 0; j < V; ++j) {
      const Vec x = load<Vec>(m + j * WIDTH);
      for (int k = 0; k < K; ++k) sum[k][j] += u[k * ld_u + q] * x;
    }
  for (int k = 0; k < K; ++k)
    for (int j = 0; j < V; ++j) store(out + k * ld_out + j * WIDTH, sum[k][j]);
}

// out[k,c] (+)= Σ_q u[k,q] M[q,c]
inline void spread_rows(
    Strip<const float> u, const float* m, int64_t terms, int64_t qs, int64_t n, Strip<float> out, bool add) {
  const int64_t steps = ceil_div(terms, SPREAD_TERMS), each = ceil_div(terms, steps);
  for (int64_t j = 0; j < n; j += TERM_VECS)
    with_count<TERM_VECS>(std::min(TERM_VECS, n - j), [&](auto vecs) {
      constexpr int V = decltype(vecs)::value;
      for (int64_t k = 0; k < terms; k += each)
        with_count<SPREAD_TERMS>(std::min(each, terms - k), [&](auto count) {
          rows_tile<decltype(count)::value, V>(
              u.data + k * u.ld, u.ld, m + j * WIDTH, n * WIDTH, qs, out.data + k * out.ld + j * WIDTH, out.ld, add);
        });
    });
}

typedef float Vec4 __attribute__((vector_size(4 * sizeof(float))));

// Of each four lanes of a and of b: the first two (second = 0) or the last two, alternating.
template <int second, size_t... L>
inline Vec alternate(Vec a, Vec b, std::index_sequence<L...>) {
  return __builtin_shufflevector(a, b, int(L / 4 * 4 + 2 * second + L % 4 / 2 + (L % 2 ? WIDTH : 0))...);
}

// Of each four lanes: two of a, then two of b, the first (second = 0) or the last two.
template <int second, size_t... L>
inline Vec halves(Vec a, Vec b, std::index_sequence<L...>) {
  return __builtin_shufflevector(a, b, int(L / 4 * 4 + 2 * second + L % 2 + (L % 4 / 2 ? WIDTH : 0))...);
}

// The sums of the lanes of four registers.
inline Vec4 sums_of_lanes(const Vec (&v)[DOTS]) {
  constexpr auto lanes = std::make_index_sequence<size_t(WIDTH)>{};
  const Vec a = alternate<0>(v[0], v[1], lanes) + alternate<1>(v[0], v[1], lanes);
  const Vec b = alternate<0>(v[2], v[3], lanes) + alternate<1>(v[2], v[3], lanes);
  const Vec fours = halves<0>(a, b, lanes) + halves<1>(a, b, lanes);
  Vec4 part[WIDTH / 4];
  std::memcpy(part, &fours, sizeof fours);
  for (int64_t step = WIDTH / 8; step > 0; step /= 2)
    for (int64_t k = 0; k < step; ++k) part[k] += part[k + step];
  return part[0];
}

template <int K, int Q>
inline void dots_tile(
    const float* m, int64_t ld_m, const float* v, int64_t ld_v, int64_t n, float* out, int64_t ld_out) {
  Vec sum[K][DOTS] = {};
  for (int64_t c = 0; c < n * WIDTH; c += WIDTH) {
    Vec a[Q];
    for (int q = 0; q < Q; ++q) a[q] = load<Vec>(m + q * ld_m + c);
    for (int k = 0; k < K; ++k) {
      const Vec x = load<Vec>(v + k * ld_v + c);
      for (int q = 0; q < Q; ++q) sum[k][q] += a[q] * x;
    }
  }
  for (int k = 0; k < K; ++k) store(out + k * ld_out, sums_of_lanes(sum[k]));
}

// out[k,q] = Σ_c M[q,c] v[k,c]. Rows of `out` have room for whole multiples of DOTS.
inline void spread_dots(const float* m, Strip<const float> v, int64_t terms, int64_t qs, int64_t n, Strip<float> out) {
  for (int64_t q = 0; q < qs; q += DOTS)
    with_count<DOTS>(std::min(DOTS, qs - q), [&](auto columns) {
      constexpr int Q = decltype(columns)::value;
      for (int64_t k = 0; k < terms; k += DOT_TERMS)
        with_count<DOT_TERMS>(std::min(DOT_TERMS, terms - k), [&](auto count) {
          dots_tile<decltype(count)::value, Q>(
              m + q * n * WIDTH, n * WIDTH, v.data + k * v.ld, v.ld, n, out.data + k * out.ld + q, out.ld);
        });
    });
}

// to[k] = row rows[k] of t in float32, with zeros up to `ld`; a row of -1 is zero.
template <class S>
void gather_rows(const Rows<const S>& t, const int64_t* rows, int64_t count, Span<float> to, int64_t ld) {
  constexpr int64_t AHEAD = 4;  // rows in any order: the hardware does not prefetch them
  for (int64_t k = 0; k < count; ++k) {
    float* const row = to.at(k * ld, ld);
    const int64_t filled = rows[k] < 0 ? 0 : t.features;
    if (t.feature == 1) {
      if (k + AHEAD < count && rows[k + AHEAD] >= 0)
        for (int64_t f = 0; f < t.features; f += LINE * K_STEP<S>) __builtin_prefetch(t.row(rows[k + AHEAD]) + f);
      if (filled) convert(t.row(rows[k]), row, filled);
    } else if (filled) {
      const S* const from = t.row(rows[k]);
      for (int64_t f = 0; f < filled; ++f) row[f] = from[f * t.feature];
    }
    for (int64_t f = filled; f < ld; ++f) row[f] = 0.f;
  }
}

}  // namespace fasthyper
