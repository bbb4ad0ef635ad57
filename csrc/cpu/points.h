// `generate` where an instance has many points: W is written out, as much of it at a time as stays in cache.
//
//   W[b,o,i] = Σ_r H[o,i,r] z[b,r] + base[o,i]       y[b] = x[b] W[b]ᵀ + bias z[b] + base_bias       dx[b] = g[b] W[b]
//   dW[b] = g[b]ᵀ x[b]       dz[b,r] = Σ_{o,i} dW[b,o,i] H[o,i,r]       dH[o,i,r] = Σ_b dW[b,o,i] z[b,r]
//
// All in float32. Each step has two parallel regions: one makes a piece of W or dW for a group of instances, the other
// uses it. Sums are cut by sizes alone, so that the number of threads changes no bit.
#pragma once

#include <atomic>

#include "rows.h"

namespace fasthyper {

constexpr int64_t PANEL = 32;  // columns of a right operand
constexpr int64_t GROUP = 128;  // instances that meet a piece of H together

// Calls f(unit, scratch) for all units. Threads take the next as they get free; `flops` says how many are worth it.
template <class F>
void for_units(int64_t units, int64_t flops, int64_t floats, int64_t workspace, F&& f) {
  const int64_t fit = workspace / 2 / (floats * int64_t(sizeof(float)));
  const int64_t threads = std::min({int64_t(at::get_num_threads()), units, fit, flops >> 18});
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::max<int64_t>(1, threads), 1, [&](int64_t, int64_t) {
    const Scratch<float> scratch(floats);
    for (int64_t unit; (unit = next++) < units;) f(unit, (float*)scratch);
    at::native::cpublas::brgemm_release();
  });
}

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Floats of a piece of W or dW.
inline int64_t piece(int64_t workspace) {
  return std::clamp<int64_t>(workspace / 16, 1 << 16, 1 << 20);
}

constexpr int64_t ROWS = 512;  // of H that are generated at a time

// w[b·ld_b + q·ld_q + p] = Σ_c h[p,q,c] z[c,b] + base[p,q]; h may be without data. `t` holds p·q·lanes floats, and
// `packed` ROWS·64.
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
  const int64_t depth = readable<S, float>(h.sc, h.c) ? h.c : std::min(h.c, std::max<int64_t>(64, (1 << 15) / rows / 8 * 8));
  for (int64_t run = 0; h.data && run < runs; ++run)
    for (int64_t c = 0; c < h.c; c += depth) {
      const int64_t cs = std::min(depth, h.c - c);
      const auto a = left<S, float>(h.data + run * next + c * h.sc, stride, h.sc, rows, cs, packed);
      for (int64_t k = 0; k < group.blocks; ++k)
        gemm(rows, group.width(k), cs, a.data, a.ld, z + (k * h.c + c) * LANES, LANES,
             t + k * each + run * rows * LANES, LANES, base.data || c > 0);
    }
  for (int64_t k = 0; k < group.blocks; ++k)
    for (int64_t q = 0; q < h.q; ++q)
      transpose(t + k * each + q * tq, tp, w + k * LANES * ld_b + q * ld_q, ld_b, h.p, group.width(k), round_up(h.p, 8));
}

