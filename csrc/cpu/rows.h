// `apply`, and dx and dz of `grads`, without products that the points of an instance share: each row q = (b, n) has its
// own x, z and g.
//
//   fold       y = H·(x ⊗ z)                    G = g·H,   dx = G z,   dz = G x
//   generate   W = z·H,   y = W x,   dx = W g   dz = H·(g ⊗ x)
//   project    P = x·H,   y = P z,   dz = P g   dx as generate
//
// `contract` computes W, P and G a tile at a time; `fold` computes the outer products a tile at a time.
#pragma once

#include <ATen/Parallel.h>

#include <bit>

#include "contract.h"
#include "factors.h"

namespace fasthyper {

// The tasks of a call: groups of instances, whose blocks share a tile of H in cache, and, if there are few rows, slices
// of an axis of H. Slices depend on sizes only, so that results do not depend on the number of threads.
struct Tasks {
  int64_t instances, groups, slices, group_rows, grain;

  template <class S>
  Tasks(const Factors<S>& f, int64_t axis, bool summed, int64_t workspace) {
    const int64_t rows = f.B * f.N, blocks = ceil_div(rows, LANES), threads = at::get_num_threads();
    // If an instance has several points, groups split the sums over points. The groups must then not depend on the
    // number of threads, either.
    const int64_t least_groups = f.N > 1 ? 16 : 2 * threads;
    const int64_t floats = std::clamp<int64_t>(workspace / least_groups, 1 << 18, 1 << 22) / int64_t(sizeof(float));
    const int64_t features = f.R + f.I + f.O, fit = std::max<int64_t>(1, floats / (3 * features * LANES));
    slices = 1;
    if (blocks < 16) {
      const int64_t with_enough_work = to_count(f.multiplications() / (2 * THREAD_WORK));
      // Each slice loads the lanes again, and has its own partial sums if slices are summed.
      const int64_t wanted = summed ? std::min<int64_t>(16, f.I * f.O / tile_size(1024)) : 4;
      const int64_t room = summed ? workspace / 4 / (f.B * f.R * int64_t(sizeof(float))) : 4;
      slices = std::max<int64_t>(1, std::min({wanted, axis, with_enough_work, room}));
      slices = std::bit_floor(uint64_t(slices));  // a power of two, so that 2, 4 or 8 threads get equal numbers
    }
    int64_t groups_wanted = round_up(ceil_div(blocks, 32), threads);
    if (slices > 1) groups_wanted = f.N > 1 ? 1 : ceil_div(threads, slices);
    else if (f.N > 1) groups_wanted = std::max<int64_t>(16, ceil_div(blocks, 32));
    int64_t each = ceil_div(blocks, groups_wanted);
    each = std::clamp<int64_t>(fit, 1, each);
    instances = std::max<int64_t>(1, each * LANES / f.N);
    groups = ceil_div(f.B, instances);
    group_rows = each * LANES;
    // Very wide problems leave threads idle, to stay within the workspace.
    const int64_t together = std::max<int64_t>(1, workspace / 2 / (12 * features * LANES * each));
    grain = std::max(ceil_div(groups * slices, together), tasks_per_thread(groups * slices, f.multiplications()));
  }

  // Calls f(slice, first instance, last instance) in parallel.
  template <class T, class F>
  void run(int64_t B, F&& f) const {
    at::parallel_for(0, groups * slices, grain, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t group = t / slices;
        f(t % slices, group * instances, std::min(B, (group + 1) * instances));
      }
      release_matrix_unit<T>();
    });
  }
};

// A factor or a result of a group, in blocks of lanes. A factor is also available as a right operand of T.
template <class T>
class Lanes {
 public:
  Lanes(const Group& group, int64_t features)
      : group_(group), features_(features), lanes_(group.blocks * features * LANES) {}

  template <class S>
  Lanes(const Group& group, const Rows<const S>& t, int64_t q0) : Lanes(group, t.features) {
    for (int64_t k = 0; k < group.blocks && t.features; ++k)
      load_lanes(t, q0 + k * LANES, q0 + k * LANES + group.rows_in(k), at(k));
  }

