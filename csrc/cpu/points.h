// `generate` where an instance has many points: W is written out, as much of it at a time as stays in cache.
//
//   W[b,o,i] = Σ_r H[o,i,r] z[b,r] + base[o,i]     y[b] = x[b] W[b]ᵀ + bias z[b] + base_bias     dx[b] = g[b] W[b]
//   dW[b] = g[b]ᵀ x[b]       dz[b,r] = Σ_{o,i} dW[b,o,i] H[o,i,r]       dH[o,i,r] = Σ_b dW[b,o,i] z[b,r]
//   dbase = Σ_b dW[b]        dbias[o,r] = Σ_b (Σ_n g[b,n,o]) z[b,r]     dbase_bias = Σ_b Σ_n g[b,n]
//
// All in float32. Each step has two parallel regions: one makes a piece of W or dW for a group of instances, the other
// uses it. Sums are cut by sizes alone, so that the number of threads changes no bit.
#pragma once

#include <atomic>

#include "rows.h"

namespace fasthyper {

constexpr int64_t PANEL = 32;   // columns of a right operand
constexpr int64_t GROUP = 128;  // instances that meet a piece of H together, in a thread

// Calls f(unit, scratch) for all units. Threads take the next as they get free; `flops` says how many are worth it.
template <class F>
void for_units(int64_t units, int64_t flops, int64_t floats, int64_t workspace, F&& f) {
  const int64_t fit = workspace / 4 / (floats * int64_t(sizeof(float)));
  const int64_t threads = std::min({int64_t(at::get_num_threads()), units, fit, flops >> 18});
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::max<int64_t>(1, threads), 1, [&](int64_t, int64_t) {
    const Scratch<float> scratch(floats);
    for (int64_t unit; (unit = next++) < units;) f(unit, (float*)scratch);
    at::native::cpublas::brgemm_release();
  });
}

// Floats of a piece of W or dW.
inline int64_t piece(int64_t workspace) { return std::clamp<int64_t>(workspace / 16, 1 << 16, 1 << 21); }

constexpr int64_t ROWS = 512;  // of H that are generated at a time

// w[b·ld_b + q·ld_q + p] = Σ_c h[p,q,c] z[c,b] + base[p,q]; h may be without data. `t` holds p·q·lanes floats, and
// `packed` ROWS·96.
template <class S>
void generate(
    const Head<S>& h, const Matrix<S>& base, const Group& group, const float* z, float* w, int64_t ld_b, int64_t ld_q,
    float* t, float* packed) {
  const bool inner_p = h.sp < h.sq || h.q == 1;  // rows of H that lie one after another
  int64_t rows = inner_p ? h.p : h.q, runs = inner_p ? h.q : h.p;
  const int64_t stride = inner_p ? h.sp : h.sq, next = inner_p ? h.sq : h.sp, each = h.p * h.q * LANES;
  const int64_t tp = (inner_p ? 1 : h.q) * LANES, tq = (inner_p ? h.p : 1) * LANES;
  if (base.data)
    for (int64_t p = 0; p < h.p; ++p)
      for (int64_t q = 0; q < h.q; ++q)
        for (int64_t k = 0; k < group.blocks; ++k)
          std::fill_n(t + k * each + p * tp + q * tq, LANES, float(base.data[p * base.s0 + q * base.s1]));
  if (next == rows * stride) rows *= runs, runs = 1;
  const int64_t depth =
      readable<S, float>(h.sc, h.c) ? h.c : std::min(h.c, std::max<int64_t>(64, (1 << 15) / rows / 8 * 8));
  for (int64_t run = 0; h.data && run < runs; ++run)
    for (int64_t c = 0; c < h.c; c += depth) {
      const int64_t cs = std::min(depth, h.c - c);
      if (run + 1 < runs && c == 0)  // rows are read several at a time, and the hardware loses track of so many
        for (int64_t k = 0; k < rows; ++k)
          for (int64_t l = 0; l < h.c; l += 16) __builtin_prefetch(h.data + (run + 1) * next + k * stride + l);
      const auto a = left<S, float>(h.data + run * next + c * h.sc, stride, h.sc, rows, cs, packed);
      for (int64_t k = 0; k < group.blocks; ++k)
        gemm(
            rows, group.width(k), cs, a.data, a.ld, z + (k * h.c + c) * LANES, LANES, t + k * each + run * rows * LANES,
            LANES, base.data || c > 0);
    }
  for (int64_t k = 0; k < group.blocks; ++k)
    for (int64_t q = 0; q < h.q; ++q)
      transpose(
          t + k * each + q * tq, tp, w + k * LANES * ld_b + q * ld_q, ld_b, h.p, group.width(k), round_up(h.p, 8));
}

