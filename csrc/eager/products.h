// The products of derivatives of derivatives with W, and those with the head that write W out and contract its
// gradient: on the kernels of the family where they beat torch's, or else on torch's.
//
//   y[b] = x[b] W[b]ᵀ     dx[b] = g[b] W[b]     dW[b] = g[b]ᵀ x[b]     W[b] = H·z[b] + W0
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>

#include <atomic>

namespace products {

using at::Tensor;
using c10::string_view;
using Maybe = std::optional<Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline std::atomic<int64_t> workspace{1 << 25};  // the limit, as Python last said

// The kernels of torch.ops.fasthyper_cpu.
using Apply = Tensor(
    const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Maybe&, const Maybe&, string_view, int64_t, bool);
using Grads =
    Six(const Tensor&, const Maybe&, const Maybe&, const Maybe&, const Maybe&, const Tensor&, std::array<bool, 6>,
        string_view, string_view, int64_t, bool);
using ApplyModels = Tensor(const Tensor&, const Tensor&, const Tensor&, string_view, int64_t, bool);
using GradsModels = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor&, const Maybe&, const Maybe&, const Tensor&, std::array<bool, 3>, string_view, string_view, int64_t,
    bool);

template <class Signature>
auto kernel(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Whether the kernels may run: they are there, and no transform or mode of torch has to see the products.
inline bool plain(const Tensor& a, const Tensor& b) {
  static const bool loaded = c10::Dispatcher::singleton().findSchema({"fasthyper_cpu::grads_models", ""}).has_value();
  const auto& local = c10::impl::tls_local_dispatch_key_set().included_;
  if (local.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) || local.has(c10::DispatchKey::Python)) return false;
  for (const Tensor* t : {&a, &b})
    if (t->scalar_type() != at::kFloat || !t->is_cpu() || t->key_set().has(c10::DispatchKey::Python) ||
        t->key_set().has(c10::DispatchKey::Functionalize) || torch::autograd::isFwGradDefined(*t))
      return false;
  return loaded;
}

constexpr int64_t MANY = 256;      // points
constexpr int64_t SOME = 64;       // points for the left operands of the layer's own product
constexpr int64_t WIDE = 64;       // features
constexpr int64_t INSTANCES = 16;  // rows of a product with the head

inline Tensor ones(const Tensor& like, int64_t points) {
  return at::ones({1, 1, 1}, like.options()).expand({like.size(0), points, 1});
}

// Each function has its derivatives by the other one, so that the pair has all orders.
Tensor multiply(const Tensor& a, const Tensor& w, bool transposed);
Tensor sum_outer(const Tensor& g, const Tensor& x);

struct Multiply : torch::autograd::Function<Multiply> {
  static constexpr bool is_traceable = true;

  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& a, const Tensor& w, bool transposed) {
    ctx->save_for_backward({a, w});
    ctx->saved_data["transposed"] = transposed;
    return multiply(a, w, transposed);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grad) {
    const auto saved = ctx->get_saved_variables();
    const bool transposed = ctx->saved_data["transposed"].toBool();
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    torch::autograd::variable_list out(3);
    if (ctx->needs_input_grad(0)) out[0] = multiply(grad[0], saved[1], !transposed);
    if (ctx->needs_input_grad(1)) out[1] = transposed ? sum_outer(grad[0], saved[0]) : sum_outer(saved[0], grad[0]);
    return out;
  }
};

struct SumOuter : torch::autograd::Function<SumOuter> {
  static constexpr bool is_traceable = true;

  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& g, const Tensor& x) {
    ctx->save_for_backward({g, x});
    return sum_outer(g, x);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grad) {
    const auto saved = ctx->get_saved_variables();
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    torch::autograd::variable_list out(2);
    if (ctx->needs_input_grad(0)) out[0] = multiply(saved[1], grad[0], true);
    if (ctx->needs_input_grad(1)) out[1] = multiply(saved[0], grad[0], false);
    return out;
  }
};

inline bool records(const Tensor& a, const Tensor& b) {
  return at::GradMode::is_enabled() && (a.requires_grad() || b.requires_grad());
}

