// `generate` where an instance has many points: W is written out, as much of it at a time as stays in cache.
//
//   W[b,o,i] = Σ_r H[o,i,r] z[b,r] + base[o,i]     y[b] = x[b] W[b]ᵀ + bias z[b] + base_bias     dx[b] = g[b] W[b]
//
// Two parallel regions take turns: one makes a piece of W for a group of instances, the other applies it. W is a right
// operand of T as it is made: rounded to 16 bits where the processor multiplies those, as writing W out would round it,
// and everything that is added up is float32. Sums are cut by sizes alone, so that the number of threads changes no
// bit.
#pragma once

#include <atomic>

#include "rows.h"

namespace fasthyper {

constexpr int64_t PANEL = LANES;                         // columns of a right operand
constexpr int64_t GROUP = tile_of(128, LANES);           // instances that meet a piece of H together, in a thread
constexpr int64_t ROWS = tile_of(512, 2 * PANEL);        // of H that are generated at a time
constexpr int64_t PACK = tile_of(1 << 15);               // numbers of these that are packed at a time
constexpr int64_t SHALLOW = PACK / ROWS;                 // of a row, at least
constexpr int64_t PACKED_ROWS = PACK + 2 * LINE * ROWS;  // with what rows are apart

static_assert(PANEL % SQUARE == 0 && GROUP % LANES == 0 && ROWS % (2 * PANEL) == 0 && SHALLOW % SQUARE == 0);

// A block of floats as one of T, as many bytes.
template <class T>
Block<T> as(Block<float> block) {
  return {reinterpret_cast<T*>(block.at(0, block.size())), block.size() * K_STEP<T>};
}

// Floats that hold so many numbers of T.
template <class T>
constexpr int64_t floats_for(int64_t numbers) {
  return ceil_div(numbers, K_STEP<T>);
}

// Calls f(unit, scratch) for all units. Threads take the next as they get free; `flops` says how many are worth it.
template <class T, class F>
void for_units(int64_t units, double flops, int64_t floats, int64_t workspace, F&& f) {
  const int64_t fit = workspace / 4 / (floats * int64_t(sizeof(float)));
  const int64_t threads = std::min({int64_t(at::get_num_threads()), units, fit, many(flops / (WORTH / 2))});
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::max<int64_t>(1, threads), 1, [&](int64_t, int64_t) {
    const Scratch<float> scratch(floats);
    for (int64_t unit; (unit = next++) < units;) f(unit, scratch.block());
    release<T>();
  });
}

// Floats of a piece of W or dW.
inline int64_t piece(int64_t workspace) { return std::clamp<int64_t>(workspace / 16, tile_of(1 << 16), 1 << 21); }

// Pairs of rows q of t, each of `width` floats, as rows of right operands of 16-bit numbers, where t is.
inline void pair_rows(float* t, int64_t tp, int64_t tq, int64_t p, int64_t q, int64_t width) {
  for (int64_t l = 0; l < q; l += 2)
    for (int64_t k = 0; k < p; ++k) {
      const float* const row = t + l * tq + k * tp;
      interleave(row, l + 1 < q ? row + tq : nullptr, reinterpret_cast<BFloat16*>(t + l / 2 * tq + k * tp), width);
    }
}

