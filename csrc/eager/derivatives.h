// The derivatives of plain calls: what a call saves, and W as a node of autograd's graph where derivatives of
// derivatives share it.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/full.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>

#include "calls.h"
#include "products.h"

namespace fasthyper_eager {

// For each argument of hyper_linear, a bit for each argument that its gradient reads: `rules.READS`.
inline std::vector<int64_t> reads(6, 63);

inline void declare_reads(const std::vector<int64_t>& declared) {
  TORCH_CHECK(declared.size() == 6, "reads must have 6 numbers, got ", declared.size());
  reads = declared;
}

// Whether a problem keeps W for derivatives of derivatives: Python decides, and its answers are stored here.
inline bool keeps(const Tensor& x, const Tensor& weight);

// The node of W[b] = H·z[b] + W0: it adds up the gradients of W, and contracts their sum with H and z. A gradient that
// is differentiated writes out W, and only then this node keeps z, H and W.
struct Generate : torch::autograd::Function<Generate> {
  static constexpr bool is_traceable = true;

  static Tensor forward(
      torch::autograd::AutogradContext* ctx, const Tensor& z, const Tensor& weight, const Maybe& base_weight) {
    ctx->set_materialize_grads(false);
    ctx->saved_data["given"] = 2 * weight.size(2) + base_weight.has_value();
    const std::array<int64_t, 3> sizes{z.size(0), weight.size(0), weight.size(1)}, strides{};
    return z.is_cpu() ? at::detail::empty_strided_cpu(sizes, strides, z.options())
                      : at::empty_strided(sizes, strides, z.options());
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grad) {
    torch::autograd::variable_list out(3);
    if (!grad[0].defined()) return out;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto saved = ctx->get_saved_variables();
    const auto given = ctx->saved_data["given"].toInt(), B = grad[0].size(0), O = grad[0].size(1), I = grad[0].size(2),
               R = given / 2;
    if (saved.empty()) {  // in compiled autograd, which has no undefined gradients
      const auto zero = grad[0].new_zeros({});
      return {zero.expand({B, R}), zero.expand({O, I, R}), given % 2 ? zero.expand({O, I}) : Tensor()};
    }
    std::tie(out[0], out[1]) =
        products::contract(grad[0], saved[0], saved[1], ctx->needs_input_grad(0), ctx->needs_input_grad(1));
    if (given % 2 && ctx->needs_input_grad(2)) out[2] = grad[0].sum(0);
    return out;
  }
};

// W as a gradient of `call` meets it: the node of W, if the call has one that can be used, and W, if it is written out.
struct Written {
  torch::autograd::CppNode<Generate>* node = nullptr;
  Tensor w;
  bool kept = false;

  explicit Written(torch::autograd::CppNode<Generate>* node_of_w) : node(node_of_w) {
    if (node == nullptr) return;
    try {
      const auto saved = node->ctx_.get_saved_variables();
      if ((kept = saved.size() == 3)) w = saved[2];
    } catch (const c10::Error&) {  // freed
      node = nullptr;
    }
  }

  void keep(const Tensor& z, const Tensor& weight) {
    node->ctx_.save_for_backward({z, weight, w});
    node->save_variables_to_ctx();
    kept = true;
  }
};

struct HyperLinear : torch::autograd::Function<HyperLinear> {
  // The edge to the node of W, if the call has one.
  static constexpr size_t EDGE_OF_W = 3;

  static constexpr bool is_traceable = true;  // compiled autograd may trace backward, which calls one op
  static constexpr const char* SHAPES[] = {"x", "z", "weight"};

