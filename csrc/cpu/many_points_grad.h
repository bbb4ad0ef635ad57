// Gradients for instances with many points. dx is `apply` with the roles of o and i swapped; the others come from
// the gradient of W, which is written to memory in chunks that stay in cache.
//
//   dW[b] = g[b]ᵀ x[b]       dz[b,r] = Σ_{o,i} dW[b,o,i] H[o,i,r]       dH[o,i,r] = Σ_b dW[b,o,i] z[b,r]
//   dbase = Σ_b dW[b]        dbias[o,r] = Σ_b (Σ_n g[b,n,o]) z[b,r]     dbase_bias = Σ_b Σ_n g[b,n]
//
// dW is float32; it is converted to T for the products with H and z.
#pragma once

#include "many_points.h"

namespace fasthyper {

constexpr int64_t PRODUCT_POINTS = tile_size(256, LANES);  // points of one product, at most

// A chunk of dW: instances from b0 on, rows o from o0 on, columns i from i0 on. Each instance has `pitch` numbers:
// first os × is numbers of dW, then, if `summed`, os numbers of Σ_n g, which dz needs if `biased`.
struct GradChunk {
  int64_t b0, instances, o0, os, i0, is, pitch;
  bool summed, biased;
  Span<float> data;

  int64_t numbers() const { return os * is; }
  int64_t rows() const { return numbers() + (biased ? os : 0); }
  float* at(int64_t b, int64_t first, int64_t count) const { return data.at(b * pitch + first, count); }
};

// Writes two rows of n numbers as one row of pairs; the second row may be null. `two_rows` has 2 · PANEL floats.
template <class S>
void pair(const S* a, int64_t stride_a, const S* b, int64_t stride_b, int64_t n, BFloat16* to, Span<float> two_rows) {
  if constexpr (std::is_same_v<S, BFloat16>)
    if (stride_a == 1 && (stride_b == 1 || !b)) return interleave(a, b, to, n);
  float *const first = two_rows.at(0, 2 * PANEL), *const second = first + PANEL;
  pack(a, 0, stride_a, first, 0, 1, n);
  if (b) pack(b, 0, stride_b, second, 0, 1, n);
  interleave(first, b ? second : nullptr, to, n);
}

// Loads rows (k, n) of S as a right operand of T with at most PANEL columns; `two_rows` as for `pair`.
template <class S, class T>
void load_panel(const S* src, int64_t s_k, int64_t s_n, int64_t k, int64_t n, Span<T> to, Span<float> two_rows) {
  T* const out = to.at(0, round_k<T>(k) * PANEL);
  if constexpr (std::is_same_v<T, float>) {
    pack(src, s_k, s_n, out, PANEL, k, n, PANEL);
  } else {
    for (int64_t i = 0; i < k; i += 2)
      pair(src + i * s_k, s_n, i + 1 < k ? src + (i + 1) * s_k : nullptr, s_n, n, out + i * PANEL, two_rows);
  }
}

// dW[b,o,i] = Σ_n g[b,n,o] x[b,n,i], and after it Σ_n g[b,n,o].
template <class S, class T>
void compute_dW(const Factors<S>& f, const GradChunk& dw, int64_t workspace) {
  constexpr bool floats = std::is_same_v<S, float> && std::is_same_v<T, float>;
  const int64_t threads = at::get_num_threads(), os = dw.os, is = dw.is;
  int64_t ow = std::min<int64_t>(os, 256), iw = is;
  while (dw.instances * ceil_div(os, ow) * ceil_div(is, iw) < 2 * (threads - 1) && (ow > LANES || iw > PANEL)) {
    if (ow >= iw) ow = ceil_div(ow, 2);
    else iw = round_up(ceil_div(iw, 2), PANEL);
  }
  const int64_t o_units = ceil_div(os, ow), i_units = ceil_div(is, iw);
  const int64_t ns = std::min(f.N, PRODUCT_POINTS), ld = packed_ld(ns);
  const bool narrow = floats && f.x.feature == 1 && f.x.point <= 2 * PANEL;  // x is a right operand without packing
  const double flops = 2. * dw.instances * dw.numbers() * f.N;
  const int64_t of_g = floats_for<T>(ow * ld), of_x = floats_for<T>(round_k<T>(ns) * PANEL);
  for_units<T>(
      dw.instances * o_units * i_units, flops, of_g + of_x + 2 * PANEL, workspace, [&](int64_t unit, auto own) {
        const int64_t b = unit / (o_units * i_units), o = unit / i_units % o_units * ow, M = std::min(ow, os - o);
        const int64_t i = unit % i_units * iw, end = std::min(is, i + iw);
        const Span<T> gt = view_as<T>(own.subspan(0, of_g)), packed = view_as<T>(own.subspan(of_g, of_x));
        for (int64_t n = 0; n < f.N; n += ns) {
          const int64_t K = std::min(ns, f.N - n), q = (dw.b0 + b) * f.N + n;
          const S* const g = f.g.row(q) + (dw.o0 + o) * f.g.feature;
          copy_rows<S, T>(g, f.g.feature, f.g.point, M, K, gt, ld);
          for (int64_t c = i; c < end; c += PANEL) {
            const int64_t width = std::min(PANEL, end - c);
            const S* const x = f.x.row(q) + (dw.i0 + c) * f.x.feature;
            const T* right = nullptr;
            int64_t ld_right = PANEL;
            if constexpr (floats)
              if (narrow) right = x, ld_right = f.x.point;
            if (!right) {
              load_panel<S, T>(x, f.x.point, f.x.feature, K, width, packed, own.subspan(of_g + of_x));
              right = packed.at(0, round_k<T>(K) * PANEL);
            }
            float* const to = dw.at(b, o * is + c, extent(M, is, width));
            gemm(M, width, K, (const T*)gt.at(0, M * ld), ld, right, ld_right, to, is, n > 0);
          }
          if (dw.summed && i == 0) {
            float* const sums = dw.at(b, dw.numbers() + o, M);
            float row[PRODUCT_POINTS];
            for (int64_t k = 0; k < M; ++k) {
              convert(gt.at(k * ld, K), row, K);
              sums[k] = (n > 0 ? sums[k] : 0.f) + sum(row, K);
            }
          }
        }
      });
}

// dz[b,r] += Σ_j dW[b,j] H[j,r] for M instances from b on and a range of slices of j = (o, i), each `depth` long. After
// the numbers of dW, j continues with Σ_n g, and rows of bias take the place of rows of H. `sums` is (B, R). `own`
// holds a slice of H in panels, two rows of it, and M rows of dW.
template <class S, class T>
void add_to_dz(
    const Factors<S>& f, const GradChunk& dw, int64_t b, int64_t M, Range slices, int64_t depth, bool add,
    Span<float> sums, Span<float> own) {
  const int64_t panels = ceil_div(f.R, PANEL), of_h = panels * floats_for<T>(round_k<T>(depth) * PANEL);
  const Span<T> h = view_as<T>(own.subspan(0, of_h)), rows = view_as<T>(own.subspan(of_h + 2 * PANEL));
  const auto row_of = [&](int64_t j) {
    return j < dw.numbers() ? f.h + (dw.o0 + j / dw.is) * f.so + (dw.i0 + j % dw.is) * f.si
                            : f.bias.data + (dw.o0 + j - dw.numbers()) * f.bias.s0;
  };
  const auto stride_of = [&](int64_t j) { return j < dw.numbers() ? f.sr : f.bias.s1; };
  for (int64_t k = slices.begin; k < slices.end; ++k) {
    const int64_t j0 = k * depth, K = std::min(depth, dw.rows() - j0), each = round_k<T>(K) * PANEL;
    for (int64_t j = j0; j < j0 + K; j += K_STEP<T>) {
      const S* const row = row_of(j);
      const int64_t stride = stride_of(j);
      for (int64_t r = 0; r < f.R; r += PANEL) {
        const int64_t width = std::min(PANEL, f.R - r);
        T* const to = h.at(r / PANEL * each + (j - j0) * PANEL, K_STEP<T> * width);
        if constexpr (std::is_same_v<T, float>) {
          pack(row + r * stride, 0, stride, to, 0, 1, width);
        } else {
          const S* const next = j + 1 < j0 + K ? row_of(j + 1) : nullptr;
          const int64_t s_next = next ? stride_of(j + 1) : 0;
          pair(
              row + r * stride, stride, next ? next + r * s_next : nullptr, s_next, width, to,
              own.subspan(of_h, 2 * PANEL));
        }
      }
    }
    const auto a = left_operand<float, T>(dw.at(b, j0, extent(M, dw.pitch, K)), dw.pitch, 1, M, K, rows);
    for (int64_t r = 0; r < f.R; r += PANEL) {
      const int64_t width = std::min(PANEL, f.R - r);
      gemm(
          M, width, K, a.data, a.ld, (const T*)h.at(r / PANEL * each, each), PANEL,
          sums.at(b * f.R + r, extent(M, f.R, width)), f.R, add || k > slices.begin);
    }
  }
}

// out[o,i,r] += Σ_b dW[b,o,i] z[b,r] for `count` rows o from o on, `next` numbers apart. z is a right operand in
// panels. `t` has room for the transpose of these rows of dW.
template <class T>
void add_to_dH(
    const GradChunk& dw, int64_t o, int64_t count, Span<const T> z, int64_t R, bool add, float* out, int64_t next,
    Span<T> t) {
  const int64_t is = dw.is, ld = packed_ld(std::min(dw.instances, GROUP_INSTANCES)),
                panel = round_k<T>(dw.instances) * PANEL;
  const bool contiguous = next == is * R;  // the rows are contiguous
  for (int64_t b = 0; b < dw.instances; b += GROUP_INSTANCES) {
    const int64_t K = std::min(GROUP_INSTANCES, dw.instances - b);
    for (int64_t k = 0; k < count; ++k) {
      const int64_t first = (o + k) * is;
      if constexpr (std::is_same_v<T, float>) {  // in whole squares: the next row overwrites the excess
        const int64_t read = whole_squares(is);
        transpose(dw.at(b, first, extent(K, dw.pitch, read)), dw.pitch, t.at(k * is * ld, read * ld), ld, K, read, ld);
      } else {
        copy_rows<float, T>(
            dw.at(b, first, extent(K, dw.pitch, is)), 1, dw.pitch, is, K, t.subspan(k * is * ld, is * ld), ld);
      }
    }
    for (int64_t r = 0; r < R; r += PANEL)
      for (int64_t k = 0; k < (contiguous ? 1 : count); ++k) {
        const int64_t rows = contiguous ? count * is : is;
        gemm(
            rows, std::min(PANEL, R - r), K, (const T*)t.at(k * is * ld, rows * ld), ld,
            z.at(r / PANEL * panel + b * PANEL, round_k<T>(K) * PANEL), PANEL, out + k * next + r, R, add || b > 0);
      }
  }
}

// Gradients of bias (O, R), base weight (O, I) and base bias (O), in float32. Any may be null.
struct BaseGrads {
  float *bias = nullptr, *base = nullptr, *base_bias = nullptr;

