// The operators of torch that fasthyper/backends/cuda calls. Those for tests trust the tensors that they get.
#include <initializer_list>
#include <string>
#include <utility>

#include "arguments.h"
#include "checks.h"
#include "division.h"
#include "hopper_launchers.h"
#include "launchers.h"
#include "reduce.h"
#include "tensors.h"

#ifdef FASTHYPER_EMULATED
#define FASTHYPER_NAMESPACE fasthyper_cuda_emulated
#define FASTHYPER_KEY CPU
#else
#define FASTHYPER_NAMESPACE fasthyper_cuda
#define FASTHYPER_KEY CUDA
#endif

namespace fasthyper {

// Launch the kernel for sm_90a if it supports the call; return whether it does.
template <class T, template <class> class Call>
static bool try_launch_hopper(const Call<T>& call, Stream stream) {
  if constexpr (sizeof(T) == 2) {
    if (hopper_unsupported(call)) return false;
    launch_hopper(call, stream);
    return true;
  }
  return false;
}

// Launch a fold, and add its partial sums. hopper: use the kernel for sm_90a if it supports the call; return whether it
// did.
template <class T>
static bool run_fold(const Fold<T>& f, bool wide, bool hopper, Stream stream) {
  hopper = hopper && try_launch_hopper(f, stream);
  if (!hopper) launch_fold(f, wide, stream);
  Reductions reductions;
  const int64_t numel = int64_t(f.M) * f.P;
  if (f.partial) reductions.add(Reduction{f.partial, f.out, 1, 1, numel, cdiv(f.C, f.per_split), numel});
  launch_reduce<T>(reductions, stream);
  return hopper;
}

// out = fold of u (B, N, C), v (B, K), H (C, K, P), A (P, C), C (P, K), d (P), divided as told; the tests use it.
static bool fold_op(
    const Tensor& u, const Tensor& v, const Tensor& h, const OptionalTensor& a, const OptionalTensor& c,
    const OptionalTensor& d, Tensor out, const OptionalTensor& partial, int64_t per_split, bool wide, bool hopper,
    bool tf32) {
  const DeviceScope scope(u);
  dispatch_dtype(u, [&](auto zero) {
    using T = decltype(zero);
    const Fold<T> f =
        fold_of<T>(u, v, data<T>(h), h.stride(0), h.stride(1), h.stride(2), a, c, d, out, partial, per_split, tf32);
    hopper = run_fold(f, wide, hopper, scope.stream());
  });
  return hopper;
}

// Memory for the partial sums of `splits` splits of a sum of `numel` numbers; none if it is not split.
static OptionalTensor partial_sums(const Tensor& like, int64_t splits, int64_t numel) {
  if (splits <= 1) return std::nullopt;
  return torch::stable::new_empty(like, {splits, numel}, torch::headeronly::ScalarType::Float);
}

// Whether a grid has blocks for all outputs of a layer.
static bool fits_grid(int64_t O) { return O <= MOST_BLOCKS * WideFold<float>::BP; }

// y (B, N, O). Return how often the kernel for sm_90a ran.
static int64_t apply_op(
    const Tensor& x, const Tensor& z, const Tensor& h, const OptionalTensor& bias, const OptionalTensor& base,
    const OptionalTensor& b0, Tensor y, int64_t workspace, bool tf32) {
  const OptionalTensor head = h;
  const Layer layer{head, bias, base, b0};
  const auto R = z.size(1), O = h.size(0);
  const Checks checks(x, R, O);
  const auto B = x.size(0), N = x.size(1), I = x.size(2);
  checks.layer(layer, R, I, O), checks.input("z", z, {B, R}), checks.result("y", y, {B, N, O});
  STD_TORCH_CHECK(fits_grid(O), "the weight has ", O, " outputs, more than a grid has blocks for");
  const DeviceScope scope(x);
  const auto limits = scope.limits(workspace);
  int64_t hopper_launches = 0;
  dispatch_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const bool hopper = is_for_hopper(sizeof(T), 2 * B * N * I * R * O, limits);
    const auto first = hopper && N == 1 ? whole_waves(B, O, limits.processors) : B;
    for (const auto& [from, to] : {std::pair(int64_t(0), first), std::pair(first, B)}) {
      if (from == to) continue;
      const auto M = (to - from) * N;
      const FoldDivision division(M, I, R, O, limits, hopper);
      const auto partial = partial_sums(x, ceil_div(I, division.per_split), M * O);
      auto f = fold_of<T>(x, z, layer, y, partial, division.per_split, tf32);
      f.take_instances(from, to);
      hopper_launches += run_fold(f, division.wide, hopper, scope.stream());
    }
  });
  return hopper_launches;
}

