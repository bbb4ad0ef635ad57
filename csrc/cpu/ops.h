// The operators of torch.ops.fasthyper_cpu. Python has checked the tensors' sizes; none is zero.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "one_output.h"
#include "many_points_grad.h"
#include "weight_grad.h"
#include "tensors.h"

namespace fasthyper {
namespace {

Schedule parse_schedule(c10::string_view name) {
  if (name == "fold") return Schedule::fold;
  return name == "generate" ? Schedule::generate : Schedule::project;
}

template <class S>
Rows<const S> rows(const at::Tensor& t) {
  return {t.const_data_ptr<S>(), t.stride(0), t.stride(1), t.stride(2), t.size(1), t.size(2)};
}

template <class S>
Rows<const S> repeated(const at::Tensor& z, int64_t points) {
  return {z.const_data_ptr<S>(), z.stride(0), 0, z.stride(1), points, z.size(1)};
}

template <class S>
Rows<S> out(const at::Tensor& t) {
  if (!t.defined()) return {nullptr, 0, 0, 0, 1, 0};
  const int64_t points = t.dim() == 3 ? t.size(1) : 1, features = t.size(-1);
  return {t.mutable_data_ptr<S>(), points * features, features, 1, points, features};
}

template <class S>
Matrix<S> matrix(const std::optional<at::Tensor>& t) {
  if (!t) return {};
  return {t->const_data_ptr<S>(), t->stride(0), t->stride(1)};
}

// Calls f(S{}, T{}): S is the dtype of the tensors, T that of the products' operands.
template <class F>
void with_types(const at::Tensor& x, bool native, F&& f) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return f(float{}, float{});
    case at::kBFloat16:
      return native && multiplies_bfloat16() ? f(BFloat16{}, BFloat16{}) : f(BFloat16{}, float{});
    case at::kHalf:
      return f(Half{}, float{});
    default:
      TORCH_CHECK_TYPE(false, "x must be float32, bfloat16 or float16, got ", x.scalar_type());
  }
}

template <class S, class T>
void grads_of_factors(const Factors<S>& f, Rows<S> dx, Rows<S> dz, Schedule schedule, int64_t workspace) {
  if constexpr (std::is_same_v<S, float>)
    if (is_one_output(f, schedule)) return grads_one_output(f, dx, dz);
  grads_rows<S, T>(f, dx, dz, schedule, workspace);
}

template <class S, class T>
void apply_layer(
    const Factors<S>& f, const S* base_bias, int64_t stride, Rows<S> y, Schedule schedule, int64_t workspace) {
  if constexpr (std::is_same_v<S, float>)
    if (is_one_output(f, schedule)) return apply_one_output(f, base_bias, y);
  if (f.N > 1 && schedule == Schedule::generate) apply_many_points<S, T>(f, base_bias, stride, y, workspace);
  else apply_rows<S, T>(f, base_bias, stride, y, schedule, workspace);
}

// Those of dx, dz and dH that are not null. `bases` are only computed with many points and `generate`.
template <class S, class T>
void grads_layer(
    const Factors<S>& f, Rows<S> dx, Rows<S> dz, S* dh, const BaseGrads& bases, Schedule schedule,
    Schedule schedule_of_weight, int64_t workspace) {
  if (f.N > 1 && schedule == Schedule::generate) return grads_many_points<S, T>(f, dx, dz, dh, bases, workspace);
  if (dx.data || dz.data) grads_of_factors<S, T>(f, dx, dz, schedule, workspace);
  if (dh) weight_grad<S, T>(f, dh, schedule_of_weight, workspace);
}