  bool any() const { return bias || base || base_bias; }
};

// out[j] += Σ_b dW[b,j] for `count` numbers of each instance, from `from` on. It adds partial sums of LANES instances,
// which rounds less than one long sum.
inline void sum_over_instances(const GradChunk& dw, int64_t from, int64_t count, bool add, float* out) {
  float partial[PANEL];
  for (int64_t j0 = 0; j0 < count; j0 += PANEL) {
    const int64_t width = std::min(PANEL, count - j0);
    if (!add) std::fill_n(out + j0, width, 0.f);
    for (int64_t b0 = 0; b0 < dw.instances; b0 += LANES) {
      std::fill_n(partial, PANEL, 0.f);
      for (int64_t b = b0; b < std::min(dw.instances, b0 + LANES); ++b) {
        const float* const numbers = dw.at(b, from + j0, width);
        for (int64_t j = 0; j < width; ++j) partial[j] += numbers[j];
      }
      for (int64_t j = 0; j < width; ++j) out[j0 + j] += partial[j];
    }
  }
}

// Adds `count` rows o from o on of a chunk to the base gradients. z is in panels; `t` has count · packed_ld floats.
inline void add_to_base_grads(
    const GradChunk& dw, int64_t o, int64_t count, Span<const float> z, int64_t R, int64_t I, bool add,
    const BaseGrads& to, Span<float> t) {
  for (int64_t k = o; to.base && k < o + count; ++k)
    sum_over_instances(dw, k * dw.is, dw.is, add, to.base + (dw.o0 + k) * I + dw.i0);
  if (!dw.summed) return;
  const int64_t sums = dw.numbers() + o, ld = packed_ld(std::min(dw.instances, GROUP_INSTANCES));
  if (to.base_bias) sum_over_instances(dw, sums, count, add, to.base_bias + dw.o0 + o);
  for (int64_t b = 0; to.bias && b < dw.instances; b += GROUP_INSTANCES) {
    const int64_t K = std::min(GROUP_INSTANCES, dw.instances - b);
    float* const transposed = t.at(0, count * ld);
    for (int64_t k = 0; k < count; ++k)
      for (int64_t l = 0; l < K; ++l) transposed[k * ld + l] = *dw.at(b + l, sums + k, 1);
    for (int64_t r = 0; r < R; r += PANEL)
      gemm(
          count, std::min(PANEL, R - r), K, (const float*)transposed, ld, z.at(r * dw.instances + b * PANEL, K * PANEL),
          PANEL, to.bias + (dw.o0 + o) * R + r, R, add || b > 0);
  }
}

// The division of dW into chunks of `instances` × `o_size` × `i_size`: there are `groups` groups of instances with
// `chunks` chunks each. For dz, the sum over j = (o, i) of a chunk has `splits` partial sums; each product sums `depth`
// numbers j. One unit adds to one partial sum of `unit_instances` instances.
struct GradChunks {
  bool summed, biased, separate;  // Σ_n g is computed; dz needs it; dH is summed in float32 in memory of its own
  int64_t instances, o_size, i_size, pitch;
  int64_t groups, i_ranges, chunks;
  int64_t depth, splits, unit_instances, b_units;