  Span<float> at(int64_t k) const { return lanes_.subspan(k * features_ * LANES, features_ * LANES); }
  Span<float> all() const { return lanes_; }

  template <class S>
  void store(const Rows<S>& t, int64_t q0) const {
    for (int64_t k = 0; k < group_.blocks; ++k)
      store_lanes<S>(at(k), t, q0 + k * LANES, q0 + k * LANES + group_.rows_in(k));
  }

  Span<const T> right() {
    if constexpr (std::is_same_v<T, float>) {
      return lanes_.span();
    } else {
      const int64_t each = round_k<T>(features_) * LANES;
      if (!operand_) {
        operand_ = Scratch<T>(group_.blocks * each);
        for (int64_t k = 0; k < group_.blocks; ++k)
          fasthyper::right_operand(at(k).at(0, features_ * LANES), operand_.subspan(k * each, each), features_, LANES);
      }
      return operand_.span();
    }
  }

 private:
  Group group_;
  int64_t features_;
  Scratch<float> lanes_;
  Scratch<T> operand_;
};

template <class S, class T>
void apply_rows(
    const Factors<S>& f, const S* base_bias, int64_t base_bias_stride, Rows<S> y, Schedule schedule,
    int64_t workspace) {
  const Tasks tasks(f, schedule == Schedule::fold ? f.O / LANES : f.O, false, workspace);
  tasks.template run<T>(f.B, [&](int64_t slice, int64_t b0, int64_t b1) {
    const Range o = share(f.O, slice, tasks.slices);
    for (int64_t q = b0 * f.N; q < b1 * f.N; q += tasks.group_rows) {
      const Group group(std::min(tasks.group_rows, b1 * f.N - q));
      Lanes<T> x(group, f.x, q), z(group, f.z, q), out(group, o.size());
      for (int64_t k = 0; k < group.blocks; ++k)
        for (int64_t i = 0; i < o.size(); ++i)
          out.at(k)
              .subspan(i * LANES, LANES)
              .fill(base_bias ? float(base_bias[(o.begin + i) * base_bias_stride]) : 0.f);
      if (f.base.data)
        multiply(f.base.data + o.begin * f.base.s0, f.base.s0, f.base.s1, o.size(), f.I, group, x.right(), out.all());
      if (f.bias.data)
        multiply(f.bias.data + o.begin * f.bias.s0, f.bias.s0, f.bias.s1, o.size(), f.R, group, z.right(), out.all());
      if (schedule == Schedule::fold) fold<S, T>(cut_p(f.oir(), o), group, x.all(), z.all(), out.all());
      else if (schedule == Schedule::generate)
        contract<S, T>(cut_p(f.oir(), o), group, z.right(), {}, x.all(), out.all(), {});
      else contract<S, T>(cut_p(f.ori(), o), group, x.right(), {}, z.all(), out.all(), {});
      out.store(y.columns(o.begin, o.end), q);
    }
  });
}

// dz[b] += Σ_n lanes[b,n], for the rows q0 to q1 of a block; dz begins with instance b0.
inline void sum_over_points(
    Span<const float> lanes, int64_t features, int64_t q0, int64_t q1, int64_t points, int64_t b0, Span<float> dz) {
  const float* const from = lanes.at(0, features * LANES);
  for (int64_t q = q0; q < q1;) {
    const int64_t b = q / points, end = std::min(q1, (b + 1) * points);
    float* const to = dz.at((b - b0) * features, features);
    for (int64_t r = 0; r < features; ++r) {
      float sum = 0;
      for (int64_t k = q; k < end; ++k) sum += from[r * LANES + (k - q0)];
      to[r] += sum;
    }
    q = end;
  }
}