at::Tensor apply(
    const at::Tensor& x, const at::Tensor& z, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& base_weight, const std::optional<at::Tensor>& base_bias, c10::string_view schedule,
    int64_t workspace, bool native) {
  if (!(aligned(x) && aligned(z) && aligned(weight) && aligned(bias) && aligned(base_weight) && aligned(base_bias)))
    return apply(
        realigned(x), realigned(z), realigned(weight), realigned(bias), realigned(base_weight), realigned(base_bias),
        schedule, workspace, native);
  const auto y = at::empty({x.size(0), x.size(1), weight.size(0)}, x.options());
  with_types(x, native, [&](auto s, auto t) {
    using S = decltype(s);
    Factors<S> f{x.size(0), x.size(1), z.size(1), x.size(2), weight.size(0)};
    f.x = rows<S>(x);
    f.z = repeated<S>(z, f.N);
    f.h = weight.const_data_ptr<S>(), f.so = weight.stride(0), f.si = weight.stride(1), f.sr = weight.stride(2);
    f.bias = matrix<S>(bias), f.base = matrix<S>(base_weight);
    const S* const b0 = base_bias ? base_bias->const_data_ptr<S>() : nullptr;
    const int64_t stride = b0 ? base_bias->stride(0) : 0;
    apply_layer<S, decltype(t)>(f, b0, stride, out<S>(y), parse_schedule(schedule), workspace);
  });
  return y;
}

using SixTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Gradients of x, z, H, bias, base weight and base bias where the mask is set. Those of the last three may be undefined
// even if the mask is set: they are computed only together with a sum that is computed anyway.
SixTensors grads(
    const at::Tensor& x, const std::optional<at::Tensor>& z, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& base_weight, const at::Tensor& g,
    std::array<bool, 6> mask, c10::string_view schedule, c10::string_view schedule_of_weight, int64_t workspace,
    bool native) {
  if (!(aligned(x) && aligned(z) && aligned(weight) && aligned(bias) && aligned(base_weight) && aligned(g)))
    return grads(
        realigned(x), realigned(z), realigned(weight), realigned(bias), realigned(base_weight), realigned(g), mask,
        schedule, schedule_of_weight, workspace, native);
  const int64_t B = x.size(0), N = x.size(1), I = x.size(2), O = g.size(2), R = z ? z->size(1) : weight->size(2);
  at::Tensor dx, dz, dh, dbias, dbase, dbase_bias;
  if (mask[0]) dx = at::empty({B, N, I}, x.options());
  if (mask[1]) dz = at::empty({B, R}, x.options());
  if (mask[2]) dh = at::empty({O, I, R}, x.options());
  with_types(x, native, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    Factors<S> f{B, N, R, I, O};
    f.x = rows<S>(x), f.g = rows<S>(g);
    if (z) f.z = repeated<S>(*z, N);
    if (weight)
      f.h = weight->const_data_ptr<S>(), f.so = weight->stride(0), f.si = weight->stride(1), f.sr = weight->stride(2);
    f.bias = matrix<S>(bias), f.base = matrix<S>(base_weight);
    S* const to_h = mask[2] ? dh.mutable_data_ptr<S>() : nullptr;
    const Schedule order = parse_schedule(schedule);
    BaseGrads bases;
    if constexpr (std::is_same_v<S, float>) {
      const auto allocate = [&](bool wanted, at::Tensor& t, at::IntArrayRef shape) {
        if (wanted) t = at::empty(shape, x.options());
        return wanted ? t.mutable_data_ptr<float>() : nullptr;
      };
      if (N > 1 && order == Schedule::generate)
        bases = {
            allocate(mask[3], dbias, {O, R}), allocate(mask[4], dbase, {O, I}), allocate(mask[5], dbase_bias, {O})};
    }
    grads_layer<S, T>(f, out<S>(dx), out<S>(dz), to_h, bases, order, parse_schedule(schedule_of_weight), workspace);
  });
  return {dx, dz, dh, dbias, dbase, dbase_bias};
}

TORCH_LIBRARY(fasthyper_cpu, m) {
  m.def("multiplies_bfloat16() -> bool", multiplies_bfloat16);
  m.def(
      "apply(Tensor x, Tensor z, Tensor weight, Tensor? bias, Tensor? base_weight, Tensor? base_bias, str schedule, "
      "int workspace, bool native) -> Tensor",
      apply);
  m.def(
      "grads(Tensor x, Tensor? z, Tensor? weight, Tensor? bias, Tensor? base_weight, Tensor g, bool[6] mask, "
      "str schedule, str schedule_of_weight, int workspace, bool native) -> (Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor)",
      grads);
}

}  // namespace
}  // namespace fasthyper
