// `generate` for instances with many points: W is written to memory, in chunks that stay in cache.
//
//   W[b,o,i] = Σ_r H[o,i,r] z[b,r] + base[o,i]     y[b] = x[b] W[b]ᵀ + bias z[b] + base_bias     dx[b] = g[b] W[b]
//
// Two parallel regions alternate: one computes a chunk of W for a group of instances, the other applies it. W is stored
// as right operands of T: if products are computed in bfloat16, W is rounded to it, as in torch. All sums are float32.
// Splits of sums depend only on sizes, so that results do not depend on the number of threads.
#pragma once

#include <atomic>

#include "rows.h"

namespace fasthyper {

constexpr int64_t PANEL = LANES;                                    // columns of a right operand
constexpr int64_t GROUP_INSTANCES = tile_size(128, LANES);          // instances of one unit that generates W
constexpr int64_t GENERATED_ROWS = tile_size(512, 2 * PANEL);       // rows (o, i) of H in such a unit
constexpr int64_t GENERATED_PACKED = tile_size(1 << 15);            // numbers of these rows that are packed at a time
constexpr int64_t LEAST_DEPTH = GENERATED_PACKED / GENERATED_ROWS;  // of a packed row
constexpr int64_t PACKED_ROOM = GENERATED_PACKED + 2 * LINE * GENERATED_ROWS;  // with the padding of packed_ld

static_assert(
    PANEL % SQUARE == 0 && GROUP_INSTANCES % LANES == 0 && GENERATED_ROWS % (2 * PANEL) == 0 &&
    LEAST_DEPTH % SQUARE == 0);

// A span of floats as a span of T.
template <class T>
Span<T> view_as(Span<float> floats) {
  return {reinterpret_cast<T*>(floats.at(0, floats.size())), floats.size() * K_STEP<T>};
}

// Calls f(unit, scratch) for all units, with `floats` of scratch memory. A free thread takes the next unit; `flops` and
// the workspace limit the number of threads.
template <class T, class F>
void for_units(int64_t units, double flops, int64_t floats, int64_t workspace, F&& f) {
  const int64_t fit = workspace / 4 / (floats * int64_t(sizeof(float)));
  const int64_t threads = std::min({int64_t(at::get_num_threads()), units, fit, to_count(flops / (THREAD_WORK / 2))});
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::max<int64_t>(1, threads), 1, [&](int64_t, int64_t) {
    const Scratch<float> scratch(floats);
    for (int64_t unit; (unit = next++) < units;) f(unit, scratch.span());
    release_matrix_unit<T>();
  });
}

// Floats of a chunk of W or dW.
inline int64_t chunk_floats(int64_t workspace) {
  return std::clamp<int64_t>(workspace / 16, tile_size(1 << 16), 1 << 21);
}

// Turns pairs of rows q of t, each of `width` floats, into rows of 16-bit right operands, in place.
inline void pair_rows(float* t, int64_t tp, int64_t tq, int64_t p, int64_t q, int64_t width) {
  for (int64_t l = 0; l < q; l += 2)
    for (int64_t k = 0; k < p; ++k) {
      const float* const row = t + l * tq + k * tp;
      interleave(row, l + 1 < q ? row + tq : nullptr, reinterpret_cast<BFloat16*>(t + l / 2 * tq + k * tp), width);
    }
}