  template <class S>
  GradChunks(const Factors<S>& f, bool wants_dz, bool wants_dh, const BaseGrads& bases, int64_t workspace) {
    const int64_t room = chunk_floats(workspace);
    biased = wants_dz && f.bias.data, summed = biased || bases.bias || bases.base_bias;
    separate = wants_dh && !std::is_same_v<S, float>;
    instances = std::min(f.B, GROUP_INSTANCES), o_size = f.O, i_size = std::min(f.I, tile_size(512));
    halve(room / instances, LANES, PANEL);
    if (separate) halve(room / 2 / f.R, 1, SQUARE);
    pitch = packed_ld(o_size * (i_size + summed) + SQUARE);  // `transpose` reads whole squares
    const bool one_chunk = o_size == f.O && i_size == f.I;
    instances = std::clamp<int64_t>(std::min(room / pitch, room / 4 / f.R), 1, one_chunk ? f.B : instances);
    groups = ceil_div(f.B, instances), i_ranges = ceil_div(f.I, i_size), chunks = ceil_div(f.O, o_size) * i_ranges;
    depth = round_up(std::clamp<int64_t>((1 << 16) / f.R, 16, 256), 2);
    splits = std::clamp<int64_t>(std::min(o_size * i_size / 256, room / 2 / (instances * f.R)), 1, 16);
    const int64_t threads = std::clamp<int64_t>(at::get_num_threads() / splits, 1, ceil_div(instances, 16));
    unit_instances = round_up(ceil_div(instances, threads), 2);
    b_units = ceil_div(instances, unit_instances);
  }

