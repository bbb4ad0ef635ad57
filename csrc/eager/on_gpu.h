// Calls on a GPU whose plan is known: the results are allocated here, and the CUDA kernels are called.
#pragma once

#include <ATen/Context.h>
#include <ATen/ops/empty.h>

#include <array>

#include "calls.h"
#include "plans.h"

namespace fasthyper_eager {

// The operators of csrc/cuda/library.cu.
using ApplyOnGpu = int64_t(
    const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Maybe&, const Maybe&, Tensor, int64_t, bool);
using GradsOnGpu = int64_t(
    const Tensor&, const Maybe&, const Maybe&, const Maybe&, const Maybe&, const Tensor&, const Maybe&, const Maybe&,
    const Maybe&, const Maybe&, const Maybe&, const Maybe&, int64_t, bool);

// An operator of the CUDA kernels, or of their emulator.
template <class Signature, bool APPLY>
const auto& kernels_on_gpu(bool emulated) {
  const auto find = [](const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
  };
  if (emulated) {
    static const auto op = find(APPLY ? "fasthyper_cuda_emulated::apply" : "fasthyper_cuda_emulated::grads");
    return op;
  }
  static const auto op = find(APPLY ? "fasthyper_cuda::apply" : "fasthyper_cuda::grads");
  return op;
}

inline bool takes(string_view backend, string_view schedule) {
  return (backend == "auto" || backend == "cuda") && schedule == "auto";
}

inline bool allows_tf32(const Tensor& x) {
  return x.scalar_type() == at::kFloat &&
         at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
             at::Float32Precision::TF32;
}

inline Tensor run_on_gpu(
    const Tensor& x, const Tensor& z, const Tensor& weight, const Maybe& bias, const Maybe& base_weight,
    const Maybe& base_bias, string_view backend, string_view schedule) {
  if (takes(backend, schedule) && agree(axes.forward, x, z, weight, bias, base_weight, base_bias))
    if (const auto plan =
            plans_on_gpu.find(problem_of(x, weight.size(2), weight.size(0), FORWARD, backend == "cuda"))) {
      auto y = at::empty({x.size(0), x.size(1), weight.size(0)}, x.options());
      kernels_on_gpu<ApplyOnGpu, true>(plan->emulated)
          .call(x, z, weight, bias, base_weight, base_bias, y, plan->workspace, allows_tf32(x));
      return y;
    }
  return forward_op().redispatch(any_device, x, z, weight, bias, base_weight, base_bias, backend, schedule);
}

inline Six run_grads_on_gpu(
    const Tensor& x, const Tensor& z, const Tensor& weight, const Maybe& bias, const Maybe& base_weight,
    const Tensor& g, Mask mask, string_view backend, string_view schedule) {
  if (takes(backend, schedule) && agree(axes.backward, x, z, weight, bias, base_weight, g)) {
    const auto B = x.size(0), N = x.size(1), I = x.size(2), O = weight.size(0), R = weight.size(2);
    int64_t needs = 0;
    for (size_t i = 0; i < mask.size(); ++i) needs |= int64_t(mask[i]) << i;
    if (const auto plan = plans_on_gpu.find(problem_of(x, R, O, needs, backend == "cuda"))) {
      std::array<Maybe, 6> out;
      const std::array<c10::SmallVector<int64_t, 3>, 6> sizes{{{B, N, I}, {B, R}, {O, I, R}, {O, R}, {O, I}, {O}}};
      for (size_t i = 0; i < mask.size(); ++i)
        if (mask[i]) out[i] = at::empty(sizes[i], x.options());
      kernels_on_gpu<GradsOnGpu, false>(plan->emulated)
          .call(
              x, z, weight, bias, base_weight, g, out[0], out[1], out[2], out[3], out[4], out[5], plan->workspace,
              allows_tf32(x));
      const auto made = [&](const Maybe& t) { return t ? *t : at::empty({0}, x.options()); };
      return {made(out[0]), made(out[1]), made(out[2]), made(out[3]), made(out[4]), made(out[5])};
    }
  }
  return backward_op().redispatch(any_device, x, z, weight, bias, base_weight, g, mask, backend, schedule);
}

}  // namespace fasthyper_eager