// w[b·ld_b + q·ld_q + p] = Σ_c h[p,q,c] z[c,b] + base[p,q], rows q of a right operand of T; h may be without data. z is
// a right operand, a block of lanes after another; w has room for so many `lanes`. `t` holds ROWS·GROUP floats, and
// `packed` PACKED_ROWS numbers.
template <class S, class T, bool Operand = true>
void generate(
    const Head<S>& h, const Matrix<S>& base, const Group& group, Block<const T> z, Block<float> w, int64_t lanes,
    int64_t ld_b, int64_t ld_q, Block<float> t, Block<T> packed) {
  const bool inner_p = h.sp < h.sq || h.q == 1;  // rows of H that lie one after another
  int64_t rows = inner_p ? h.p : h.q, runs = inner_p ? h.q : h.p;
  const int64_t stride = inner_p ? h.sp : h.sq, next = inner_p ? h.sq : h.sp, each = h.p * h.q * LANES;
  const int64_t tp = (inner_p ? 1 : h.q) * LANES, tq = (inner_p ? h.p : 1) * LANES, depth_z = round_k<T>(h.c);
  if (base.data)
    for (int64_t p = 0; p < h.p; ++p)
      for (int64_t q = 0; q < h.q; ++q)
        for (int64_t k = 0; k < group.blocks; ++k)
          t.part(k * each + p * tp + q * tq, LANES).fill(float(base.data[p * base.s0 + q * base.s1]));
  if (next == rows * stride) rows *= runs, runs = 1;
  const int64_t depth =
      readable<S, T>(h.sc, h.c) ? h.c : std::min(h.c, std::max(SHALLOW, PACK / rows / SQUARE * SQUARE));
  for (int64_t run = 0; h.data && run < runs; ++run)
    for (int64_t c = 0; c < h.c; c += depth) {
      const int64_t cs = std::min(depth, h.c - c);
      if (run + 1 < runs && c == 0)  // rows are read several at a time, and the hardware loses track of so many
        for (int64_t k = 0; k < rows; ++k)
          for (int64_t l = 0; l < h.c; l += LINE) __builtin_prefetch(h.data + (run + 1) * next + k * stride + l);
      const auto a = left<S, T>(h.data + run * next + c * h.sc, stride, h.sc, rows, cs, packed);
      for (int64_t k = 0; k < group.blocks; ++k)
        gemm(
            rows, group.width(k), cs, a.data, a.ld, z.at((k * depth_z + c) * LANES, round_k<T>(cs) * LANES), LANES,
            t.at(k * each + run * rows * LANES, rows * LANES), LANES, base.data || c > 0);
    }
  constexpr bool pairs = Operand && !std::is_same_v<T, float>;
  const int64_t qs = pairs ? k_rows<T>(h.q) : h.q;
  for (int64_t k = 0; k < group.blocks; ++k) {
    float* const made = t.at(k * each, each);
    const int64_t width = std::min(group.width(k), lanes - k * LANES), room = whole_squares(h.p);
    if constexpr (pairs) pair_rows(made, tp, tq, h.p, h.q, width);
    for (int64_t q = 0; q < qs; ++q)
      transpose(
          made + q * tq, tp, w.at(k * LANES * ld_b + q * ld_q, extent(width, ld_b, room)), ld_b, h.p, width, room);
  }
}

// Rows of an output, `width` of the ld numbers that each row of `src` has.
template <class S>
void store_rows(const float* src, int64_t ld, S* dst, int64_t ld_dst, int64_t rows, int64_t width) {
  if constexpr (std::is_same_v<S, float>)  // whole registers: what is written beyond a row, the next overwrites
    for (; ld_dst == width && rows * width >= ld; --rows, src += ld, dst += ld_dst)
      for (int64_t l = 0; l < ld; l += SQUARE) store(dst + l, load<Vec8>(src + l));
  pack(src, ld, 1, dst, ld_dst, rows, width);
}

// z of a group as right operands, a block of lanes after another.
template <class S, class T>
void load_operand(const Factors<S>& f, const Group& group, int64_t b0, Block<T> z) {
  const Rows<const S> rows{f.z.data, f.z.instance, 0, f.z.feature, 1, f.R};
  const int64_t each = round_k<T>(f.R) * LANES;
  const Scratch<float> lanes(std::is_same_v<T, float> ? 0 : f.R * LANES);
  for (int64_t k = 0; k < group.blocks; ++k) {
    const int64_t q0 = b0 + k * LANES, q1 = q0 + group.filled(k);
    const auto to = z.part(k * each, each);
    if constexpr (std::is_same_v<T, float>) load_lanes<S, float>(rows, q0, q1, to);
    else load_lanes<S, float>(rows, q0, q1, lanes), right(lanes.at(0, f.R * LANES), to, f.R, LANES);
  }
}

// How W is cut: groups of `each` instances, panels of P columns, `at_once` of them together.
struct Pieces {
  int64_t P, panels, pitch, each, at_once, lanes;

  // `K` are rows of a panel. A group reads H, and x again for every piece: the size that reads least.
  template <class S>
  Pieces(const Factors<S>& f, int64_t K, int64_t room) {
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
    while (each > 1 && each * pitch > 2 * room) each = ceil_div(each, 2);  // very wide
    lanes = each < WIDTH ? each : whole_registers(each);
  }
};

