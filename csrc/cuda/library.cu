// The operators of torch that fasthyper/backends/cuda calls. They rely on Python's checks: shapes agree, all tensors
// have one dtype, results are contiguous.
#include <string>
#include <utility>

#include "hopper_fold.h"
#include "hopper_launchers.h"
#include "hopper_weight_grad.h"
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

// The parameters of a generated layer, or their gradients: H (O, I, R), bias (O, R), W0 (O, I), b0 (O).
struct Layer {
  const OptionalTensor &head, &bias, &base_weight, &base_bias;
};

// Arguments of fold, with out (B·N, P). In forward A, C and d are W0, bias and b0.
template <class T>
static Fold<T> fold_of(
    const Tensor& u, const Tensor& v, const T* h, int64_t h_c, int64_t h_k, int64_t h_p, const OptionalTensor& a,
    const OptionalTensor& c, const OptionalTensor& d, const Tensor& out, const OptionalTensor& partial,
    int64_t per_split, bool tf32) {
  Fold<T> f{};
  f.u = row_view<T>(u), f.v = row_view<T>(v);
  f.h = h, f.h_c = h_c, f.h_k = h_k, f.h_p = h_p;
  f.a = data<T>(a), f.a_p = stride(a, 0), f.a_c = stride(a, 1);
  f.c = data<T>(c), f.c_p = stride(c, 0), f.c_k = stride(c, 1);
  f.d = data<T>(d), f.d_p = stride(d, 0);
  f.out = data<T>(out), f.partial = data<float>(partial);
  f.N = size(u, 1), f.M = size(u, 0) * f.N, f.C = size(u, 2), f.K = size(v, 1);
  f.P = static_cast<int>(out.numel() / f.M), f.per_split = static_cast<int>(per_split);
  f.h_width = copy_width(f.h, f.h_k, f.h_c, f.h_p);
  f.a_width = copy_width(f.a, f.a_c, f.a_p), f.c_width = copy_width(f.c, f.c_k, f.c_p);
  f.u_aligned = copy_width(f.u) >= 4, f.v_aligned = copy_width(f.v) >= 4;
  f.tf32 = tf32;
  f.set_tile_layout();
  return f;
}

template <class T>
static Fold<T> fold_of(
    const Tensor& x, const Tensor& z, const Layer& layer, const Tensor& out, const OptionalTensor& partial,
    int64_t per_split, bool tf32) {
  const Tensor& h = *layer.head;
  return fold_of<T>(
      x, z, data<T>(h), h.stride(1), h.stride(2), h.stride(0), layer.base_weight, layer.bias, layer.base_bias, out,
      partial, per_split, tf32);
}

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

// out = fold of u (B, N, C), v (B, K), H (C, K, P), A (P, C), C (P, K), d (P). hopper: use the kernel for sm_90a if it
// supports the call; return whether it did.
static bool fold_op(
    const Tensor& u, const Tensor& v, const Tensor& h, const OptionalTensor& a, const OptionalTensor& c,
    const OptionalTensor& d, Tensor out, const OptionalTensor& partial, int64_t per_split, bool wide, bool hopper,
    bool tf32) {
  const DeviceScope scope(u);
  dispatch_dtype(u, [&](auto zero) {
    using T = decltype(zero);
    const Fold<T> f =
        fold_of<T>(u, v, data<T>(h), h.stride(0), h.stride(1), h.stride(2), a, c, d, out, partial, per_split, tf32);
    hopper = hopper && try_launch_hopper(f, scope.stream());
    if (!hopper) launch_fold(f, wide, scope.stream());
    Reductions reductions;
    const int64_t numel = out.numel();
    if (partial) reductions.add(Reduction{f.partial, f.out, 1, 1, numel, partial->numel() / numel, numel});
    launch_reduce<T>(reductions, scope.stream());
  });
  return hopper;
}

