// The operators of torch.ops.fasthyper_cpu for M layers of the same sizes, each with its own factors: the kernels of
// one layer, once for each. Python has checked the sizes of the tensors; none is zero. Any stride along M may be 0.
#pragma once

#include "ops.h"

namespace fasthyper {
namespace {

constexpr int64_t MODELS_TOGETHER = 16;          // that run in parallel, at most
constexpr double LARGE_MODEL = double(1 << 24);  // multiplications of a layer that uses all threads well by itself

// Calls f(m, workspace) for all models: small ones in parallel if there are as many as threads, each with its share of
// the workspace. The share depends on sizes only, so that results do not depend on the number of threads.
template <class F>
void for_models(int64_t models, double multiplications, int64_t workspace, F&& f) {
  const bool small = multiplications < LARGE_MODEL;
  const int64_t share = small ? std::max<int64_t>(1 << 20, workspace / MODELS_TOGETHER) : workspace;
  const int64_t fit = std::max<int64_t>(1, workspace / share), threads = at::get_num_threads();
  if (!small || models < threads) {
    for (int64_t m = 0; m < models; ++m) f(m, share);
    return;
  }
  const int64_t grain = std::max(tasks_per_thread(models, multiplications * double(models)), ceil_div(models, fit));
  at::parallel_for(0, models, grain, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) f(m, share);
  });
}

// Rows of one model.
template <class S>
Rows<const S> rows_of_model(const at::Tensor& t, int64_t m) {
  const S* const data = t.const_data_ptr<S>() + m * t.stride(0);
  return {data, t.stride(1), t.stride(2), t.stride(3), t.size(2), t.size(3)};
}

template <class S>
Rows<const S> repeated_of_model(const at::Tensor& z, int64_t points, int64_t m) {
  return {z.const_data_ptr<S>() + m * z.stride(0), z.stride(1), 0, z.stride(2), points, z.size(2)};
}

// Rows of one model of a contiguous output, with `points` and `features`.
template <class S>
Rows<S> out_of_model(const at::Tensor& t, int64_t m, int64_t points, int64_t features) {
  if (!t.defined()) return {nullptr, 0, 0, 0, 1, 0};
  return {t.mutable_data_ptr<S>() + m * t.stride(0), points * features, features, 1, points, features};
}

template <class S>
void set_head(Factors<S>& f, const at::Tensor& weight, int64_t m) {
  f.h = weight.const_data_ptr<S>() + m * weight.stride(0);
  f.so = weight.stride(1), f.si = weight.stride(2), f.sr = weight.stride(3);
}

at::Tensor apply_models(
    const at::Tensor& x, const at::Tensor& z, const at::Tensor& weight, c10::string_view schedule, int64_t workspace,
    bool native) {
  if (!(aligned(x) && aligned(z) && aligned(weight)))
    return apply_models(realigned(x), realigned(z), realigned(weight), schedule, workspace, native);
  const int64_t M = x.size(0), N = x.size(2), O = weight.size(1);
  const auto y = at::empty({M, x.size(1), N, O}, x.options());
  const Schedule order = parse_schedule(schedule);
  with_types(x, native, [&](auto s, auto t) {
    using S = decltype(s);
    Factors<S> sizes{x.size(1), N, z.size(2), x.size(3), O};
    for_models(M, sizes.multiplications(), workspace, [&](int64_t m, int64_t share) {
      Factors<S> f = sizes;
      f.x = rows_of_model<S>(x, m), f.z = repeated_of_model<S>(z, N, m);
      set_head(f, weight, m);
      apply_layer<S, decltype(t)>(f, nullptr, 0, out_of_model<S>(y, m, N, O), order, share);
    });
  });
  return y;
}

// Gradients of x, z and H where the mask is set.
std::tuple<at::Tensor, at::Tensor, at::Tensor> grads_models(
    const at::Tensor& x, const std::optional<at::Tensor>& z, const std::optional<at::Tensor>& weight,
    const at::Tensor& g, std::array<bool, 3> mask, c10::string_view schedule, c10::string_view schedule_of_weight,
    int64_t workspace, bool native) {
  if (!(aligned(x) && aligned(z) && aligned(weight) && aligned(g)))
    return grads_models(
        realigned(x), realigned(z), realigned(weight), realigned(g), mask, schedule, schedule_of_weight, workspace,
        native);
  const int64_t M = x.size(0), B = x.size(1), N = x.size(2), I = x.size(3), O = g.size(3);
  const int64_t R = z ? z->size(2) : weight->size(3);
  at::Tensor dx, dz, dh;
  if (mask[0]) dx = at::empty({M, B, N, I}, x.options());
  if (mask[1]) dz = at::empty({M, B, R}, x.options());
  if (mask[2]) dh = at::empty({M, O, I, R}, x.options());
  const Schedule order = parse_schedule(schedule), order_of_weight = parse_schedule(schedule_of_weight);
  with_types(x, native, [&](auto s, auto t) {
    using S = decltype(s);
    const Factors<S> sizes{B, N, R, I, O};
    for_models(M, sizes.multiplications(), workspace, [&](int64_t m, int64_t share) {
      Factors<S> f = sizes;
      f.x = rows_of_model<S>(x, m), f.g = rows_of_model<S>(g, m);
      if (z) f.z = repeated_of_model<S>(*z, N, m);
      if (weight) set_head(f, *weight, m);
      S* const to_h = mask[2] ? dh.mutable_data_ptr<S>() + m * O * I * R : nullptr;
      grads_layer<S, decltype(t)>(
          f, out_of_model<S>(dx, m, N, I), out_of_model<S>(dz, m, 1, R), to_h, {}, order, order_of_weight, share);
    });
  });
  return {dx, dz, dh};
}

TORCH_LIBRARY_FRAGMENT(fasthyper_cpu, m) {
  m.def(
      "apply_models(Tensor x, Tensor z, Tensor weight, str schedule, int workspace, bool native) -> Tensor",
      apply_models);
  m.def(
      "grads_models(Tensor x, Tensor? z, Tensor? weight, Tensor g, bool[3] mask, str schedule, str schedule_of_weight, "
      "int workspace, bool native) -> (Tensor, Tensor, Tensor)",
      grads_models);
}

}  // namespace
}  // namespace fasthyper
