// The operators of torch.ops.fasthyper_cpu for functions of the generated weights, with one point of each instance.
// Python has checked the sizes of the tensors; none is zero.
#pragma once

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "mapped.h"
#include "tensors.h"

namespace fasthyper {
namespace {

// x (B, I), z (B, R), H (O, I, R), W0 (O, I), g (B, O). Operands that the call lacks are null.
Mapped mapped_operands(
    const at::Tensor& x, const at::Tensor& z, const at::Tensor& weight, const std::optional<at::Tensor>& base,
    const at::Tensor* g) {
  for (const auto* t : {&x, &z, &weight})
    TORCH_CHECK_TYPE(t->scalar_type() == at::kFloat, "tensors must be float32, got ", t->scalar_type());
  const int64_t O = weight.size(0), I = weight.size(1), so = weight.stride(0), si = weight.stride(1);
  Mapped f{z.size(0), z.size(1), O, I, weight.const_data_ptr<float>(), so, si};
  TORCH_CHECK_VALUE(
      weight.stride(2) == 1 && so >= f.R && si >= f.R, "rows of weight must be contiguous, got strides ",
      weight.strides());
  TORCH_CHECK_VALUE(z.stride(1) == 1 && z.stride(0) >= f.R, "rows of z must be contiguous, got strides ", z.strides());
  const auto rows = [](const at::Tensor& t) -> Rows<const float> {
    return {t.const_data_ptr<float>(), t.stride(0), 0, t.stride(1), 1, t.size(1)};
  };
  f.z = rows(z);
  f.p = g ? rows(*g) : Rows<const float>{nullptr, 0, 0, 0, 1, 0};
  f.q = rows(x);
  if (base) f.base = {base->const_data_ptr<float>(), base->stride(0), base->stride(1)};
  f.outputs_first = so >= si;
  if (!f.outputs_first) {
    std::swap(f.np, f.nq), std::swap(f.sp, f.sq), std::swap(f.p, f.q);
    std::swap(f.base.s0, f.base.s1);
  }
  if (f.nq == 1) f.sq = f.sp;
  return f;
}

at::Tensor mapped_apply(
    const at::Tensor& x, const at::Tensor& z, const at::Tensor& weight, const std::optional<at::Tensor>& base,
    c10::string_view map, int64_t workspace) {
  const auto y = at::empty({x.size(0), weight.size(0)}, x.options());
  const auto held_x = realigned(x), held_z = realigned(z), held_weight = realigned(weight);
  const auto held_base = realigned(base);
  const Mapped f = mapped_operands(held_x, held_z, held_weight, held_base, nullptr);
  with_map(map, [&](auto m) { apply_mapped<decltype(m)>(f, y.mutable_data_ptr<float>(), workspace); });
  return y;
}

// Gradients of x, z, H and W0 where the mask is set.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> mapped_grads(
    const at::Tensor& x, const at::Tensor& z, const at::Tensor& weight, const std::optional<at::Tensor>& base,
    const at::Tensor& g, std::array<bool, 4> mask, c10::string_view map, int64_t workspace) {
  const auto held_x = realigned(x), held_z = realigned(z), held_weight = realigned(weight), held_g = realigned(g);
  const auto held_base = realigned(base);
  const Mapped f = mapped_operands(held_x, held_z, held_weight, held_base, &held_g);
  const int64_t O = weight.size(0), I = weight.size(1), R = weight.size(2), B = x.size(0);
  at::Tensor dx, dz, dh, dbase;
  const auto allocate = [&](bool wanted, at::Tensor& t, at::IntArrayRef shape) {
    if (wanted) t = at::empty(shape, x.options());
    return wanted ? t.mutable_data_ptr<float>() : nullptr;
  };
  const MappedGrads to{
      allocate(mask[0], dx, {B, I}), allocate(mask[1], dz, {B, R}), allocate(mask[2], dh, {O, I, R}),
      allocate(mask[3], dbase, {O, I})};
  with_map(map, [&](auto m) { grads_mapped<decltype(m)>(f, to, workspace); });
  return {dx, dz, dh, dbase};
}

TORCH_LIBRARY_FRAGMENT(fasthyper_cpu, m) {
  m.def(
      "mapped_apply(Tensor x, Tensor z, Tensor weight, Tensor? base_weight, str map, int workspace) -> Tensor",
      mapped_apply);
  m.def(
      "mapped_grads(Tensor x, Tensor z, Tensor weight, Tensor? base_weight, Tensor g, bool[4] mask, str map, "
      "int workspace) -> (Tensor, Tensor, Tensor, Tensor)",
      mapped_grads);
}

}  // namespace
}  // namespace fasthyper