  template <class S>
  GradChunk at(const Factors<S>& f, int64_t group, int64_t chunk, Span<float> data) const {
    const int64_t b0 = group * instances, o0 = chunk / i_ranges * o_size, i0 = chunk % i_ranges * i_size;
    const int64_t bs = std::min(instances, f.B - b0), os = std::min(o_size, f.O - o0), is = std::min(i_size, f.I - i0);
    return {b0, bs, o0, os, i0, is, pitch, summed && i0 == 0, biased && i0 == 0, data};
  }

 private:
  // Halves o_size or i_size, usually the larger one, until their product is at most `most` or both are at their least.
  void halve(int64_t most, int64_t least_o, int64_t least_i) {
    while (o_size * i_size > most && (o_size > least_o || i_size > least_i)) {
      if (o_size > least_o && (o_size >= i_size || i_size <= least_i)) o_size = ceil_div(o_size, 2);
      else i_size = whole_squares(ceil_div(i_size, 2));
    }
  }
};

// dz, dH and the base gradients from dW; any may be null.
template <class S, class T>
class GradsFromdW {
 public:
  GradsFromdW(const Factors<S>& f, const GradChunks& cut, Rows<S> dz, S* dh, const BaseGrads& bases, int64_t workspace)
      : f_(f),
        cut_(cut),
        dz_(dz),
        dh_(dh),
        bases_(bases),
        workspace_(workspace),
        panels_(ceil_div(f.R, PANEL)),
        dw_(cut.instances * cut.pitch),
        dz_sums_(dz.data ? cut.splits * cut.instances * f.R : 0),
        dh_sums_(cut.separate ? cut.o_size * cut.i_size * f.R : 0),
        two_rows_(2 * PANEL),
        z_(dh || bases.bias ? panels_ * round_k<T>(cut.instances) * PANEL : 0) {}