// All gradients of a layer, divided as told. hopper: use the kernels for sm_90a for dx and dz, and for dH, if they
// support the call; return how many of the two ran.
static int64_t divided_grads_op(
    const Tensor& x, const OptionalTensor& z, const OptionalTensor& h, const OptionalTensor& bias,
    const OptionalTensor& base, const Tensor& g, const OptionalTensor& dx, const OptionalTensor& dz,
    const OptionalTensor& dz_partials, const OptionalTensor& dh, const OptionalTensor& dbias,
    const OptionalTensor& dbase, const OptionalTensor& db0, const OptionalTensor& partials, int64_t inputs_per_split,
    int64_t rows_per_split, bool wide, bool hopper, bool tf32) {
  const DeviceScope scope(x);
  int64_t hopper_launches = 0;
  dispatch_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    Reductions reductions;
    const OptionalTensor none;
    const Layer layer{h, bias, base, none}, grads{dh, dbias, dbase, db0};
    auto dx_dz = dx_dz_of<T>(x, z, g, layer, dx, dz, data<float>(dz_partials), inputs_per_split, tf32, 0);
    auto weight_grad = weight_grad_of<T>(x, z, g, grads, partials, rows_per_split, tf32, 0, reductions);
    if (dz && dz_partials) reductions.add(dz_reduction(x, *dz, *dz_partials));
    if (hopper && try_launch_hopper(dx_dz, scope.stream())) ++hopper_launches, dx_dz.dx = nullptr, dx_dz.dz = {};
    auto head_grad = weight_grad;
    head_grad.bias = head_grad.base_weight = head_grad.base_bias = {};
    if (hopper && try_launch_hopper(head_grad, scope.stream())) ++hopper_launches, weight_grad.head = {};
    launch_grads(dx_dz, weight_grad, wide, scope.stream());
    launch_reduce<T>(reductions, scope.stream());
  });
  return hopper_launches;
}

static int mask_of(std::initializer_list<const OptionalTensor*> out) {
  int mask = 0, bit = 0;
  for (const auto* t : out) mask |= t->has_value() << bit++;
  return mask;
}

static int64_t itemsize(const Tensor& t) { return t.scalar_type() == torch::headeronly::ScalarType::Float ? 4 : 2; }