// Rows of an output, `width` of the ld numbers that each row of `src` has.
template <class S>
void store_rows(const float* src, int64_t ld, S* dst, int64_t ld_dst, int64_t rows, int64_t width) {
  if constexpr (std::is_same_v<S, float>)  // whole registers: what is written beyond a row, the next overwrites
    for (; ld_dst == width && rows * width >= ld; --rows, src += ld, dst += ld_dst)
      for (int64_t l = 0; l < ld; l += 8) store(dst + l, load<Vec8>(src + l));
  pack(src, ld, 1, dst, ld_dst, rows, width);
}

template <class S>
void apply_points(const Factors<S>& f, const S* base_bias, int64_t base_bias_stride, Rows<S> y, int64_t workspace) {
  const bool shifted = f.bias.data || base_bias;
  const int64_t K = f.I + shifted, room = piece(workspace);  // what y starts from is a last row of W
  const int64_t P = std::min(8 * K * PANEL > room ? 8 : PANEL, round_up(f.O, 8)), panels = ceil_div(f.O, P);
  const int64_t pitch = packed_ld<float>(K * P);
  int64_t each = 0, at_once = 1, least = 0;  // a group reads H, and x again for every piece: the size that reads least
  for (int64_t count = f.B; !each || count > 8; count = round_up(count, 16) / 2) {
    const int64_t fit = std::min(panels, room / (round_up(count, 8) * pitch)),
                  steps = ceil_div(panels, std::max<int64_t>(1, fit));
    const int64_t reads = f.O * f.I * f.R * ceil_div(f.B, count) + f.B * f.N * f.I * steps;
    const bool fits = fit > 0 && count * f.R <= room / 4;
    if ((fits || count <= 8) && (!each || reads < least))
      each = count, least = reads, at_once = ceil_div(panels, steps);
  }
  const int64_t groups = ceil_div(f.B, each);
  if (groups > 1) each = round_up(ceil_div(f.B, groups), 8);
  const int64_t lanes = round_up(each, 8);
  Scratch<float> w(at_once * lanes * pitch), z(round_up(each, LANES) * f.R);
  const Rows<const S> z_rows{f.z.data, f.z.instance, 0, f.z.feature, 1, f.R};
  // H is cut along its slower axis, so that rows which lie one after another stay together
  const int64_t ow = f.so < f.si ? P : 8, iw = std::min(f.I, ROWS / ow);
  const int64_t o_units = ceil_div(P, ow), i_units = ceil_div(f.I, iw) + shifted;
  const bool direct = std::is_same_v<S, float> && f.O >= P;
  const bool read = readable<S, float>(f.x.feature, f.I);
  const int64_t rows = std::min(f.N, read ? 256 : std::clamp<int64_t>((1 << 16) / f.I, 1, 256)),
                n_units = ceil_div(f.N, rows);
  for (int64_t b0 = 0; b0 < f.B; b0 += each) {
    const Group group{ceil_div(std::min(each, f.B - b0), LANES), std::min(each, f.B - b0)};
    for (int64_t k = 0; k < group.blocks; ++k)
      load_lanes(z_rows, b0 + k * LANES, b0 + std::min(group.rows, (k + 1) * LANES), z + k * f.R * LANES);
    for (int64_t p0 = 0; p0 < panels; p0 += at_once) {
      const int64_t ps = std::min(at_once, panels - p0);
      const auto panel = [&](int64_t p) { return Range{(p0 + p) * P, std::min(f.O, (p0 + p + 1) * P)}; };
      const int64_t flops = 2 * group.rows * ps * P * f.I;
      const int64_t b_units = ceil_div(group.rows, GROUP), h_units = o_units * i_units * b_units;
      for_units(ps * h_units, flops * f.R, ROWS * (GROUP + 96), workspace, [&](int64_t unit, float* t) {
        const int64_t b = unit % b_units * GROUP, i = unit / b_units % i_units, p = unit / h_units;
        const int64_t o = panel(p).begin + unit / (b_units * i_units) % o_units * ow,
                      os = std::min(ow, panel(p).end - o);
        if (os <= 0) return;
        const int64_t rows = std::min(GROUP, group.rows - b), i0 = i < i_units - shifted ? i * iw : f.I;
        const auto make = [&](const Head<S>& h, const Matrix<S>& base) {
          float* const to = w + (p * lanes + b) * pitch + i0 * P + (o - panel(p).begin);
          generate(h, base, {ceil_div(rows, LANES), rows}, z + b * f.R, to, pitch, P, t, t + ROWS * GROUP);
        };
        if (i0 < f.I)
          make(
              {f.h + o * f.so + i0 * f.si, os, std::min(iw, f.I - i0), f.R, f.so, f.si, f.sr},
              {f.base.data ? f.base.data + o * f.base.s0 + i0 * f.base.s1 : nullptr, f.base.s0, f.base.s1});
        else
          make(
              {f.bias.data ? f.bias.data + o * f.bias.s0 : nullptr, os, 1, f.R, f.bias.s0, 0, f.bias.s1},
              {base_bias ? base_bias + o * base_bias_stride : nullptr, base_bias_stride, 0});
      });
      const int64_t parts = group.rows * n_units < 2 * (at::get_num_threads() - 1) ? ps : 1;
      const int64_t floats = rows * PANEL + (read ? 0 : rows * packed_ld<float>(f.I));
      for_units(group.rows * n_units * parts, flops * f.N, floats, workspace, [&](int64_t unit, float* out) {
        const int64_t b = unit / parts / n_units, n = unit / parts % n_units * rows, ns = std::min(rows, f.N - n);
        const int64_t q = (b0 + b) * f.N + n;
        const auto x = left<S, float>(f.x.row(q), f.x.point, f.x.feature, ns, f.I, out + rows * PANEL);
        const Range part = share(ps, unit % parts, parts);
        for (int64_t p = part.begin; p < part.end; ++p) {
          const Range o = panel(p);
          const float* const wb = w + p * lanes * pitch + b * pitch;
          float* c = out;
          if constexpr (std::is_same_v<S, float>)
            if (direct) c = y.row(q) + o.begin;
          const int64_t ldc = direct ? f.O : P, width = direct ? o.size() : P;
          for (int64_t k = 0; shifted && k < ns; ++k) std::memcpy(c + k * ldc, wb + f.I * P, width * sizeof(float));
          gemm(ns, width, f.I, x.data, x.ld, wb, P, c, ldc, shifted);
          if (!direct) store_rows((const float*)out, P, y.row(q) + o.begin, f.O, ns, o.size());
        }
      });
    }
  }
}