template <class S, class T>
void apply_points(const Factors<S>& f, const S* base_bias, int64_t base_bias_stride, Rows<S> y, int64_t workspace) {
  const bool shifted = f.bias.data || base_bias;  // what y starts from is a last row of W, of floats
  const int64_t K = k_rows<T>(f.I);
  const Pieces cut(f, K + shifted, piece(workspace));
  const int64_t P = cut.P, pitch = cut.pitch, each = cut.each, at_once = cut.at_once, depth_z = round_k<T>(f.R);
  const int64_t lanes = cut.lanes;
  const Scratch<float> w(at_once * lanes * pitch);
  const Scratch<T> z(whole_lanes(each) * depth_z);
  // H is cut along its slower axis, so that rows which lie one after another stay together
  const int64_t ow = f.so < f.si ? P : SQUARE, iw = std::min(f.I, ROWS / ow / K_STEP<T> * K_STEP<T>);
  const int64_t o_units = ceil_div(P, ow), i_units = ceil_div(f.I, iw) + shifted;
  const bool direct = std::is_same_v<S, float> && f.O >= P;
  const bool read = readable<S, T>(f.x.feature, f.I);
  const int64_t rows = std::min(f.N, read ? 256 : std::clamp<int64_t>((1 << 16) / f.I, 1, 256)),
                n_units = ceil_div(f.N, rows), x_numbers = read ? 0 : rows * packed_ld(f.I);
  for (int64_t b0 = 0; b0 < f.B; b0 += each) {
    const Group group(std::min(each, f.B - b0));
    load_operand<S, T>(f, group, b0, z);
    for (int64_t p0 = 0; p0 < cut.panels; p0 += at_once) {
      const int64_t ps = std::min(at_once, cut.panels - p0);
      const auto panel = [&](int64_t p) { return Range{(p0 + p) * P, std::min(f.O, (p0 + p + 1) * P)}; };
      const double flops = 2. * group.rows * ps * P * f.I;
      const int64_t b_units = ceil_div(group.rows, GROUP), h_units = o_units * i_units * b_units;
      const int64_t made = ROWS * GROUP;
      for_units<T>(ps * h_units, flops * f.R, made + floats_for<T>(PACKED_ROWS), workspace, [&](int64_t unit, auto t) {
        const int64_t b = unit % b_units * GROUP, i = unit / b_units % i_units, p = unit / h_units;
        const int64_t o = panel(p).begin + unit / (b_units * i_units) % o_units * ow,
                      os = std::min(ow, panel(p).end - o);
        if (os <= 0) return;
        const Group part(std::min(GROUP, group.rows - b));
        const auto z_part = z.part(b * depth_z, part.blocks * LANES * depth_z);
        const bool last = i == i_units - 1 && shifted;
        const int64_t i0 = i * iw, row = last ? K : i0 / K_STEP<T>, column = o - panel(p).begin;
        const auto to = w.block().from((p * lanes + b) * pitch + row * P + column);
        if (last)
          generate<S, T, false>(
              {f.bias.data ? f.bias.data + o * f.bias.s0 : nullptr, os, 1, f.R, f.bias.s0, 0, f.bias.s1},
              {base_bias ? base_bias + o * base_bias_stride : nullptr, base_bias_stride, 0}, part, z_part, to,
              lanes - b, pitch, P, t.part(0, made), as<T>(t.from(made)));
        else
          generate<S, T>(
              {f.h + o * f.so + i0 * f.si, os, std::min(iw, f.I - i0), f.R, f.so, f.si, f.sr},
              {f.base.data ? f.base.data + o * f.base.s0 + i0 * f.base.s1 : nullptr, f.base.s0, f.base.s1}, part,
              z_part, to, lanes - b, pitch, P, t.part(0, made), as<T>(t.from(made)));
      });
      const int64_t parts = group.rows * n_units < 2 * (at::get_num_threads() - 1) ? ps : 1;
      const int64_t floats = rows * PANEL + floats_for<T>(x_numbers);
      for_units<T>(group.rows * n_units * parts, flops * f.N, floats, workspace, [&](int64_t unit, auto own) {
        const int64_t b = unit / parts / n_units, n = unit / parts % n_units * rows, ns = std::min(rows, f.N - n);
        const int64_t q = (b0 + b) * f.N + n;
        const auto x = left<S, T>(f.x.row(q), f.x.point, f.x.feature, ns, f.I, as<T>(own.from(rows * PANEL)));
        const Range part = share(ps, unit % parts, parts);
        for (int64_t p = part.begin; p < part.end; ++p) {
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