  // With dz, which sums over chunks, all chunks of a group are consecutive; otherwise all groups of a chunk.
  void run() const {
    for (int64_t step = 0; step < cut_.groups * cut_.chunks; ++step) {
      const int64_t group = dz_.data ? step / cut_.chunks : step % cut_.groups;
      const int64_t chunk = dz_.data ? step % cut_.chunks : step / cut_.groups;
      const GradChunk dw = cut_.at(f_, group, chunk, dw_);
      compute_dW<S, T>(f_, dw, workspace_);
      if (z_) load_z_panels(dw);
      add_chunk(dw, chunk > 0, group > 0, group == cut_.groups - 1);
      if (dz_.data && chunk == cut_.chunks - 1) store_dz(dw);
    }
  }

 private:
  static constexpr bool FLOAT = std::is_same_v<S, float>;

  void load_z_panels(const GradChunk& dw) const {
    const int64_t depth = round_k<T>(dw.instances);
    for (int64_t r = 0; r < f_.R; r += PANEL)
      load_panel<S, T>(
          f_.z.data + dw.b0 * f_.z.instance + r * f_.z.feature, f_.z.instance, f_.z.feature, dw.instances,
          std::min(PANEL, f_.R - r), z_.subspan(r * depth, depth * PANEL), two_rows_);
  }