constexpr int64_t POINTS = 256;  // that one product contracts

// A piece of dW: instances from b0 on, rows o from o0 on, columns i from i0 on. An instance's part of it is `pitch`
// numbers, os × is of dW and, where they are `summed`, os of Σ_n g, which dz wants where it is `biased`.
struct PieceOfdW {
  int64_t b0, instances, o0, os, i0, is, pitch;
  bool summed, biased;
  float* data;

  int64_t numbers() const { return os * is; }
  int64_t rows() const { return numbers() + (biased ? os : 0); }
  float* instance(int64_t b) const { return data + b * pitch; }
};

// dW[b,o,i] = Σ_n g[b,n,o] x[b,n,i], and after it Σ_n g[b,n,o]; `ones` are as many as POINTS.
template <class S>
void make_dW(const Factors<S>& f, const PieceOfdW& dw, const float* ones, int64_t workspace) {
  constexpr bool direct = std::is_same_v<S, float>;
  const int64_t threads = at::get_num_threads(), os = dw.os, is = dw.is;
  int64_t ow = std::min<int64_t>(os, 256), iw = is;
  while (dw.instances * ceil_div(os, ow) * ceil_div(is, iw) < 2 * (threads - 1) && (ow > 32 || iw > PANEL)) {
    if (ow >= iw) ow = ceil_div(ow, 2);
    else iw = round_up(ceil_div(iw, 2), PANEL);
  }
  const int64_t o_units = ceil_div(os, ow), i_units = ceil_div(is, iw);
  const int64_t ns = std::min(f.N, POINTS), ld = packed_ld<float>(ns);
  const bool narrow = direct && f.x.feature == 1 && f.x.point <= 64;  // then x is a good right operand as it lies
  const int64_t flops = 2 * dw.instances * dw.numbers() * f.N;
  for_units(dw.instances * o_units * i_units, flops, ow * ld + ns * PANEL, workspace, [&](int64_t unit, float* gt) {
    const int64_t b = unit / (o_units * i_units), o = unit / i_units % o_units * ow, M = std::min(ow, os - o);
    const int64_t i = unit % i_units * iw, end = std::min(is, i + iw);
    float* const to = dw.instance(b);
    float* const packed = gt + ow * ld;
    for (int64_t n = 0; n < f.N; n += ns) {
      const int64_t K = std::min(ns, f.N - n), q = (dw.b0 + b) * f.N + n;
      pack(f.g.row(q) + (dw.o0 + o) * f.g.feature, f.g.feature, f.g.point, gt, ld, M, K, ld);
      for (int64_t c = i; c < end; c += PANEL) {
        const int64_t width = std::min(PANEL, end - c);
        const S* const x = f.x.row(q) + (dw.i0 + c) * f.x.feature;
        if (!narrow) pack(x, f.x.point, f.x.feature, packed, PANEL, K, width, PANEL);
        const float* right = packed;
        if constexpr (direct) right = narrow ? x : packed;
        gemm(M, width, K, (const float*)gt, ld, right, narrow ? f.x.point : PANEL, to + o * is + c, is, n > 0);
      }
      if (dw.summed && i == 0) gemm(M, 1, K, (const float*)gt, ld, ones, 1, to + dw.numbers() + o, 1, n > 0);
    }
  });
}

