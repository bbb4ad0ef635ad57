// Plain calls of fasthyper::hyper_linear on CPU tensors, without a step through Python. That step takes most of the
// time of a small problem.
//
// A call is plain in eager reverse mode: no torch.func transform, no dual numbers, no gradient of a gradient, no forced
// backend or schedule, and a problem that was planned before. All other calls continue to the kernels that
// fasthyper/ops registers for every device and every autograd key, and that the kernels here shadow on the CPU.
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <unordered_map>

#include "eager/products.h"

namespace {

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

const auto& forward_op() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fasthyper::hyper_linear", "").typed<Forward>();
  return op;
}

const auto& backward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fasthyper::hyper_linear_grads", "").typed<Backward>();
  return op;
}

// The shadowed kernels are registered for every autograd key, AutogradOther included.
DispatchKeySet shadowed(DispatchKeySet keys) {
  return (keys & c10::after_autograd_keyset) | DispatchKeySet(c10::DispatchKey::AutogradOther);
}

bool recorded(const Tensor& t) { return t.defined() && t.requires_grad(); }

bool recorded(const Maybe& t) { return t && recorded(*t); }

bool dual(const Tensor& t) { return torch::autograd::isFwGradDefined(t); }

bool dual(const Maybe& t) { return t && dual(*t); }

