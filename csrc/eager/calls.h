// A call of fasthyper::hyper_linear or of its gradients: the ops, and what a call tells about itself.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include <array>

namespace fasthyper_eager {

using at::Tensor;
using c10::DispatchKeySet;
using c10::string_view;
using Maybe = std::optional<Tensor>;
using Mask = std::array<bool, 6>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Forward = Tensor(
    const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Maybe&, const Maybe&, string_view, string_view);
using Backward =
    Six(const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Maybe&, const Tensor&, Mask, string_view,
        string_view);

inline const auto& forward_op() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fasthyper::hyper_linear", "").typed<Forward>();
  return op;
}

inline const auto& backward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fasthyper::hyper_linear_grads", "").typed<Backward>();
  return op;
}

// The shadowed kernels are registered for every autograd key, AutogradOther included.
inline DispatchKeySet shadowed(DispatchKeySet keys) {
  return (keys & c10::after_autograd_keyset) | DispatchKeySet(c10::DispatchKey::AutogradOther);
}

// The key of the kernels that fasthyper/ops registers for every device. They check the arguments, make a plan and store
// it here.
inline const DispatchKeySet any_device(c10::DispatchKey::PrivateUse1);

inline bool recorded(const Tensor& t) { return t.defined() && t.requires_grad(); }

inline bool recorded(const Maybe& t) { return t && recorded(*t); }

inline bool dual(const Tensor& t) { return torch::autograd::isFwGradDefined(t); }

inline bool dual(const Maybe& t) { return t && dual(*t); }

// torch.func includes its keys while a transform is active.
inline bool transformed() {
  return c10::impl::tls_local_dispatch_key_set().included_.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// Whether a subclass of torch.Tensor handles calls with t, such as a DTensor, or a tracer's tensor.
inline bool in_python(const Tensor& t) { return t.key_set().has(c10::DispatchKey::Python); }

inline bool in_python(const Maybe& t) { return t && in_python(*t); }

// Whether backend and schedule have been chosen, and no transform or forward mode is active.
template <class... Tensors>
inline bool plain(string_view backend, string_view schedule, const Tensors&... tensors) {
  return !backend.empty() && !schedule.empty() && !transformed() && !(dual(tensors) || ...);
}

}  // namespace fasthyper_eager