  // Adds a chunk to all gradients: some units to dz, the others to dH and the base gradients.
  void add_chunk(const GradChunk& dw, bool add_dz, bool add_dh, bool last_group) const {
    const int64_t R = f_.R, depth = cut_.depth, M = cut_.unit_instances, slices = ceil_div(dw.rows(), depth);
    const int64_t oh = std::max<int64_t>(1, 128 / dw.is), ld = packed_ld(std::min(dw.instances, GROUP_INSTANCES));
    const int64_t z_units = dz_.data ? cut_.splits * cut_.b_units : 0;
    const int64_t h_units = dh_ || bases_.any() ? ceil_div(dw.os, oh) : 0;
    const int64_t for_z = panels_ * floats_for<T>(depth * PANEL) + 2 * PANEL +
                          (std::is_same_v<T, float> ? 0 : floats_for<T>(M * packed_ld(depth)));
    const int64_t for_h = std::max(floats_for<T>((oh * dw.is + SQUARE) * ld), bases_.bias ? oh * ld : 0);
    const double flops = 2. * dw.instances * dw.numbers() * R * ((z_units > 0) + (h_units > 0));
    for_units<T>(z_units + h_units, flops, std::max(for_z, for_h), workspace_, [&](int64_t unit, auto own) {
      if (unit < z_units) {
        const int64_t b = unit % cut_.b_units * M, split = unit / cut_.b_units, each = cut_.instances * R;
        if (b < dw.instances)
          add_to_dz<S, T>(
              f_, dw, b, std::min(M, dw.instances - b), share(slices, split, cut_.splits), depth, add_dz,
              dz_sums_.subspan(split * each, each), own);
        return;
      }
      const int64_t o = (unit - z_units) * oh, count = std::min(oh, dw.os - o);
      if constexpr (FLOAT) add_to_base_grads(dw, o, count, z_.span(), R, f_.I, add_dh, bases_, own);
      if (!dh_) return;
      S* const to = dh_ + ((dw.o0 + o) * f_.I + dw.i0) * R;
      if constexpr (FLOAT) {
        add_to_dH<T>(dw, o, count, z_.span(), R, add_dh, to, f_.I * R, view_as<T>(own));
      } else {
        const int64_t each = dw.is * R;
        float* const sums = dh_sums_.at(o * each, count * each);
        add_to_dH<T>(dw, o, count, z_.span(), R, add_dh, sums, each, view_as<T>(own));
        if (last_group)
          for (int64_t k = 0; k < count; ++k) pack((const float*)sums + k * each, 0, 1, to + k * f_.I * R, 0, 1, each);
      }
    });
  }

  // Adds up the partial sums of dz for the instances of a chunk, and stores them.
  void store_dz(const GradChunk& dw) const {
    const int64_t numbers = dw.instances * f_.R, each = cut_.instances * f_.R;
    float* const total = dz_sums_.at(0, numbers);
    for (int64_t split = 1; split < cut_.splits; ++split) {
      const float* const partial = dz_sums_.at(split * each, numbers);
      for (int64_t k = 0; k < numbers; ++k) total[k] += partial[k];
    }
    pack((const float*)total, f_.R, 1, dz_.data + dw.b0 * f_.R, f_.R, dw.instances, f_.R);
  }

  const Factors<S>& f_;
  const GradChunks& cut_;
  const Rows<S> dz_;
  S* const dh_;
  const BaseGrads bases_;
  const int64_t workspace_, panels_;
  const Scratch<float> dw_, dz_sums_, dh_sums_, two_rows_;
  const Scratch<T> z_;
};

template <class S, class T>
void grads_from_dW(const Factors<S>& f, Rows<S> dz, S* dh, const BaseGrads& bases, int64_t workspace) {
  const GradChunks cut(f, dz.data, dh, bases, workspace);
  if (cut.separate && dz.data && cut.groups > 1 && cut.chunks > 1) {  // dz sums over chunks, dH over groups: two passes
    grads_from_dW<S, T>(f, dz, nullptr, {}, workspace);
    return grads_from_dW<S, T>(f, {}, dh, {}, workspace);
  }
  GradsFromdW<S, T>(f, cut, dz, dh, bases, workspace).run();
}

// All gradients; any may be null. dx is `apply` to g with o and i swapped.
template <class S, class T>
void grads_many_points(const Factors<S>& f, Rows<S> dx, Rows<S> dz, S* dh, const BaseGrads& bases, int64_t workspace) {
  if (dx.data) {
    Factors<S> t = f;
    t.x = f.g, t.bias = {};
    std::swap(t.I, t.O), std::swap(t.so, t.si), std::swap(t.base.s0, t.base.s1);
    apply_many_points<S, T>(t, (const S*)nullptr, 0, dx, workspace);
  }
  if (dz.data || dh || bases.any()) grads_from_dW<S, T>(f, dz, dh, bases, workspace);
}

}  // namespace fasthyper