// torch.func includes its keys while a transform is active.
bool transformed() {
  return c10::impl::tls_local_dispatch_key_set().included_.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// Whether a subclass of torch.Tensor handles calls with t, such as a DTensor, or a tracer's tensor.
bool in_python(const Tensor& t) { return t.key_set().has(c10::DispatchKey::Python); }

bool in_python(const Maybe& t) { return t && in_python(*t); }

// Whether backend and schedule have been chosen, and no transform or forward mode is active.
template <class... Tensors>
bool plain(string_view backend, string_view schedule, const Tensors&... tensors) {
  return !backend.empty() && !schedule.empty() && !transformed() && !(dual(tensors) || ...);
}

// For each argument of hyper_linear, a bit for each argument that its gradient reads: `rules.READS`.
std::vector<int64_t> reads(6, 63);

void declare_reads(const std::vector<int64_t>& declared) {
  TORCH_CHECK(declared.size() == 6, "reads must have 6 numbers, got ", declared.size());
  reads = declared;
}

// Whether a problem keeps W for derivatives of derivatives: Python decides, and its answers are stored here.
bool keeps(const Tensor& x, const Tensor& weight);

// The node of W[b] = H·z[b] + W0: it adds up the gradients of W, and contracts their sum with H and z. A gradient that
// is differentiated writes out W, and only then this node keeps z, H and W.
struct Generate : torch::autograd::Function<Generate> {
  static constexpr bool is_traceable = true;

  static Tensor forward(
      torch::autograd::AutogradContext* ctx, const Tensor& z, const Tensor& weight, const Maybe& base_weight) {
    ctx->set_materialize_grads(false);
    ctx->saved_data["given"] = 2 * weight.size(2) + base_weight.has_value();
    return at::detail::empty_strided_cpu({z.size(0), weight.size(0), weight.size(1)}, {0, 0, 0}, z.options());
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

// --- Below autograd -------------------------------------------------------------------------------------------------

// A problem of the planner in Python. Its plans are stored here.
struct Problem {
  int64_t B, N, R, I, O, dtype, needs, threads;
  bool shared_x;

  auto all() const { return std::tie(B, N, R, I, O, dtype, needs, threads, shared_x); }
  bool operator==(const Problem& other) const { return all() == other.all(); }
};

struct Hash {
  size_t operator()(const Problem& p) const {
    return std::apply([](const auto&... field) { return c10::get_hash(field...); }, p.all());
  }
};

struct Plan {
  std::string schedule, schedule_of_weight;
  int64_t workspace;
  bool native;
};

class Plans {
 public:
  std::optional<Plan> find(const Problem& problem) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = plans_.find(problem);
    return found == plans_.end() ? std::nullopt : std::optional<Plan>(found->second);
  }

  void remember(const Problem& problem, Plan plan) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (plans_.size() >= 4096) plans_.clear();
    plans_[problem] = std::move(plan);
  }

  void forget() {
    const std::lock_guard<std::mutex> lock(mutex_);
    plans_.clear();
  }

 private:
  std::mutex mutex_;
  std::unordered_map<Problem, Plan, Hash> plans_;
};

Plans plans;

constexpr int64_t FORWARD = 0;  // for `needs`; a backward has a bit for each gradient

Problem problem_of(const Tensor& x, int64_t R, int64_t O, int64_t needs) {
  const bool reads_x = needs != 1;  // not if dx alone is requested
  const bool shared = reads_x && x.size(0) > 1 && x.stride(0) == 0;
  return {x.size(0), x.size(1), R, x.size(2), O, int64_t(x.scalar_type()), needs, at::get_num_threads(), shared};
}

int64_t needs_of(const Mask& mask) { return mask[0] | mask[1] << 1 | mask[2] << 2; }

// The letters of the axes of each argument, from the table in fasthyper/ops/shapes.py, in the order of the arguments.
struct Axes {
  static constexpr const char* FORWARD[] = {"x", "z", "weight", "bias", "base_weight", "base_bias"};
  static constexpr const char* BACKWARD[] = {"x", "z", "weight", "bias", "base_weight", "g"};
  std::array<std::string, 6> forward, backward;
  bool declared = false;
};

Axes axes;

void declare_axes(const std::vector<std::string>& names, const std::vector<std::string>& letters) {
  const auto of = [&](const char* name) {
    for (size_t i = 0; i < names.size(); ++i)
      if (names[i] == name) return letters.at(i);
    TORCH_CHECK(false, "no axes are declared for ", name);
  };
  for (size_t i = 0; i < 6; ++i) axes.forward[i] = of(Axes::FORWARD[i]), axes.backward[i] = of(Axes::BACKWARD[i]);
  axes.declared = true;
}

const Tensor* given(const Tensor& t) { return &t; }

const Tensor* given(const Maybe& t) { return t ? &*t : nullptr; }

// Whether the tensors have one dtype, are on the CPU, and have sizes that agree. Some may be absent.
template <class... Tensors>
bool agree(const std::array<std::string, 6>& letters, const Tensor& x, const Tensors&... others) {
  if (!axes.declared || !x.defined()) return false;
  std::array<int64_t, 26> size;
  size.fill(-1);
  size_t argument = 0;
  for (const Tensor* t : {&x, given(others)...}) {
    const std::string& of = letters[argument++];
    if (t == nullptr) continue;
    if (!t->defined()) return false;  // None where a tensor is required: Python says so
    if (t->scalar_type() != x.scalar_type() || !t->is_cpu() || t->dim() != int64_t(of.size())) return false;
    const auto sizes = t->sizes();
    for (size_t k = 0; k < of.size(); ++k) {
      int64_t& known = size[of[k] - 'A'];
      if (known < 0) known = sizes[k];
      if (known != sizes[k]) return false;
    }
  }
  return true;
}

// The key of the kernels that fasthyper/ops registers for every device, which are shadowed here for the CPU. They check
// the arguments, make a plan and store it here.
const DispatchKeySet any_device(c10::DispatchKey::PrivateUse1);

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

TORCH_LIBRARY_IMPL(fasthyper, AutogradCPU, m) {
  m.impl("hyper_linear", hyper_linear);
  m.impl("hyper_linear_grads", hyper_linear_grads);
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
  m.def("forget() -> ()", [] { plans.forget(); });
  m.def("declare_axes(str[] names, str[] letters) -> ()", declare_axes);
  m.def("declare_reads(int[] reads) -> ()", declare_reads);
  m.def("cached_cast(Tensor t) -> Tensor", cached_cast);
}

}  // namespace
