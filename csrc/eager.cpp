// Plain calls of fasthyper::hyper_linear on a CPU or a GPU, without a step through Python. That step takes most of the
// time of a small problem.
//
// A call is plain in eager reverse mode: no torch.func transform, no dual numbers, no gradient of a gradient, no forced
// backend or schedule, and a problem that was planned before. All other calls continue to the kernels that
// fasthyper/ops registers for every device and every autograd key, and that the kernels here shadow.
#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "eager/derivatives.h"
#include "eager/on_gpu.h"
#include "eager/plans.h"

namespace fasthyper_eager {

Tensor hyper_linear(
    DispatchKeySet keys, const Tensor& x, const Tensor& z, const Tensor& weight, const Maybe& bias,
    const Maybe& base_weight, const Maybe& base_bias, string_view backend, string_view schedule) {
  const bool traced = in_python(x) || in_python(z) || in_python(weight) || in_python(bias) || in_python(base_weight) ||
                      in_python(base_bias);
  if (traced || !plain(backend, schedule, x, z, weight, bias, base_weight, base_bias))
    return forward_op().redispatch(shadowed(keys), x, z, weight, bias, base_weight, base_bias, backend, schedule);
  const auto below = keys & c10::after_autograd_keyset;
  const bool records = at::GradMode::is_enabled() && (recorded(x) || recorded(z) || recorded(weight) ||
                                                      recorded(bias) || recorded(base_weight) || recorded(base_bias));
  if (records)
    return HyperLinear::apply(
        x, z, weight, HyperLinear::node_of_w(x, z, weight, base_weight), bias, base_weight, base_bias,
        int64_t(below.raw_repr()), backend, schedule);
  const at::AutoDispatchBelowAutograd guard;
  return forward_op().redispatch(below, x, z, weight, bias, base_weight, base_bias, backend, schedule);
}

Six hyper_linear_grads(
    DispatchKeySet keys, const Tensor& x, const Tensor& z, const Tensor& weight, const Maybe& bias,
    const Maybe& base_weight, const Tensor& g, Mask mask, string_view backend, string_view schedule) {
  const bool records = at::GradMode::is_enabled() && (recorded(x) || recorded(z) || recorded(weight) ||
                                                      recorded(bias) || recorded(base_weight) || recorded(g));
  if (records || !plain(backend, schedule, x, z, weight, bias, base_weight, g))
    return backward_op().redispatch(shadowed(keys), x, z, weight, bias, base_weight, g, mask, backend, schedule);
  const at::AutoDispatchBelowAutograd guard;
  return backward_op().redispatch(
      keys & c10::after_autograd_keyset, x, z, weight, bias, base_weight, g, mask, backend, schedule);
}

bool chosen_here(string_view backend, string_view schedule) {
  return (backend == "auto" || backend == "cpu") && schedule == "auto";
}

using Apply = Tensor(
    const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Maybe&, const Maybe&, string_view, int64_t, bool);
using Grads =
    Six(const Tensor&, const Maybe&, const Maybe&, const Maybe&, const Maybe&, const Tensor&, Mask, string_view,
        string_view, int64_t, bool);

Tensor run(
    const Tensor& x, const Tensor& z, const Tensor& weight, const Maybe& bias, const Maybe& base_weight,
    const Maybe& base_bias, string_view backend, string_view schedule) {
  if (chosen_here(backend, schedule) && agree(axes.forward, x, z, weight, bias, base_weight, base_bias))
    if (const auto plan = plans.find(problem_of(x, weight.size(2), weight.size(0), FORWARD))) {
      static const auto apply =
          c10::Dispatcher::singleton().findSchemaOrThrow("fasthyper_cpu::apply", "").typed<Apply>();
      return apply.call(x, z, weight, bias, base_weight, base_bias, plan->schedule, plan->workspace, plan->native);
    }
  return forward_op().redispatch(any_device, x, z, weight, bias, base_weight, base_bias, backend, schedule);
}

Six run_grads(
    const Tensor& x, const Tensor& z, const Tensor& weight, const Maybe& bias, const Maybe& base_weight,
    const Tensor& g, Mask mask, string_view backend, string_view schedule) {
  const bool of_base = mask[3] || mask[4] || mask[5];
  const auto may_come_along = [&] { return x.size(1) > 1 && x.scalar_type() == at::kFloat; };
  if (chosen_here(backend, schedule) && agree(axes.backward, x, z, weight, bias, base_weight, g) &&
      (!of_base || may_come_along()))
    if (const auto plan = plans.find(problem_of(x, weight.size(2), weight.size(0), needs_of(mask)));
        plan && (!of_base || plan->schedule == "generate")) {
      static const auto grads =
          c10::Dispatcher::singleton().findSchemaOrThrow("fasthyper_cpu::grads", "").typed<Grads>();
      auto made = grads.call(
          x, z, weight, bias, base_weight, g, mask, plan->schedule, plan->schedule_of_weight, plan->workspace,
          plan->native);
      std::apply([&](auto&... t) { ((t = t.defined() ? t : at::empty({0}, x.options())), ...); }, made);
      return made;
    }
  return backward_op().redispatch(any_device, x, z, weight, bias, base_weight, g, mask, backend, schedule);
}

constexpr int64_t KEPT = -1;  // for `needs`: whether W is kept

bool keeps(const Tensor& x, const Tensor& weight) {
  const auto problem = problem_of(x, weight.size(2), weight.size(0), KEPT);
  if (const auto known = plans.find(problem)) return known->workspace > 0;
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fasthyper_eager::room", "")
                             .typed<int64_t(const Tensor&, const Tensor&)>();
  const auto limit = op.call(x, weight);
  if (limit > 0) products::workspace = limit;
  plans.remember(problem, {"", "", limit, false});
  return limit > 0;
}

void remember(
    const Tensor& x, int64_t R, int64_t O, int64_t needs, string_view schedule, string_view schedule_of_weight,
    int64_t workspace, bool native) {
  plans.remember(
      problem_of(x, R, O, needs), {std::string(schedule), std::string(schedule_of_weight), workspace, native});
}

// Casts t to the dtype of the autocast region, through the region's cache, which keeps one copy of each parameter.
Tensor cached_cast(const Tensor& t) {
  const auto device = t.device().type();
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), t, device);
}