  static Tensor forward(
      torch::autograd::AutogradContext* ctx, const Tensor& x, const Tensor& z, const Tensor& weight,
      const Tensor& /*w*/, const Maybe& bias, const Maybe& base_weight, const Maybe& base_bias, int64_t keys,
      string_view backend, string_view schedule) {
    const bool needed[] = {recorded(x),    recorded(z),           recorded(weight),
                           recorded(bias), recorded(base_weight), recorded(base_bias)};
    int64_t read = 0;  // by the gradients of this call
    for (size_t i = 0; i < 6; ++i) read |= needed[i] ? reads[i] : 0;
    const Tensor given[] = {x, z, weight, bias.value_or(Tensor()), base_weight.value_or(Tensor())};
    torch::autograd::variable_list saved(5);
    for (size_t i = 0; i < saved.size(); ++i)
      if (read >> i & 1) saved[i] = given[i];
      else if (i < 3) ctx->saved_data[SHAPES[i]] = given[i].sizes().vec();
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["backend"] = std::string(backend);
    ctx->saved_data["schedule"] = std::string(schedule);
    ctx->saved_data["given"] =
        int64_t(7 | bias.has_value() << 3 | base_weight.has_value() << 4 | base_bias.has_value() << 5);
    const at::AutoDispatchBelowAutograd guard;
    return forward_op().redispatch(
        DispatchKeySet(DispatchKeySet::RAW, keys), x, z, weight, bias, base_weight, base_bias, backend, schedule);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grad) {
    auto saved = ctx->get_saved_variables();
    for (size_t i = 0; i < 3; ++i)  // an argument that no gradient reads has its shape, and NaN as its values
      if (!saved[i].defined())
        saved[i] = at::full({}, NAN, grad[0].options()).expand(ctx->saved_data[SHAPES[i]].toIntVector());
    const auto given = [](const Tensor& t) { return t.defined() ? Maybe(t) : std::nullopt; };
    const Maybe bias = given(saved[3]), base_weight = given(saved[4]);
    const int64_t is_there = ctx->saved_data["given"].toInt();
    Mask mask{};
    size_t edge = 0;  // one for each tensor that is not absent
    for (size_t i = 0; i < mask.size(); ++i) {
      if (edge == EDGE_OF_W) ++edge;
      mask[i] = (is_there >> i & 1) && ctx->needs_input_grad(edge++);
    }
    const auto written = of_w(saved, bias, base_weight, grad[0], mask[0], ctx->saved_data);
    const bool to_w = written.kept;
    auto asked = to_w ? Mask{mask[0]} : mask;
    torch::autograd::variable_list all(mask.size());
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    if (asked[0] && written.w.defined()) {
      all[0] = products::multiply(grad[0], written.w, false);
      asked[0] = false;
    }
    if (std::any_of(asked.begin(), asked.end(), [](bool m) { return m; })) {
      const auto out = backward_op().call(
          saved[0], saved[1], saved[2], bias, base_weight, grad[0], asked, ctx->saved_data["backend"].toStringView(),
          ctx->saved_data["schedule"].toStringView());
      auto made = std::apply([](auto&... t) { return torch::autograd::variable_list{t...}; }, out);
      for (size_t i = 0; i < mask.size(); ++i)
        if (asked[i]) all[i] = std::move(made[i]);
    }
    Tensor dw;
    if (to_w) {
      if (torch::autograd::get_current_node()->task_should_compute_output(EDGE_OF_W))
        dw = products::sum_outer(grad[0], saved[0]);
      const auto of_bias = mask[5] || mask[3] || (mask[1] && bias) ? grad[0].sum(1) : Tensor();
      if (mask[1] && bias) all[1] = at::matmul(of_bias, *bias);
      if (mask[3]) all[3] = at::matmul(of_bias.mT(), saved[1]);
      if (mask[5]) all[5] = of_bias.sum(0);
    } else if (torch::autograd::get_current_node() == nullptr) {  // compiled autograd has no undefined gradients
      dw = at::zeros({}, grad[0].options()).expand({saved[0].size(0), grad[0].size(2), saved[0].size(2)});
    }
    all.insert(all.begin() + EDGE_OF_W, dw);
    all.resize(10);  // keys and strings have no gradient
    return all;
  }

  // Return what stands for W in a call that is recorded: a node, or a tensor without one if W is not kept. Tensors
  // that Python traces have no memory.
  static Tensor node_of_w(const Tensor& x, const Tensor& z, const Tensor& weight, const Maybe& base_weight) {
    static const Tensor none = at::detail::empty_cpu({0}, at::kFloat);
    const auto traced = c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::Functionalize});
    if (x.key_set().has_any(traced) || z.key_set().has_any(traced) || weight.key_set().has_any(traced)) return none;
    const bool checked = x.dim() == 3 && z.dim() == 2 && weight.dim() == 3 && x.scalar_type() == z.scalar_type();
    if (!checked || x.size(1) < 2) return none;
    if (!(recorded(z) || recorded(weight) || recorded(base_weight)) || !keeps(x, weight)) return none;
    return Generate::apply(z, weight, base_weight);
  }

 private:
  // Return W for the gradient that runs: with the node of W as its own if the gradient is differentiated.
  static Written of_w(
      const torch::autograd::variable_list& saved, const Maybe& bias, const Maybe& base_weight, const Tensor& g,
      bool of_x, ska::flat_hash_map<std::string, at::IValue>& data) {
    const auto call = torch::autograd::get_current_node();
    auto* own = dynamic_cast<torch::autograd::CppNode<HyperLinear>*>(call.get());
    if (own == nullptr) return Written(nullptr);
    auto* node = dynamic_cast<torch::autograd::CppNode<Generate>*>(own->next_edge(EDGE_OF_W).function.get());
    Written written(node);
    if (written.node == nullptr || !at::GradMode::is_enabled()) return written;
    const Tensor &x = saved[0], &z = saved[1], &weight = saved[2];
    const bool traced = in_python(g) || in_python(x) || in_python(z) || in_python(weight);
    if (traced || !plain("auto", "auto", x, z, weight, bias, base_weight, g) || !is_auto(data["backend"]) ||
        !is_auto(data["schedule"]) || !keeps(x, weight))
      return Written(nullptr);
    if (!written.kept || (of_x && !written.w.defined())) {
      if (of_x) {
        const at::NoGradGuard no_grad;
        const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
        written.w = products::generate(z, weight, base_weight);
      }
      written.keep(z, weight);
    }
    if (written.w.defined()) {
      written.w = written.w.detach();
      torch::autograd::impl::set_gradient_edge(written.w, own->next_edge(EDGE_OF_W));
    }
    return written;
  }

  static bool is_auto(const at::IValue& choice) { return choice.toStringView() == "auto"; }
};

}  // namespace fasthyper_eager