// Arguments for dx (B, N, I), and for dz (B, R) or its partial sums (splits, B·N, R).
template <class T>
static DxDz<T> dx_dz_of(
    const Tensor& x, const Tensor& z, const Tensor& g, const Layer& layer, const OptionalTensor& dx,
    const OptionalTensor& dz, float* dz_partials, int64_t per_split, bool tf32, int64_t activation) {
  DxDz<T> f{};
  const OptionalTensor &h = layer.head, &bias = layer.bias, &base = layer.base_weight;
  f.g = row_view<T>(g), f.z = row_view<T>(z), f.x = row_view<T>(x);
  f.h = data<T>(h), f.h_o = stride(h, 0), f.h_i = stride(h, 1), f.h_r = stride(h, 2);
  f.bias = data<T>(bias), f.bias_o = stride(bias, 0), f.bias_r = stride(bias, 1);
  f.base = data<T>(base), f.base_o = stride(base, 0), f.base_i = stride(base, 1);
  f.dx = data<T>(dx);
  if (dz) f.dz = {data<T>(dz), dz_partials};
  f.N = size(x, 1), f.M = size(x, 0) * f.N, f.I = size(x, 2), f.O = size(g, 2), f.R = size(z, 1);
  f.per_split = static_cast<int>(per_split);
  f.g_width = copy_width(f.g), f.z_aligned = copy_width(f.z) >= 4;
  f.h_width = copy_width(f.h, f.h_r, f.h_o, f.h_i), f.bias_width = copy_width(f.bias, f.bias_r, f.bias_o);
  // Each split begins at a column of W0 that is a multiple of per_split.
  f.base_width = copy_width(f.base, f.base_i, f.base_o, per_split < f.I ? per_split : 0);
  f.tf32 = tf32, f.activation = static_cast<Activation>(activation);
  return f;
}

// Arguments for the gradients in `grads`, or for their partial sums (splits, elements of all), which `reductions` adds.
template <class T>
static WeightGrad<T> weight_grad_of(
    const Tensor& x, const Tensor& z, const Tensor& g, const Layer& grads, const OptionalTensor& partials,
    int64_t per_split, bool tf32, int64_t activation, Reductions& reductions) {
  WeightGrad<T> f{};
  f.x = row_view<T>(x), f.z = row_view<T>(z), f.g = row_view<T>(g);
  f.N = size(x, 1), f.M = size(x, 0) * f.N, f.I = size(x, 2), f.O = size(g, 2), f.R = size(z, 1);
  f.per_split = static_cast<int>(per_split);
  f.z_width = copy_width(f.z), f.g_width = copy_width(f.g);
  f.tf32 = tf32, f.activation = static_cast<Activation>(activation);
  float* partial = data<float>(partials);
  const int64_t splits = cdiv(f.M, f.per_split);
  f.partial_stride = partials ? partials->numel() / splits : 0;
  const auto output = [&](const OptionalTensor& out) -> Output<T> {
    if (!out) return {nullptr, nullptr};
    if (!partials) return {data<T>(out), nullptr};
    reductions.add(Reduction{partial, out->data_ptr(), 1, 1, out->numel(), splits, f.partial_stride});
    const Output<T> to{nullptr, partial};
    partial += out->numel();
    return to;
  };
  f.head = output(grads.head), f.bias = output(grads.bias);
  f.base_weight = output(grads.base_weight), f.base_bias = output(grads.base_bias);
  return f;
}

// The reduction of partial sums (splits, B·N, R) to dz (B, R).
static Reduction dz_reduction(const Tensor& x, const Tensor& dz, const Tensor& partials) {
  const int64_t B = x.size(0), N = x.size(1), R = dz.size(1);
  return {data<float>(partials), dz.data_ptr(), B, N, R, partials.numel() / (B * N * R), B * N * R};
}

// All gradients of a layer. hopper: use the kernels for sm_90a for dx and dz, and for dH, if they support the call;
// return how many of the two ran.
static int64_t grads_op(
    const Tensor& x, const Tensor& z, const OptionalTensor& h, const OptionalTensor& bias, const OptionalTensor& base,
    const Tensor& g, const OptionalTensor& dx, const OptionalTensor& dz, const OptionalTensor& dz_partials,
    const OptionalTensor& dh, const OptionalTensor& dbias, const OptionalTensor& dbase, const OptionalTensor& db0,
    const OptionalTensor& partials, int64_t inputs_per_split, int64_t rows_per_split, bool wide, bool hopper,
    bool tf32) {
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

// Return the compute capability that the code for the current device was compiled for: 90 for 9.0. It is lower than the
// device's own if the code is PTX of an older arch. Throw if there is no code for the device.
static int64_t generation_op() {
#ifdef FASTHYPER_EMULATED
  return 90;
#else
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, reduce<float>));
  return least(attributes.binaryVersion, attributes.ptxVersion);
#endif
}