// The gradients of a layer that are given. Return how many kernels for sm_90a ran.
static int64_t grads_op(
    const Tensor& x, const OptionalTensor& z, const OptionalTensor& h, const OptionalTensor& bias,
    const OptionalTensor& base, const Tensor& g, const OptionalTensor& dx, const OptionalTensor& dz,
    const OptionalTensor& dh, const OptionalTensor& dbias, const OptionalTensor& dbase, const OptionalTensor& db0,
    int64_t workspace, bool tf32) {
  STD_TORCH_CHECK(h || !(dx || dz), "the gradients of x and z need the weight");
  STD_TORCH_CHECK(z || !(dx || dh || dbias), "the gradients of x, the weight and the bias need z");
  STD_TORCH_CHECK(h || z, "the weight or z must be given");
  const OptionalTensor none;
  const auto R = h ? h->size(2) : z->size(1), O = g.size(2);
  const Checks checks(x, R, O);
  const auto B = x.size(0), N = x.size(1), I = x.size(2);
  checks.layer(Layer{h, bias, base, none}, R, I, O), checks.gradients(Layer{dh, dbias, dbase, db0}, R, I, O);
  checks.input("z", z, {B, R}), checks.input("g", g, {B, N, O});
  checks.result("the gradient of x", dx, {B, N, I}), checks.result("the gradient of z", dz, {B, R});
  const auto limits = DeviceScope(x).limits(workspace);
  const GradsDivision division(B, N, R, I, O, itemsize(x), mask_of({&dx, &dz, &dh, &dbias, &dbase, &db0}), limits);
  STD_TORCH_CHECK(division.fits, "these gradients do not fit shared memory or the workspace");
  const auto partials = partial_sums(x, ceil_div(B * N, division.per_split_m), division.parameters);
  OptionalTensor dz_partials;
  if (division.dz_partials)
    dz_partials = torch::stable::new_empty(x, {division.dz_partials, B * N, R}, torch::headeronly::ScalarType::Float);
  return divided_grads_op(
      x, z, h, bias, base, g, dx, dz, dz_partials, dh, dbias, dbase, db0, division.parameters ? partials : std::nullopt,
      division.per_split_i, division.per_split_m, division.wide, division.hopper, tf32);
}

// The number that stands for an activation, by its name.
static int64_t activation_op(std::string name) {
  const std::pair<const char*, Activation> activations[] = {
      {"relu", Activation::relu}, {"tanh", Activation::tanh}, {"sigmoid", Activation::sigmoid},
      {"silu", Activation::silu}, {"gelu", Activation::gelu},
  };
  for (const auto& [known, activation] : activations)
    if (name == known) return static_cast<int64_t>(activation);
  STD_TORCH_CHECK(false, "no activation is called ", name);
}

// Whether the gradients of a layer fit shared memory and the workspace; `mask` has a bit for each of the six.
static bool fits_op(
    int64_t device, int64_t B, int64_t N, int64_t R, int64_t I, int64_t O, int64_t itemsize, int64_t mask,
    int64_t workspace) {
  return GradsDivision(B, N, R, I, O, itemsize, int(mask), DeviceScope(device).limits(workspace)).fits;
}

// How the gradients of two layers are divided.
struct PrimaryDivision {
  GradsDivision first, second;

  // I, J and O features; `mask` has bits for x, z, the four of the first layer, and the four of the second.
  PrimaryDivision(
      int64_t B, int64_t N, int64_t R, int64_t I, int64_t J, int64_t O, int64_t itemsize, int mask,
      const Limits& limits)
      : first(B, N, R, I, J, itemsize, mask & 63, limits),
        second(B, N, R, J, O, itemsize, 1 | (mask & 2) | (mask >> 6 << 2), limits) {}
};

// Whether `primary` and `primary_grads` take two layers: both are narrow, and the hidden layer is small.
static bool fits_primary_op(
    int64_t device, int64_t B, int64_t N, int64_t R, int64_t I, int64_t J, int64_t O, int64_t bytes,
    int64_t workspace) {
  if (std::max(J, O) > NarrowDxDz<float>::DEPTH) return false;  // a CTA computes both layers for its rows
  if (B * N * J * bytes > workspace / 8 || B * N >= int64_t(1) << 31) return false;  // the gradient of the hidden layer
  const auto limits = DeviceScope(device).limits(workspace);
  const PrimaryDivision division(B, N, R, I, J, O, bytes, 1023, limits);
  if (!division.first.fits || !division.second.fits) return false;
  if (GradsDivision::shared_memory(O, J, bytes, true, false) > limits.shared_memory) return false;
  if (GradsDivision::shared_memory(J, division.first.per_split_i, bytes, true, false) > limits.shared_memory)
    return false;
  return 4 * B * N * R * (1 + ceil_div(I, division.first.per_split_i)) <= limits.partial_sums();
}