// a[b] W[b]ᵀ if transposed, or else a[b] W[b].
inline Tensor multiply(const Tensor& a, const Tensor& w, bool transposed) {
  const auto N = a.size(1), K = a.size(2), Q = w.size(transposed ? 1 : 2);
  const bool many = N >= MANY || (N >= SOME && transposed && Q >= WIDE);
  if (!(many && K >= WIDE && Q > 1 && plain(a, w))) return at::bmm(a, transposed ? w.mT() : w);
  if (records(a, w)) return Multiply::apply(a, w, transposed);
  static const auto run = kernel<ApplyModels>("fasthyper_cpu::apply_models");
  const at::AutoDispatchBelowAutograd guard;
  const auto head = (transposed ? w : w.mT()).unsqueeze(3);
  return run.call(a.unsqueeze(2), ones(a, N), head, "fold", workspace, false).squeeze(2);
}

// g[b]ᵀ x[b].
inline Tensor sum_outer(const Tensor& g, const Tensor& x) {
  const auto N = x.size(1), I = x.size(2), O = g.size(2);
  const bool large = O * I >= 1 << 14 || I < 8;
  if (!(N >= MANY && O >= WIDE && I > 1 && large && plain(g, x))) return at::bmm(g.mT(), x);
  if (records(g, x)) return SumOuter::apply(g, x);
  static const auto run = kernel<GradsModels>("fasthyper_cpu::grads_models");
  const at::AutoDispatchBelowAutograd guard;
  const auto made = run.call(
      x.unsqueeze(2), ones(x, N), std::nullopt, g.unsqueeze(2), {false, false, true}, "fold", "fold", workspace, false);
  return std::get<2>(made).squeeze(3);
}

// W, without a graph.
inline Tensor generate(const Tensor& z, const Tensor& weight, const Maybe& base_weight) {
  const auto B = z.size(0), O = weight.size(0), I = weight.size(1), R = weight.size(2);
  if (B >= INSTANCES && plain(z, weight)) {
    static const auto run = kernel<Apply>("fasthyper_cpu::apply");
    const auto base = base_weight ? Maybe(base_weight->reshape({O * I, 1})) : std::nullopt;
    const at::AutoDispatchBelowAutograd guard;
    return run
        .call(ones(z, 1), z, weight.reshape({O * I, 1, R}), std::nullopt, base, std::nullopt, "fold", workspace, false)
        .view({B, O, I});
  }
  const auto base = base_weight ? Maybe(base_weight->reshape({O * I})) : std::nullopt;
  return at::linear(z, weight.reshape({O * I, R}), base).view({B, O, I});
}

// The gradients of z and H by that of W.
inline std::pair<Tensor, Tensor> contract(
    const Tensor& dw, const Tensor& z, const Tensor& weight, bool of_z, bool of_weight) {
  const auto B = dw.size(0), O = dw.size(1), I = dw.size(2);
  Tensor dz, dh;
  const Tensor& other = of_z ? weight : z;
  if (B >= INSTANCES && (of_z || of_weight) && !at::GradMode::is_enabled() && plain(dw, other)) {
    const auto R = other.size(-1);
    static const auto run = kernel<Grads>("fasthyper_cpu::grads");
    const at::AutoDispatchBelowAutograd guard;
    const auto head = of_z ? Maybe(weight.reshape({O * I, 1, R})) : std::nullopt;
    const auto made = run.call(
        ones(dw, 1), of_weight ? Maybe(z) : std::nullopt, head, std::nullopt, std::nullopt, dw.reshape({B, 1, O * I}),
        {false, of_z, of_weight, false, false, false}, "fold", "generate", workspace, false);
    if (of_z) dz = std::get<1>(made);
    if (of_weight) dh = std::get<2>(made).view({O, I, R});
    return {dz, dh};
  }
  const auto flat = dw.reshape({B, O * I});
  if (of_z) dz = at::matmul(flat, weight.reshape({O * I, -1}));
  if (of_weight) dh = at::matmul(flat.mT(), z).view({O, I, -1});
  return {dz, dh};
}

}  // namespace products