// Return the bytes of shared memory of a CTA of `grads`.
static int64_t grads_shared_op(int64_t O, int64_t inputs_per_split, int64_t itemsize, bool dx, bool wide) {
  const auto bytes = [&](auto zero) -> int64_t {
    using T = decltype(zero);
    const int o = static_cast<int>(O), inputs = static_cast<int>(inputs_per_split);
    const int dx_dz = wide ? WideDxDz<T>::smem_bytes(o, inputs, dx) : NarrowDxDz<T>::smem_bytes(o, inputs, dx);
    return dx_dz > WeightGradShape<T>::SMEM_BYTES ? dx_dz : WeightGradShape<T>::SMEM_BYTES;
  };
  return itemsize == 4 ? bytes(float{}) : bytes(bfloat16{});
}

// A constant that the kernels are compiled with, by its name: the sizes of tiles, from which Python computes splits,
// and the numbers of activations. fasthyper/backends/cuda/library.py describes each.
static int64_t constant_op(std::string name) {
  using Narrow = NarrowFold<float>;
  using Wide = WideFold<float>;
  using WeightGrads = WeightGradShape<float>;
  using HopperWeightGrads = HopperWeightGradShape<128>;
  static_assert(Narrow::BP == Wide::BP && WeightGrads::WI == HopperWeightGrads::INPUTS);
  static_assert(Narrow::BM == NarrowDxDz<float>::BM && Wide::BM == WideDxDz<float>::BM);
  const std::pair<const char*, int64_t> constants[] = {
      {"rows", Narrow::BM},
      {"wide_rows", Wide::BM},
      {"columns", Narrow::BP},
      {"kept_outputs", NarrowDxDz<float>::DEPTH},
      {"inputs", WeightGrads::WI},
      {"row_bytes", ROW_BYTES},
      {"hopper_rows", HopperFoldShape<128>::BM},
      {"hopper_columns", HopperFoldShape<128>::BN},
      {"hopper_batch", HopperWeightGrads::BATCH},
      {"relu", static_cast<int64_t>(Activation::relu)},
      {"tanh", static_cast<int64_t>(Activation::tanh)},
      {"sigmoid", static_cast<int64_t>(Activation::sigmoid)},
      {"silu", static_cast<int64_t>(Activation::silu)},
      {"gelu", static_cast<int64_t>(Activation::gelu)},
  };
  for (const auto& [known, value] : constants)
    if (name == known) return value;
  STD_TORCH_CHECK(false, "no constant is called ", name);
}

// a (B, N, J) and y (B, N, O) of two layers. `partial` (splits, B·N, J) is for partial sums of the first layer, if
// given.
static void primary_op(
    const Tensor& x, const Tensor& z, const Tensor& h1, const OptionalTensor& bias1, const OptionalTensor& base1,
    const OptionalTensor& b1, const Tensor& h2, const OptionalTensor& bias2, const OptionalTensor& base2,
    const OptionalTensor& b2, Tensor a, Tensor y, const OptionalTensor& partial, int64_t per_split, bool tf32,
    int64_t activation) {
  const DeviceScope scope(x);
  dispatch_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const OptionalTensor head1 = h1, head2 = h2;
    const auto first = fold_of<T>(x, z, Layer{head1, bias1, base1, b1}, a, partial, per_split, tf32);
    auto second = fold_of<T>(a, z, Layer{head2, bias2, base2, b2}, y, OptionalTensor(), a.size(2), tf32);
    second.activation = static_cast<Activation>(activation);
    if (partial) launch_fold(first, false, scope.stream());
    launch_primary(first, second, scope.stream());
  });
}