// dx and dz; either may be null.
template <class S, class T>
void grads_rows(const Factors<S>& f, Rows<S> dx, Rows<S> dz, Schedule schedule, int64_t workspace) {
  const bool one_pass = schedule == Schedule::fold;
  const Tasks tasks(f, one_pass || dx.data ? f.I : f.R, dz.data && one_pass, workspace);
  const bool summed_slices = dz.data && one_pass && tasks.slices > 1;
  const bool summed = dz.data && (f.N > 1 || summed_slices);
  const int64_t dz_size = f.B * f.R;  // numbers in dz
  const Scratch<float> partial(summed_slices ? tasks.slices * dz_size : 0);
  tasks.template run<T>(f.B, [&](int64_t slice, int64_t b0, int64_t b1) {
    const Range i = dx.data || one_pass ? share(f.I, slice, tasks.slices) : Range{0, f.I};
    const Range r = one_pass ? Range{0, f.R} : share(f.R, slice, tasks.slices);
    const Scratch<float> group_sums(summed && !summed_slices ? (b1 - b0) * r.size() : 0);
    Span<float> sums = group_sums;
    if (summed_slices) sums = partial.subspan(slice * dz_size + b0 * f.R, (b1 - b0) * f.R);
    if (summed) sums.fill(0.f);
    for (int64_t q = b0 * f.N; q < b1 * f.N; q += tasks.group_rows) {
      const Group group(std::min(tasks.group_rows, b1 * f.N - q));
      Lanes<T> g(group, f.g, q), out_x(group, dx.data ? i.size() : 0), out_z(group, dz.data ? r.size() : 0);
      out_x.all().fill(0.f);
      out_z.all().fill(0.f);
      if (dx.data && f.base.data)
        multiply(f.base.data + i.begin * f.base.s1, f.base.s1, f.base.s0, i.size(), f.O, group, g.right(), out_x.all());
      if (dz.data && f.bias.data && (!one_pass || slice == 0))
        multiply(f.bias.data + r.begin * f.bias.s1, f.bias.s1, f.bias.s0, r.size(), f.O, group, g.right(), out_z.all());
      if (one_pass) {
        Lanes<T> x(group, dz.data ? f.x.columns(i.begin, i.end) : f.x.columns(0, 0), q);
        Lanes<T> z(group, dx.data ? f.z : f.z.columns(0, 0), q);
        contract<S, T>(cut_p(f.iro(), i), group, g.right(), x.all(), z.all(), out_x.all(), out_z.all());
      } else {
        if (dx.data) {
          Lanes<T> z(group, f.z, q);
          contract<S, T>(cut_q(f.oir(), i), group, z.right(), g.all(), {}, {}, out_x.all());
        }
        if (dz.data && r.size()) {  // there may be more slices of I than features of z
          Lanes<T> x(group, f.x, q);
          if (schedule == Schedule::generate) fold<S, T>(cut_p(f.roi(), r), group, g.all(), x.all(), out_z.all());
          else contract<S, T>(cut_q(f.ori(), r), group, x.right(), g.all(), {}, {}, out_z.all());
        }
      }
      if (dx.data) out_x.store(dx.columns(i.begin, i.end), q);
      if (summed_slices && f.N == 1)
        out_z.store(Rows<float>{partial.at(slice * dz_size, dz_size), f.R, 0, 1, 1, f.R}, q);
      else if (summed)
        for (int64_t k = 0; k < group.blocks; ++k)
          sum_over_points(out_z.at(k), r.size(), q + k * LANES, q + k * LANES + group.rows_in(k), f.N, b0, sums);
      else if (dz.data) out_z.store(dz.columns(r.begin, r.end), q);
    }
    if (summed && !summed_slices)
      pack(
          group_sums.at(0, group_sums.span().size()), r.size(), 1, dz.data + b0 * f.R + r.begin, f.R, b1 - b0,
          r.size());
  });
  if (!summed_slices) return;
  float* const sum = partial.at(0, dz_size);
  at::parallel_for(0, dz_size, 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t s = 1; s < tasks.slices; ++s) {
      const float* const addend = partial.at(s * dz_size, dz_size);
      for (int64_t k = begin; k < end; ++k) sum[k] += addend[k];
    }
  });
  pack((const float*)sum, f.R, 1, dz.data, f.R, f.B, f.R);
}

}  // namespace fasthyper