template <class S>
void apply_points(const Factors<S>& f, const S* base_bias, int64_t base_bias_stride, Rows<S> y, int64_t workspace) {
  const bool shifted = f.bias.data || base_bias;
  const int64_t K = f.I + shifted, room = piece(workspace);  // what y starts from is a last row of W
  const int64_t P = std::min(8 * K * PANEL > room ? 8 : PANEL, round_up(f.O, 8));
  const int64_t pitch = K * P + 16;  // of instances: not a power of two
  const int64_t groups = ceil_div(f.B, std::clamp<int64_t>(room / std::max(K * P, f.R) / 8 * 8, 8, GROUP));
  const int64_t each = groups == 1 ? f.B : round_up(ceil_div(f.B, groups), 8), lanes = round_up(each, 8);
  const int64_t panels = ceil_div(f.O, P), at_once = std::clamp<int64_t>(room / (lanes * pitch), 1, panels);
  Scratch<float> w(at_once * lanes * pitch), z(round_up(each, LANES) * f.R);
  const Rows<const S> z_rows{f.z.data, f.z.instance, 0, f.z.feature, 1, f.R};
  // H is cut along its slower axis, so that rows which lie one after another stay together
  const int64_t ow = f.so < f.si ? P : 8, iw = std::min(f.I, ROWS / ow);
  const int64_t o_units = ceil_div(P, ow), i_units = ceil_div(f.I, iw) + shifted;
  constexpr bool direct = std::is_same_v<S, float>;
  const bool read = readable<S, float>(f.x.feature, f.I);
  const int64_t rows = std::min(f.N, read ? 256 : std::clamp<int64_t>((1 << 16) / f.I, 1, 256)), n_units = ceil_div(f.N, rows);
  for (int64_t b0 = 0; b0 < f.B; b0 += each) {
    const Group group{ceil_div(std::min(each, f.B - b0), LANES), std::min(each, f.B - b0)};
    for (int64_t k = 0; k < group.blocks; ++k)
      load_lanes(z_rows, b0 + k * LANES, b0 + std::min(group.rows, (k + 1) * LANES), z + k * f.R * LANES);
    for (int64_t p0 = 0; p0 < panels; p0 += at_once) {
      const int64_t ps = std::min(at_once, panels - p0);
      const auto panel = [&](int64_t p) { return Range{(p0 + p) * P, std::min(f.O, (p0 + p + 1) * P)}; };
      const int64_t flops = 2 * group.rows * ps * P * f.I;
      for_units(ps * o_units * i_units, flops * f.R, ROWS * (group.blocks * LANES + 64), workspace, [&](int64_t unit, float* t) {
        const int64_t p = unit / (o_units * i_units), i = unit % i_units * iw;
        const int64_t o = panel(p).begin + unit / i_units % o_units * ow, os = std::min(ow, panel(p).end - o);
        float* const to = w + p * lanes * pitch + (o - panel(p).begin);
        float* const packed = t + ROWS * group.blocks * LANES;
        if (os <= 0) return;
        if (unit % i_units < i_units - shifted) {
          const Head<S> h{f.h + o * f.so + i * f.si, os, std::min(iw, f.I - i), f.R, f.so, f.si, f.sr};
          const Matrix<S> base{f.base.data ? f.base.data + o * f.base.s0 + i * f.base.s1 : nullptr, f.base.s0, f.base.s1};
          generate(h, base, group, z, to + i * P, pitch, P, t, packed);
        } else {
          const Head<S> h{f.bias.data ? f.bias.data + o * f.bias.s0 : nullptr, os, 1, f.R, f.bias.s0, 0, f.bias.s1};
          const Matrix<S> base{base_bias ? base_bias + o * base_bias_stride : nullptr, base_bias_stride, 0};
          generate(h, base, group, z, to + f.I * P, pitch, P, t, packed);
        }
      });
      const int64_t parts = group.rows * n_units < 2 * at::get_num_threads() ? ps : 1;
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
          if constexpr (direct) c = y.row(q) + o.begin;
          const int64_t ldc = direct ? f.O : PANEL;
          for (int64_t k = 0; shifted && k < ns; ++k) std::memcpy(c + k * ldc, wb + f.I * P, o.size() * sizeof(float));
          gemm(ns, o.size(), f.I, x.data, x.ld, wb, P, c, ldc, shifted);
          if constexpr (!direct) pack((const float*)out, PANEL, 1, y.row(q) + o.begin, f.O, ns, o.size());
        }
      });
    }
  }
}

constexpr int64_t POINTS = 256;  // that one product contracts