// All gradients of both layers. da (B, N, J) is the gradient of a. dz_partials (1 + splits, B·N, R) holds dz of the
// second layer, then of the first. partials1 and partials2 are as in `grads`.
static void primary_grads_op(
    const Tensor& x, const Tensor& z, const Tensor& h1, const OptionalTensor& bias1, const OptionalTensor& base1,
    const Tensor& h2, const OptionalTensor& bias2, const OptionalTensor& base2, const Tensor& a, const Tensor& g,
    const OptionalTensor& dx, const OptionalTensor& dz, const OptionalTensor& dz_partials, const OptionalTensor& dh1,
    const OptionalTensor& dbias1, const OptionalTensor& dbase1, const OptionalTensor& db1, const OptionalTensor& dh2,
    const OptionalTensor& dbias2, const OptionalTensor& dbase2, const OptionalTensor& db2, Tensor da,
    const OptionalTensor& partials1, const OptionalTensor& partials2, int64_t inputs_per_split, int64_t rows_per_split1,
    int64_t rows_per_split2, bool tf32, int64_t activation) {
  const DeviceScope scope(x);
  dispatch_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    Reductions reductions;
    const OptionalTensor head1 = h1, head2 = h2, a_grad = da, none;
    float* const dz2 = data<float>(dz_partials);
    float* const dz1 = dz2 ? dz2 + x.size(0) * x.size(1) * z.size(1) : nullptr;
    const auto dx_dz2 =
        dx_dz_of<T>(a, z, g, Layer{head2, bias2, base2, none}, a_grad, dz, dz2, a.size(2), tf32, activation);
    const auto weight_grad2 = weight_grad_of<T>(
        a, z, g, Layer{dh2, dbias2, dbase2, db2}, partials2, rows_per_split2, tf32, activation, reductions);
    const auto dx_dz1 = dx_dz_of<T>(x, z, da, Layer{head1, bias1, base1, none}, dx, dz, dz1, inputs_per_split, tf32, 0);
    const auto weight_grad1 =
        weight_grad_of<T>(x, z, da, Layer{dh1, dbias1, dbase1, db1}, partials1, rows_per_split1, tf32, 0, reductions);
    if (dz) reductions.add(dz_reduction(x, *dz, *dz_partials));
    launch_active_grads(dx_dz2, weight_grad2, scope.stream());
    launch_grads(dx_dz1, weight_grad1, false, scope.stream());
    launch_reduce<T>(reductions, scope.stream());
  });
}

}  // namespace fasthyper

// torch's macros do not expand their arguments; one more level of macros does.
#define LIBRARY(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define LIBRARY_IMPL(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)

LIBRARY(FASTHYPER_NAMESPACE, m) {
  m.def(
      "fold(Tensor u, Tensor v, Tensor h, Tensor? a, Tensor? c, Tensor? d, Tensor(a!) out, Tensor(b!)? partial, "
      "int per_split, bool wide, bool hopper, bool tf32) -> bool");
  m.def(
      "grads(Tensor x, Tensor z, Tensor? h, Tensor? bias, Tensor? base, Tensor g, Tensor(a!)? dx, Tensor(b!)? dz, "
      "Tensor(c!)? dz_parts, Tensor(d!)? dh, Tensor(e!)? dbias, Tensor(f!)? dbase, Tensor(g!)? db0, "
      "Tensor(h!)? parts, int inputs_per_split, int rows_per_split, bool wide, bool hopper, bool tf32) -> int");
  m.def("constant(str name) -> int");
  m.def("generation() -> int");
  m.def("grads_shared(int O, int inputs_per_split, int itemsize, bool dx, bool wide) -> int");
  m.def(
      "primary(Tensor x, Tensor z, Tensor h1, Tensor? bias1, Tensor? base1, Tensor? b1, Tensor h2, Tensor? bias2, "
      "Tensor? base2, Tensor? b2, Tensor(a!) a, Tensor(b!) y, Tensor(c!)? partial, int per_split, bool tf32, "
      "int activation) -> ()");
  m.def(
      "primary_grads(Tensor x, Tensor z, Tensor h1, Tensor? bias1, Tensor? base1, Tensor h2, Tensor? bias2, "
      "Tensor? base2, Tensor a, Tensor g, Tensor(a!)? dx, Tensor(b!)? dz, Tensor(c!)? dz_parts, Tensor(d!)? dh1, "
      "Tensor(e!)? dbias1, Tensor(f!)? dbase1, Tensor(g!)? db1, Tensor(h!)? dh2, Tensor(i!)? dbias2, "
      "Tensor(j!)? dbase2, Tensor(k!)? db2, Tensor(l!) da, Tensor(m!)? parts1, Tensor(n!)? parts2, "
      "int inputs_per_split, int rows_per_split1, int rows_per_split2, bool tf32, int activation) -> ()");
}

LIBRARY_IMPL(FASTHYPER_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("constant", TORCH_BOX(&fasthyper::constant_op));
  m.impl("generation", TORCH_BOX(&fasthyper::generation_op));
  m.impl("grads_shared", TORCH_BOX(&fasthyper::grads_shared_op));
}

LIBRARY_IMPL(FASTHYPER_NAMESPACE, FASTHYPER_KEY, m) {
  m.impl("fold", TORCH_BOX(&fasthyper::fold_op));
  m.impl("grads", TORCH_BOX(&fasthyper::grads_op));
  m.impl("primary", TORCH_BOX(&fasthyper::primary_op));
  m.impl("primary_grads", TORCH_BOX(&fasthyper::primary_grads_op));
}