struct PrimarySizes {
  int64_t B, N, I, J, R, O;
};

// The sizes of two layers, after checks of their tensors.
static PrimarySizes checked_primary(
    const Tensor& x, const Tensor& z, const Layer& first, const Layer& second, int64_t workspace, int64_t activation) {
  const auto R = z.size(1), J = first.head->size(0), O = second.head->size(0);
  const Checks checks(x, R, O);
  const auto B = x.size(0), N = x.size(1), I = x.size(2);
  checks.input("z", z, {B, R}), checks.layer(first, R, I, J), checks.layer(second, R, J, O);
  STD_TORCH_CHECK(J > 0, "the hidden layer must not be empty");
  STD_TORCH_CHECK(
      0 < activation && activation <= static_cast<int64_t>(Activation::gelu), "no activation has the number ",
      activation);
  STD_TORCH_CHECK(
      fits_primary_op(x.get_device_index(), B, N, R, I, J, O, itemsize(x), workspace),
      "these layers do not fit shared memory or the workspace");
  return {B, N, I, J, R, O};
}

// a (B, N, J) and y (B, N, O) of two layers.
static void primary_op(
    const Tensor& x, const Tensor& z, const Tensor& h1, const OptionalTensor& bias1, const OptionalTensor& base1,
    const OptionalTensor& b1, const Tensor& h2, const OptionalTensor& bias2, const OptionalTensor& base2,
    const OptionalTensor& b2, Tensor a, Tensor y, int64_t workspace, bool tf32, int64_t activation) {
  const OptionalTensor head1 = h1, head2 = h2;
  const auto sizes =
      checked_primary(x, z, Layer{head1, bias1, base1, b1}, Layer{head2, bias2, base2, b2}, workspace, activation);
  const auto B = sizes.B, N = sizes.N, I = sizes.I, J = sizes.J, R = sizes.R, O = sizes.O;
  const Checks checks(x, R, O);
  checks.result("a", a, {B, N, J}), checks.result("y", y, {B, N, O});
  const auto M = B * N;
  const DeviceScope scope(x);
  dispatch_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const FoldDivision division(M, I, z.size(1), J, scope.limits(workspace), false);
    const auto partial = partial_sums(x, ceil_div(I, division.per_split), M * J);
    const auto first = fold_of<T>(x, z, Layer{head1, bias1, base1, b1}, a, partial, division.per_split, tf32);
    auto second = fold_of<T>(a, z, Layer{head2, bias2, base2, b2}, y, OptionalTensor(), J, tf32);
    second.activation = static_cast<Activation>(activation);
    if (partial) launch_fold(first, false, scope.stream());
    launch_primary(first, second, scope.stream());
  });
}