// A bit for each input of the node whose backward runs in this thread: whether this pass asks for its gradient. torch's
// function for Python raises for leaves, which takes longer than a small backward.
int64_t asked() {
  const auto node = torch::autograd::get_current_node();
  int64_t bits = 0;
  for (size_t edge = 0; node && edge < std::min<size_t>(node->num_outputs(), 63); ++edge)
    bits |= int64_t(node->task_should_compute_output(edge)) << edge;
  return bits;
}

TORCH_LIBRARY_IMPL(fasthyper, AutogradCPU, m) {
  m.impl("hyper_linear", hyper_linear);
  m.impl("hyper_linear_grads", hyper_linear_grads);
}

TORCH_LIBRARY_IMPL(fasthyper, AutogradCUDA, m) {
  m.impl("hyper_linear", hyper_linear);
  m.impl("hyper_linear_grads", hyper_linear_grads);
}

TORCH_LIBRARY_IMPL(fasthyper, CUDA, m) {
  m.impl("hyper_linear", run_on_gpu);
  m.impl("hyper_linear_grads", run_grads_on_gpu);
}

TORCH_LIBRARY_IMPL(fasthyper, CPU, m) {
  m.impl("hyper_linear", run);
  m.impl("hyper_linear_grads", run_grads);
}

TORCH_LIBRARY(fasthyper_eager, m) {
  m.def(
      "remember(Tensor x, int R, int O, int needs, str schedule, str schedule_of_weight, int workspace, bool native)"
      " -> ()",
      remember);
  m.def("room(Tensor x, Tensor weight) -> int");
  m.def(
      "remember_on_gpu(Tensor x, int R, int O, int needs, bool forced, int workspace, bool emulated) -> ()",
      [](const Tensor& x, int64_t R, int64_t O, int64_t needs, bool forced, int64_t workspace, bool emulated) {
        plans_on_gpu.remember(problem_of(x, R, O, needs, forced), {workspace, emulated});
      });
  m.def("forget() -> ()", [] { plans.forget(), plans_on_gpu.forget(); });
  m.def("declare_axes(str[] names, str[] letters) -> ()", declare_axes);
  m.def("declare_reads(int[] reads) -> ()", declare_reads);
  m.def("cached_cast(Tensor t) -> Tensor", cached_cast);
  m.def("asked() -> int", asked);
}

}  // namespace fasthyper_eager