// dz and dH; either may be without data.
template <class S>
void weight_points(const Factors<S>& f, Rows<S> dz, S* dh, int64_t workspace) {
  constexpr bool direct = std::is_same_v<S, float>;
  const int64_t room = piece(workspace), RP = round_up(f.R, 8), r_panels = ceil_div(f.R, PANEL);
  const bool biased = dz.data && f.bias.data, sliced = dh && !direct;
  int64_t o_size = f.O, i_size = std::min<int64_t>(f.I, 512), G = std::min({f.B, GROUP, std::max<int64_t>(8, room / RP)});
  while (o_size * round_up(i_size, 8) > room / std::max(G, sliced ? f.R : 1) && (o_size > 32 || i_size > 32)) {
    if (o_size >= i_size) o_size = ceil_div(o_size, 2);
    else i_size = round_up(ceil_div(i_size, 2), 8);
  }
  const int64_t IP = round_up(i_size, 8), pitch = o_size * (IP + biased) + 16;
  G = std::clamp<int64_t>(room / pitch, 1, G);
  const int64_t groups = ceil_div(f.B, G), o_parts = ceil_div(f.O, o_size), i_parts = ceil_div(f.I, i_size);
  const int64_t chunks = o_parts * i_parts;
  if (sliced && dz.data && groups > 1 && chunks > 1) {  // either sum would wait for the other
    weight_points(f, dz, (S*)nullptr, workspace);
    return weight_points(f, {}, dh, workspace);
  }
  const int64_t depth = std::clamp<int64_t>((1 << 16) / RP, 16, 256);  // rows of H that one product contracts
  const int64_t slots = std::clamp<int64_t>(std::min(o_size * IP / 256, room / (G * RP)), 1, 16);
  const int64_t M = slots < 8 ? std::min(G, LANES) : G, m_units = ceil_div(G, M), lanes = round_up(G, 8);
  Scratch<float> dw(G * pitch), sums(dz.data ? slots * G * RP : 0), z(dh ? r_panels * G * PANEL : 0);
  Scratch<float> slice(sliced ? o_size * i_size * f.R : 0);
  for (int64_t step = 0; step < groups * chunks; ++step) {
    const int64_t group = dz.data ? step / chunks : step % groups, chunk = dz.data ? step % chunks : step / groups;
    const int64_t b0 = group * G, Gs = std::min(G, f.B - b0);
    const Range o{chunk / i_parts * o_size, std::min(f.O, (chunk / i_parts + 1) * o_size)};
    const Range i{chunk % i_parts * i_size, std::min(f.I, (chunk % i_parts + 1) * i_size)};
    const int64_t os = o.size(), is = i.size(), ip = round_up(is, 8), J = os * ip, flops = 2 * Gs * J;
    const bool summed = biased && i.begin == 0;

    // dW[b,o,i] = Σ_n g[b,n,o] x[b,n,i], and Σ_n g[b,n,o] after it
    int64_t ow = std::min<int64_t>(os, 256), iw = ip;
    while (Gs * ceil_div(os, ow) * ceil_div(ip, iw) < 2 * at::get_num_threads() && (ow > 32 || iw > PANEL)) {
      if (ow >= iw) ow = ceil_div(ow, 2);
      else iw = round_up(ceil_div(iw, 2), PANEL);
    }
    const int64_t o_units = ceil_div(os, ow), i_units = ceil_div(ip, iw);
    const int64_t ns = std::min(f.N, POINTS), ld = packed_ld<float>(ns);
    for_units(Gs * o_units * i_units, flops * f.N, ow * ld + ns * PANEL, workspace, [&](int64_t unit, float* gt) {
      const int64_t b = unit / (o_units * i_units), o0 = unit / i_units % o_units * ow, count = std::min(ow, os - o0);
      const int64_t i0 = unit % i_units * iw, i1 = std::min(ip, i0 + iw);
      float* const to = dw + b * pitch;
      float* const xp = gt + ow * ld;
      for (int64_t n = 0; n < f.N; n += ns) {
        const int64_t depth = std::min(ns, f.N - n), q = (b0 + b) * f.N + n;
        pack(f.g.row(q) + (o.begin + o0) * f.g.feature, f.g.feature, f.g.point, gt, ld, count, depth, ld);
        for (int64_t c = i0; c < i1; c += PANEL) {
          const int64_t width = std::min(PANEL, i1 - c), used = std::min(width, is - c);
          pack(f.x.row(q) + (i.begin + c) * f.x.feature, f.x.point, f.x.feature, xp, width, depth, used, width);
          for (int64_t k = 0; used < width && k < depth; ++k) std::fill(xp + k * width + used, xp + (k + 1) * width, 0.f);
          gemm(count, width, depth, gt, ld, xp, width, to + o0 * ip + c, ip, n > 0);
        }
        for (int64_t k = 0; summed && i0 == 0 && k < count; ++k) {
          float sum = n > 0 ? to[J + o0 + k] : 0.f;
          for (int64_t l = 0; l < depth; ++l) sum += gt[k * ld + l];
          to[J + o0 + k] = sum;
        }
      }
    });

    for (int64_t r = 0; dh && r < f.R; r += PANEL)
      pack(f.z.data + b0 * f.z.instance + r * f.z.feature, f.z.instance, f.z.feature, z + r * Gs, PANEL, Gs,
           std::min(PANEL, f.R - r), PANEL);
    const int64_t z_units = dz.data ? slots * m_units : 0, JB = J + (summed ? os : 0), blocks = ceil_div(JB, depth);
    const int64_t oh = std::max<int64_t>(1, 128 / is), h_units = dh ? ceil_div(os, oh) : 0;
    const int64_t floats = std::max(depth * (r_panels * PANEL), (oh * is + 8) * lanes);
    for_units(z_units + h_units, flops * f.R * ((z_units > 0) + (h_units > 0)), floats, workspace, [&](int64_t unit, float* t) {
      if (unit < z_units) {  // dz[b,r] += Σ_{o,i} dW[b,o,i] H[o,i,r]
        const int64_t b = unit % m_units * M, count = std::min(M, Gs - b), slot = unit / m_units;
        const Range own = share(blocks, slot, slots);
        for (int64_t k = own.begin; count > 0 && k < own.end; ++k) {
          const int64_t j0 = k * depth, js = std::min(depth, JB - j0);
          for (int64_t j = 0; j < js; ++j) {
            const int64_t row = j0 + j, oj = o.begin + (row < J ? row / ip : row - J), ij = row % ip;
            const S* const src = row < J ? f.h + oj * f.so + (i.begin + ij) * f.si : f.bias.data + oj * f.bias.s0;
            for (int64_t r = 0; r < f.R; r += PANEL) {
              const int64_t sr = row < J ? f.sr : f.bias.s1, width = std::min(PANEL, RP - r);
              float* const to = t + r * js + j * width;
              if (row < J && ij >= is) std::fill(to, to + width, 0.f);
              else pack(src + r * sr, 0, sr, to, 0, 1, std::min(width, f.R - r));
            }
          }
          for (int64_t r = 0; r < f.R; r += PANEL) {
            const int64_t width = std::min(PANEL, RP - r);
            gemm(count, width, js, dw + b * pitch + j0, pitch, t + r * js, width, sums + (slot * G + b) * RP + r, RP,
                 chunk > 0 || k > own.begin);
          }
        }
      } else {  // dH[o,i,r] += Σ_b dW[b,o,i] z[b,r]
        const int64_t o0 = (unit - z_units) * oh, count = std::min(oh, os - o0), ld = round_up(Gs, 8);
        for (int64_t k = 0; k < count; ++k)  // what is written beyond i is overwritten by the next
          transpose(dw + (o0 + k) * ip, pitch, t + k * is * ld, ld, Gs, ip, ld);
        float* c;
        const int64_t run = sliced ? is : f.I;
        if constexpr (direct) c = dh + ((o.begin + o0) * f.I + i.begin) * f.R;
        else c = slice + o0 * is * f.R;
        for (int64_t r = 0; r < f.R; r += PANEL) {
          const int64_t width = std::min(PANEL, f.R - r);
          if (run == is) gemm(count * is, width, Gs, t, ld, z + r * Gs, PANEL, c + r, f.R, group > 0);
          else
            for (int64_t k = 0; k < count; ++k)
              gemm(is, width, Gs, t + k * is * ld, ld, z + r * Gs, PANEL, c + k * run * f.R + r, f.R, group > 0);
        }
        if (sliced && group == groups - 1)
          for (int64_t k = 0; k < count; ++k)
            pack((const float*)c + k * is * f.R, 0, 1, dh + ((o.begin + o0 + k) * f.I + i.begin) * f.R, 0, 1, is * f.R);
      }
    });

    if (!dz.data || chunk < chunks - 1) continue;
    for (int64_t s = 1; s < slots; ++s)
      for (int64_t k = 0; k < Gs * RP; ++k) sums[k] += sums[s * G * RP + k];
    pack((const float*)sums, RP, 1, dz.data + b0 * f.R, f.R, Gs, f.R);
  }
}

// dx, dz and dH; any may be without data. dx is `apply` of g with o and i swapped.
template <class S>
void grads_points(const Factors<S>& f, Rows<S> dx, Rows<S> dz, S* dh, int64_t workspace) {
  if (dx.data) {
    Factors<S> t = f;
    t.x = f.g, t.bias = {};
    std::swap(t.I, t.O), std::swap(t.so, t.si), std::swap(t.base.s0, t.base.s1);
    apply_points(t, (const S*)nullptr, 0, dx, workspace);
  }
  if (dz.data || dh) weight_points(f, dz, dh, workspace);
}

}  // namespace fasthyper