// dz[b,r] += Σ_j dW[b,j] H[j,r] for M instances from b on, and j = (o, i) in blocks of `depth`; sums are (b, R).
// `t` holds a block of H in panels. The rows after dW meet the generated bias.
template <class S>
void add_to_dz(
    const Factors<S>& f, const PieceOfdW& dw, int64_t b, int64_t M, Range blocks, int64_t depth, bool add, float* sums,
    float* t) {
  for (int64_t k = blocks.begin; k < blocks.end; ++k) {
    const int64_t j0 = k * depth, K = std::min(depth, dw.rows() - j0);
    for (int64_t j = j0; j < j0 + K; ++j) {
      const bool of_h = j < dw.numbers();
      const S* src = of_h ? f.h + (dw.o0 + j / dw.is) * f.so + (dw.i0 + j % dw.is) * f.si
                          : f.bias.data + (dw.o0 + j - dw.numbers()) * f.bias.s0;
      const int64_t stride = of_h ? f.sr : f.bias.s1;
      float* to = t + (j - j0) * PANEL;
      int64_t r = 0;
      for (; stride == 1 && r + PANEL <= f.R; r += PANEL) convert(src + r, to + r * K, PANEL);
      for (; r < f.R; r += PANEL) pack(src + r * stride, 0, stride, to + r * K, 0, 1, std::min(PANEL, f.R - r));
    }
    for (int64_t r = 0; r < f.R; r += PANEL)
      gemm(
          M, std::min(PANEL, f.R - r), K, (const float*)dw.instance(b) + j0, dw.pitch, t + r * K, PANEL,
          sums + b * f.R + r, f.R, add || k > blocks.begin);
  }
}

// out[o,i,r] += Σ_b dW[b,o,i] z[b,r] for `count` rows from o on, `next` numbers apart; z is in panels. `t` holds dW
// with its instances side by side.
inline void add_to_dH(
    const PieceOfdW& dw, int64_t o, int64_t count, const float* z, int64_t R, bool add, float* out, int64_t next,
    float* t) {
  const int64_t is = dw.is, ld = packed_ld<float>(std::min(dw.instances, GROUP));
  const bool whole = next == is * R;  // all these rows lie one after another
  for (int64_t b = 0; b < dw.instances; b += GROUP) {
    const int64_t K = std::min(GROUP, dw.instances - b);
    for (int64_t k = 0; k < count; ++k)  // what is written beyond i, the next overwrites
      transpose(dw.instance(b) + (o + k) * is, dw.pitch, t + k * is * ld, ld, K, round_up(is, 8), ld);
    for (int64_t r = 0; r < R; r += PANEL)
      for (int64_t k = 0; k < (whole ? 1 : count); ++k)
        gemm(
            whole ? count * is : is, std::min(PANEL, R - r), K, (const float*)t + k * is * ld, ld,
            z + r * dw.instances + b * PANEL, PANEL, out + k * next + r, R, add || b > 0);
  }
}