// w[b·ld_b + q·ld_q + p] = Σ_c h[p,q,c] z[c,b] + base[p,q], where h and base may be null. w holds rows q of right
// operands of T, or of floats if not Paired, for `lanes` instances; z holds right operands, one for each block of
// lanes. `t` has GENERATED_ROWS · GROUP_INSTANCES floats, `packed` has PACKED_ROOM numbers.
template <class S, class T, bool Paired = true>
void generate(
    const Head<S>& h, const Matrix<S>& base, const Group& group, Span<const T> z, Span<float> w, int64_t lanes,
    int64_t ld_b, int64_t ld_q, Span<float> t, Span<T> packed) {
  const bool inner_p = h.sp < h.sq || h.q == 1;  // whether p has the smaller stride
  int64_t rows = inner_p ? h.p : h.q, runs = inner_p ? h.q : h.p;
  const int64_t stride = inner_p ? h.sp : h.sq, next = inner_p ? h.sq : h.sp, each = h.p * h.q * LANES;
  const int64_t tp = (inner_p ? 1 : h.q) * LANES, tq = (inner_p ? h.p : 1) * LANES, depth_z = round_k<T>(h.c);
  if (base.data)
    for (int64_t p = 0; p < h.p; ++p)
      for (int64_t q = 0; q < h.q; ++q)
        for (int64_t k = 0; k < group.blocks; ++k)
          t.subspan(k * each + p * tp + q * tq, LANES).fill(float(base.data[p * base.s0 + q * base.s1]));
  if (next == rows * stride) rows *= runs, runs = 1;
  const int64_t depth = readable_in_place<S, T>(h.sc, h.c)
                            ? h.c
                            : std::min(h.c, std::max(LEAST_DEPTH, GENERATED_PACKED / rows / SQUARE * SQUARE));
  for (int64_t run = 0; h.data && run < runs; ++run)
    for (int64_t c = 0; c < h.c; c += depth) {
      const int64_t cs = std::min(depth, h.c - c);
      if (run + 1 < runs && c == 0)  // a product reads several rows at a time, more than the hardware prefetches
        for (int64_t k = 0; k < rows; ++k)
          for (int64_t l = 0; l < h.c; l += LINE) __builtin_prefetch(h.data + (run + 1) * next + k * stride + l);
      const auto a = left_operand<S, T>(h.data + run * next + c * h.sc, stride, h.sc, rows, cs, packed);
      for (int64_t k = 0; k < group.blocks; ++k)
        gemm(
            rows, group.lanes_in(k), cs, a.data, a.ld, z.at((k * depth_z + c) * LANES, round_k<T>(cs) * LANES), LANES,
            t.at(k * each + run * rows * LANES, rows * LANES), LANES, base.data || c > 0);
    }
  constexpr bool pairs = Paired && !std::is_same_v<T, float>;
  const int64_t qs = pairs ? floats_for<T>(h.q) : h.q;
  for (int64_t k = 0; k < group.blocks; ++k) {
    float* const made = t.at(k * each, each);
    const int64_t width = std::min(group.lanes_in(k), lanes - k * LANES), room = whole_squares(h.p);
    if constexpr (pairs) pair_rows(made, tp, tq, h.p, h.q, width);
    for (int64_t q = 0; q < qs; ++q)
      transpose(
          made + q * tq, tp, w.at(k * LANES * ld_b + q * ld_q, extent(width, ld_b, room)), ld_b, h.p, width, room);
  }
}

// Stores rows of an output: the first `width` of the ld numbers in each row of `src`.
template <class S>
void store_rows(const float* src, int64_t ld, S* dst, int64_t ld_dst, int64_t rows, int64_t width) {
  if constexpr (std::is_same_v<S, float>)  // whole registers: the next row overwrites the excess
    for (; ld_dst == width && rows * width >= ld; --rows, src += ld, dst += ld_dst)
      for (int64_t l = 0; l < ld; l += SQUARE) store(dst + l, load<Vec8>(src + l));
  pack(src, ld, 1, dst, ld_dst, rows, width);
}

// Loads z of a group as right operands, one for each block of lanes.
template <class S, class T>
void load_z(const Factors<S>& f, const Group& group, int64_t b0, Span<T> z) {
  const Rows<const S> rows{f.z.data, f.z.instance, 0, f.z.feature, 1, f.R};
  const int64_t each = round_k<T>(f.R) * LANES;
  const Scratch<float> lanes(std::is_same_v<T, float> ? 0 : f.R * LANES);
  for (int64_t k = 0; k < group.blocks; ++k) {
    const int64_t q0 = b0 + k * LANES, q1 = q0 + group.rows_in(k);
    const auto to = z.subspan(k * each, each);
    if constexpr (std::is_same_v<T, float>) load_lanes<S, float>(rows, q0, q1, to);
    else load_lanes<S, float>(rows, q0, q1, lanes), right_operand(lanes.at(0, f.R * LANES), to, f.R, LANES);
  }
}