// The gradients of both layers that are given.
static void primary_grads_op(
    const Tensor& x, const Tensor& z, const Tensor& h1, const OptionalTensor& bias1, const OptionalTensor& base1,
    const Tensor& h2, const OptionalTensor& bias2, const OptionalTensor& base2, const Tensor& a, const Tensor& g,
    const OptionalTensor& dx, const OptionalTensor& dz, const OptionalTensor& dh1, const OptionalTensor& dbias1,
    const OptionalTensor& dbase1, const OptionalTensor& db1, const OptionalTensor& dh2, const OptionalTensor& dbias2,
    const OptionalTensor& dbase2, const OptionalTensor& db2, int64_t workspace, bool tf32, int64_t activation) {
  const OptionalTensor head1 = h1, head2 = h2, none;
  const auto sizes =
      checked_primary(x, z, Layer{head1, bias1, base1, none}, Layer{head2, bias2, base2, none}, workspace, activation);
  const auto B = sizes.B, N = sizes.N, I = sizes.I, J = sizes.J, R = sizes.R, O = sizes.O;
  const Checks checks(x, R, O);
  checks.input("a", a, {B, N, J}), checks.input("g", g, {B, N, O});
  checks.result("the gradient of x", dx, {B, N, I}), checks.result("the gradient of z", dz, {B, R});
  checks.gradients(Layer{dh1, dbias1, dbase1, db1}, R, I, J),
      checks.gradients(Layer{dh2, dbias2, dbase2, db2}, R, J, O);
  const DeviceScope scope(x);
  dispatch_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    using torch::headeronly::ScalarType;
    const int mask = mask_of({&dx, &dz, &dh1, &dbias1, &dbase1, &db1, &dh2, &dbias2, &dbase2, &db2});
    const PrimaryDivision division(B, N, R, I, J, O, itemsize(x), mask, scope.limits(workspace));
    const auto &first = division.first, &second = division.second;
    STD_TORCH_CHECK(first.fits && second.fits, "these gradients do not fit shared memory or the workspace");
    const auto partials_of = [&](const GradsDivision& d) {
      return d.parameters ? partial_sums(x, ceil_div(B * N, d.per_split_m), d.parameters) : std::nullopt;
    };
    const auto partials1 = partials_of(first), partials2 = partials_of(second);
    OptionalTensor dz_partials;  // of the second layer, then of the first
    if (dz)
      dz_partials = torch::stable::new_empty(x, {1 + ceil_div(I, first.per_split_i), B * N, R}, ScalarType::Float);
    float* const dz2 = data<float>(dz_partials);
    float* const dz1 = dz2 ? dz2 + B * N * R : nullptr;
    const auto da = torch::stable::new_empty(x, {B, N, J});
    Reductions reductions;
    const OptionalTensor a_grad = da;
    const auto dx_dz2 = dx_dz_of<T>(a, z, g, Layer{head2, bias2, base2, none}, a_grad, dz, dz2, J, tf32, activation);
    const auto weight_grad2 = weight_grad_of<T>(
        a, z, g, Layer{dh2, dbias2, dbase2, db2}, partials2, second.per_split_m, tf32, activation, reductions);
    const auto dx_dz1 =
        dx_dz_of<T>(x, z, da, Layer{head1, bias1, base1, none}, dx, dz, dz1, first.per_split_i, tf32, 0);
    const auto weight_grad1 =
        weight_grad_of<T>(x, z, da, Layer{dh1, dbias1, dbase1, db1}, partials1, first.per_split_m, tf32, 0, reductions);
    if (dz) reductions.add(dz_reduction(x, *dz, *dz_partials));
    launch_active_grads(dx_dz2, weight_grad2, scope.stream());
    launch_grads(dx_dz1, weight_grad1, false, scope.stream());
    launch_reduce<T>(reductions, scope.stream());
  });
}

// Change a number of `thresholds`, and return the one before: for tests.
static int64_t force_op(std::string name, int64_t value) {
  STD_TORCH_CHECK(value >= (name == "least_work"), name, " cannot be ", value);
  if (name == "hopper_work") return thresholds.hopper_work.exchange(value);
  if (name == "least_work") return thresholds.least_work.exchange(value);
  if (name == "processors") return thresholds.processors.exchange(value);
  STD_TORCH_CHECK(false, "no threshold is called ", name);
}

// The number of splits of a fold: for tests.
static int64_t fold_splits_op(int64_t M, int64_t C, int64_t K, int64_t P, int64_t processors, int64_t workspace) {
  const FoldDivision division(M, C, K, P, Limits{processors, 0, workspace, false}, false);
  return ceil_div(C, division.per_split);
}

}  // namespace fasthyper

// torch's macros do not expand their arguments; one more level of macros does.
#define LIBRARY(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define LIBRARY_IMPL(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)