// Gradients of what is not generated from H, float32's alone: (O, R), (O, I), (O,). Any may be without data.
struct OfBases {
  float *bias = nullptr, *base = nullptr, *base_bias = nullptr;

  bool any() const { return bias || base || base_bias; }
};

// out[j] += Σ_b numbers[b,j] for `count` numbers of each instance, from `from` on; some instances at a time, or the sum
// would lose digits.
inline void add_instances(const PieceOfdW& dw, int64_t from, int64_t count, bool add, float* out) {
  constexpr int64_t AT_ONCE = 32;
  float some[PANEL];
  for (int64_t j0 = 0; j0 < count; j0 += PANEL) {
    const int64_t width = std::min(PANEL, count - j0);
    if (!add) std::fill_n(out + j0, width, 0.f);
    for (int64_t b0 = 0; b0 < dw.instances; b0 += AT_ONCE) {
      std::fill_n(some, PANEL, 0.f);
      for (int64_t b = b0; b < std::min(dw.instances, b0 + AT_ONCE); ++b)
        for (int64_t j = 0; j < width; ++j) some[j] += dw.instance(b)[from + j0 + j];
      for (int64_t j = 0; j < width; ++j) out[j0 + j] += some[j];
    }
  }
}

// What `count` rows from o on of a piece add to the gradients of the bases; z is in panels, `t` holds count × GROUP.
inline void add_to_bases(
    const PieceOfdW& dw, int64_t o, int64_t count, const float* z, int64_t R, int64_t I, bool add, const OfBases& to,
    float* t) {
  for (int64_t k = o; to.base && k < o + count; ++k)
    add_instances(dw, k * dw.is, dw.is, add, to.base + (dw.o0 + k) * I + dw.i0);
  if (!dw.summed) return;
  const int64_t sums = dw.numbers() + o, ld = packed_ld<float>(std::min(dw.instances, GROUP));
  if (to.base_bias) add_instances(dw, sums, count, add, to.base_bias + dw.o0 + o);
  for (int64_t b = 0; to.bias && b < dw.instances; b += GROUP) {
    const int64_t K = std::min(GROUP, dw.instances - b);
    for (int64_t k = 0; k < count; ++k)
      for (int64_t l = 0; l < K; ++l) t[k * ld + l] = dw.instance(b + l)[sums + k];
    for (int64_t r = 0; r < R; r += PANEL)
      gemm(
          count, std::min(PANEL, R - r), K, (const float*)t, ld, z + r * dw.instances + b * PANEL, PANEL,
          to.bias + (dw.o0 + o) * R + r, R, add || b > 0);
  }
}