// The division of W into chunks: `each` instances, and `at_once` panels of P columns. A panel of one instance takes
// `pitch` floats. A chunk has room for `lanes` instances, in whole registers.
struct Chunks {
  int64_t P, panels, pitch, each, at_once, lanes;

  // A panel has K rows of floats. Each group reads all of H, and each chunk reads x again: the number of instances
  // minimises these reads.
  template <class S>
  Chunks(const Factors<S>& f, int64_t K, int64_t room) {
    P = std::min(SQUARE * K * PANEL > room ? SQUARE : PANEL, whole_squares(f.O));
    panels = ceil_div(f.O, P);
    pitch = packed_ld(K * P);
    each = 0, at_once = 1;
    double least = 0;
    for (int64_t count = f.B; !each || count > SQUARE; count = round_up(count, 2 * SQUARE) / 2) {
      const int64_t fit = std::min(panels, room / (whole_squares(count) * pitch)),
                    steps = ceil_div(panels, std::max<int64_t>(1, fit));
      const double reads = double(f.O * f.I) * f.R * ceil_div(f.B, count) + double(f.B * f.N) * f.I * steps;
      const bool fits = fit > 0 && count * f.R <= room / 4;
      if ((fits || count <= SQUARE) && (!each || reads < least))
        each = count, least = reads, at_once = ceil_div(panels, steps);
    }
    const int64_t groups = ceil_div(f.B, each);
    if (groups > 1) each = whole_squares(ceil_div(f.B, groups));
    while (each > 1 && each * pitch > 2 * room) each = ceil_div(each, 2);  // a very wide panel
    lanes = each < WIDTH ? each : whole_registers(each);
  }
};