LIBRARY(FASTHYPER_NAMESPACE, m) {
  m.def(
      "apply(Tensor x, Tensor z, Tensor h, Tensor? bias, Tensor? base, Tensor? b0, Tensor(a!) y, int workspace, "
      "bool tf32) -> int");
  m.def(
      "grads(Tensor x, Tensor? z, Tensor? h, Tensor? bias, Tensor? base, Tensor g, Tensor(a!)? dx, Tensor(b!)? dz, "
      "Tensor(c!)? dh, Tensor(d!)? dbias, Tensor(e!)? dbase, Tensor(f!)? db0, int workspace, bool tf32) -> int");
  m.def("fits(int device, int B, int N, int R, int I, int O, int itemsize, int mask, int workspace) -> bool");
  m.def(
      "primary(Tensor x, Tensor z, Tensor h1, Tensor? bias1, Tensor? base1, Tensor? b1, Tensor h2, Tensor? bias2, "
      "Tensor? base2, Tensor? b2, Tensor(a!) a, Tensor(b!) y, int workspace, bool tf32, int activation) -> ()");
  m.def(
      "primary_grads(Tensor x, Tensor z, Tensor h1, Tensor? bias1, Tensor? base1, Tensor h2, Tensor? bias2, "
      "Tensor? base2, Tensor a, Tensor g, Tensor(a!)? dx, Tensor(b!)? dz, Tensor(c!)? dh1, Tensor(d!)? dbias1, "
      "Tensor(e!)? dbase1, Tensor(f!)? db1, Tensor(g!)? dh2, Tensor(h!)? dbias2, Tensor(i!)? dbase2, "
      "Tensor(j!)? db2, int workspace, bool tf32, int activation) -> ()");
  m.def("fits_primary(int device, int B, int N, int R, int I, int J, int O, int itemsize, int workspace) -> bool");
  m.def("activation(str name) -> int");
  m.def("generation() -> int");
  // For tests: kernels with a division of their own, and the numbers that decide on one.
  m.def(
      "fold(Tensor u, Tensor v, Tensor h, Tensor? a, Tensor? c, Tensor? d, Tensor(a!) out, Tensor(b!)? partial, "
      "int per_split, bool wide, bool hopper, bool tf32) -> bool");
  m.def(
      "divided_grads(Tensor x, Tensor? z, Tensor? h, Tensor? bias, Tensor? base, Tensor g, Tensor(a!)? dx, "
      "Tensor(b!)? dz, Tensor(c!)? dz_partials, Tensor(d!)? dh, Tensor(e!)? dbias, Tensor(f!)? dbase, "
      "Tensor(g!)? db0, Tensor(h!)? partials, int inputs_per_split, int rows_per_split, bool wide, bool hopper, "
      "bool tf32) -> int");
  m.def("force(str name, int value) -> int");
  m.def("fold_splits(int M, int C, int K, int P, int processors, int workspace) -> int");
  m.def("whole_waves(int M, int P, int processors) -> int");
}

LIBRARY_IMPL(FASTHYPER_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("activation", TORCH_BOX(&fasthyper::activation_op));
  m.impl("generation", TORCH_BOX(&fasthyper::generation));
  m.impl("fits", TORCH_BOX(&fasthyper::fits_op));
  m.impl("fits_primary", TORCH_BOX(&fasthyper::fits_primary_op));
  m.impl("force", TORCH_BOX(&fasthyper::force_op));
  m.impl("fold_splits", TORCH_BOX(&fasthyper::fold_splits_op));
  m.impl("whole_waves", TORCH_BOX(&fasthyper::whole_waves));
}

LIBRARY_IMPL(FASTHYPER_NAMESPACE, FASTHYPER_KEY, m) {
  m.impl("apply", TORCH_BOX(&fasthyper::apply_op));
  m.impl("grads", TORCH_BOX(&fasthyper::grads_op));
  m.impl("primary", TORCH_BOX(&fasthyper::primary_op));
  m.impl("primary_grads", TORCH_BOX(&fasthyper::primary_grads_op));
  m.impl("fold", TORCH_BOX(&fasthyper::fold_op));
  m.impl("divided_grads", TORCH_BOX(&fasthyper::divided_grads_op));
}