// dz, dH and the gradients of the bases; any may be without data.
template <class S>
void weight_points(const Factors<S>& f, Rows<S> dz, S* dh, const OfBases& bases, int64_t workspace) {
  constexpr bool direct = std::is_same_v<S, float>;
  const int64_t room = piece(workspace), R = f.R, panels = ceil_div(R, PANEL);
  const bool biased = dz.data && f.bias.data, summed = biased || bases.bias || bases.base_bias, sliced = dh && !direct;
  int64_t o_size = f.O, i_size = std::min<int64_t>(f.I, 512), G = std::min(f.B, GROUP);
  while (o_size * i_size > room / std::max(G, sliced ? 2 * R : 1) && (o_size > 32 || i_size > 32)) {
    if (o_size >= i_size) o_size = ceil_div(o_size, 2);
    else i_size = round_up(ceil_div(i_size, 2), 8);
  }
  const int64_t pitch = packed_ld<float>(o_size * (i_size + summed) + 8);
  const bool one_chunk = o_size == f.O && i_size == f.I;
  G = std::clamp<int64_t>(std::min(room / pitch, room / 4 / R), 1, one_chunk ? f.B : G);
  const int64_t groups = ceil_div(f.B, G), i_parts = ceil_div(f.I, i_size), chunks = ceil_div(f.O, o_size) * i_parts;
  if (sliced && dz.data && groups > 1 && chunks > 1) {  // either sum would wait for the other
    weight_points(f, dz, (S*)nullptr, {}, workspace);
    return weight_points(f, {}, dh, {}, workspace);
  }
  const int64_t threads = at::get_num_threads();
  const int64_t depth = std::clamp<int64_t>((1 << 16) / R, 16, 256);  // of H in one product
  const int64_t slots = std::clamp<int64_t>(std::min(o_size * i_size / 256, room / 2 / (G * R)), 1, 16);
  const int64_t M = round_up(ceil_div(G, std::clamp<int64_t>(threads / slots, 1, ceil_div(G, 16))), 2);
  const int64_t m_units = ceil_div(G, M);
  const Scratch<float> numbers(G * pitch), sums(dz.data ? slots * G * R : 0),
      z(dh || bases.bias ? panels * G * PANEL : 0);
  const Scratch<float> slice(sliced ? o_size * i_size * R : 0), ones(summed ? POINTS : 0);
  if (summed) std::fill_n((float*)ones, POINTS, 1.f);
  for (int64_t step = 0; step < groups * chunks; ++step) {
    const int64_t group = dz.data ? step / chunks : step % groups, chunk = dz.data ? step % chunks : step / groups;
    const int64_t b0 = group * G, o0 = chunk / i_parts * o_size, i0 = chunk % i_parts * i_size;
    const PieceOfdW dw{
        b0,
        std::min(G, f.B - b0),
        o0,
        std::min(o_size, f.O - o0),
        i0,
        std::min(i_size, f.I - i0),
        pitch,
        summed && i0 == 0,
        biased && i0 == 0,
        numbers};
    make_dW(f, dw, (const float*)ones, workspace);

    const int64_t Gs = dw.instances;
    for (int64_t r = 0; (dh || bases.bias) && r < R; r += PANEL)
      pack(
          f.z.data + b0 * f.z.instance + r * f.z.feature, f.z.instance, f.z.feature, z + r * Gs, PANEL, Gs,
          std::min(PANEL, R - r), PANEL);
    const int64_t blocks = ceil_div(dw.rows(), depth), z_units = dz.data ? slots * m_units : 0;
    const int64_t oh = std::max<int64_t>(1, 128 / dw.is), h_units = dh || bases.any() ? ceil_div(dw.os, oh) : 0;
    const int64_t ld = packed_ld<float>(std::min(Gs, GROUP));
    const int64_t floats = std::max(depth * panels * PANEL, (oh * dw.is + 8) * ld);
    const int64_t flops = 2 * Gs * dw.numbers() * R * ((z_units > 0) + (h_units > 0));
    for_units(z_units + h_units, flops, floats, workspace, [&](int64_t unit, float* t) {
      if (unit < z_units) {
        const int64_t b = unit % m_units * M, slot = unit / m_units;
        if (b < Gs)
          add_to_dz(
              f, dw, b, std::min(M, Gs - b), share(blocks, slot, slots), depth, chunk > 0, sums + slot * G * R, t);
        return;
      }
      const int64_t o = (unit - z_units) * oh, count = std::min(oh, dw.os - o);
      if constexpr (direct) add_to_bases(dw, o, count, z, R, f.I, group > 0, bases, t);
      if (!dh) return;
      S* const to = dh + ((o0 + o) * f.I + i0) * R;
      if constexpr (direct) {
        add_to_dH(dw, o, count, z, R, group > 0, to, f.I * R, t);
      } else {
        float* const own = slice + o * dw.is * R;
        add_to_dH(dw, o, count, z, R, group > 0, own, dw.is * R, t);
        if (group == groups - 1)
          for (int64_t k = 0; k < count; ++k)
            pack((const float*)own + k * dw.is * R, 0, 1, to + k * f.I * R, 0, 1, dw.is * R);
      }
    });

    if (!dz.data || chunk < chunks - 1) continue;
    for (int64_t s = 1; s < slots; ++s)
      for (int64_t k = 0; k < Gs * R; ++k) sums[k] += sums[s * G * R + k];
    pack((const float*)sums, R, 1, dz.data + b0 * R, R, Gs, R);
  }
}

// dx, dz, dH and the gradients of the bases; any may be without data. dx is `apply` of g with o and i swapped.
template <class S>
void grads_points(const Factors<S>& f, Rows<S> dx, Rows<S> dz, S* dh, const OfBases& bases, int64_t workspace) {
  if (dx.data) {
    Factors<S> t = f;
    t.x = f.g, t.bias = {};
    std::swap(t.I, t.O), std::swap(t.so, t.si), std::swap(t.base.s0, t.base.s1);
    apply_points(t, (const S*)nullptr, 0, dx, workspace);
  }
  if (dz.data || dh || bases.any()) weight_points(f, dz, dh, bases, workspace);
}

}  // namespace fasthyper