// y of all points.
template <class S, class T>
void apply_many_points(
    const Factors<S>& f, const S* base_bias, int64_t base_bias_stride, Rows<S> y, int64_t workspace) {
  const bool shifted = f.bias.data || base_bias;  // bias z + base_bias is a last row of W, in floats
  const int64_t K = floats_for<T>(f.I);
  const Chunks cut(f, K + shifted, chunk_floats(workspace));
  const int64_t P = cut.P, pitch = cut.pitch, each = cut.each, at_once = cut.at_once, depth_z = round_k<T>(f.R);
  const int64_t lanes = cut.lanes;
  const Scratch<float> w(at_once * lanes * pitch);
  const Scratch<T> z(whole_lanes(each) * depth_z);
  // Units divide H along its slower axis, so that each unit has contiguous rows.
  const int64_t ow = f.so < f.si ? P : SQUARE, iw = std::min(f.I, GENERATED_ROWS / ow / K_STEP<T> * K_STEP<T>);
  const int64_t o_units = ceil_div(P, ow), i_units = ceil_div(f.I, iw) + shifted;
  const bool direct = std::is_same_v<S, float> && f.O >= P;
  const bool read = readable_in_place<S, T>(f.x.feature, f.I);
  const int64_t rows = std::min(f.N, read ? 256 : std::clamp<int64_t>((1 << 16) / f.I, 1, 256)),
                n_units = ceil_div(f.N, rows), x_numbers = read ? 0 : rows * packed_ld(f.I);
  for (int64_t b0 = 0; b0 < f.B; b0 += each) {
    const Group group(std::min(each, f.B - b0));
    load_z<S, T>(f, group, b0, z);
    for (int64_t p0 = 0; p0 < cut.panels; p0 += at_once) {
      const int64_t ps = std::min(at_once, cut.panels - p0);
      const auto panel = [&](int64_t p) { return Range{(p0 + p) * P, std::min(f.O, (p0 + p + 1) * P)}; };
      const double flops = 2. * group.rows * ps * P * f.I;
      const int64_t b_units = ceil_div(group.rows, GROUP_INSTANCES), h_units = o_units * i_units * b_units;
      const int64_t t_floats = GENERATED_ROWS * GROUP_INSTANCES;
      for_units<T>(
          ps * h_units, flops * f.R, t_floats + floats_for<T>(PACKED_ROOM), workspace, [&](int64_t unit, auto t) {
            const int64_t b = unit % b_units * GROUP_INSTANCES, i = unit / b_units % i_units, p = unit / h_units;
            const int64_t o = panel(p).begin + unit / (b_units * i_units) % o_units * ow,
                          os = std::min(ow, panel(p).end - o);
            if (os <= 0) return;
            const Group subgroup(std::min(GROUP_INSTANCES, group.rows - b));
            const auto z_subgroup = z.subspan(b * depth_z, subgroup.blocks * LANES * depth_z);
            const bool last = i == i_units - 1 && shifted;
            const int64_t i0 = i * iw, row = last ? K : i0 / K_STEP<T>, column = o - panel(p).begin;
            const auto to = w.span().subspan((p * lanes + b) * pitch + row * P + column);
            if (last)
              generate<S, T, false>(
                  {f.bias.data ? f.bias.data + o * f.bias.s0 : nullptr, os, 1, f.R, f.bias.s0, 0, f.bias.s1},
                  {base_bias ? base_bias + o * base_bias_stride : nullptr, base_bias_stride, 0}, subgroup, z_subgroup,
                  to, lanes - b, pitch, P, t.subspan(0, t_floats), view_as<T>(t.subspan(t_floats)));
            else
              generate<S, T>(
                  {f.h + o * f.so + i0 * f.si, os, std::min(iw, f.I - i0), f.R, f.so, f.si, f.sr},
                  {f.base.data ? f.base.data + o * f.base.s0 + i0 * f.base.s1 : nullptr, f.base.s0, f.base.s1},
                  subgroup, z_subgroup, to, lanes - b, pitch, P, t.subspan(0, t_floats),
                  view_as<T>(t.subspan(t_floats)));
          });
      const int64_t panel_ranges = group.rows * n_units < 2 * (at::get_num_threads() - 1) ? ps : 1;
      const int64_t floats = rows * PANEL + floats_for<T>(x_numbers);
      for_units<T>(group.rows * n_units * panel_ranges, flops * f.N, floats, workspace, [&](int64_t unit, auto own) {
        const int64_t b = unit / panel_ranges / n_units, n = unit / panel_ranges % n_units * rows,
                      ns = std::min(rows, f.N - n);
        const int64_t q = (b0 + b) * f.N + n;
        const auto x =
            left_operand<S, T>(f.x.row(q), f.x.point, f.x.feature, ns, f.I, view_as<T>(own.subspan(rows * PANEL)));
        const Range own_panels = share(ps, unit % panel_ranges, panel_ranges);
        for (int64_t p = own_panels.begin; p < own_panels.end; ++p) {
          const Range o = panel(p);
          const float* const wb = w.at((p * lanes + b) * pitch, (K + shifted) * P);
          float* c = own.at(0, ns * P);
          if constexpr (std::is_same_v<S, float>)
            if (direct) c = y.row(q) + o.begin;
          const int64_t ldc = direct ? f.O : P, width = direct ? o.size() : P;
          for (int64_t k = 0; shifted && k < ns; ++k) std::memcpy(c + k * ldc, wb + K * P, width * sizeof(float));
          gemm(ns, width, f.I, x.data, x.ld, reinterpret_cast<const T*>(wb), P, c, ldc, shifted);
          if (!direct) store_rows((const float*)c, P, y.row(q) + o.begin, f.O, ns, o.size());
        }
      });
    }
  }
}

}  // namespace fasthyper
