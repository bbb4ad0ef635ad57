// The operators, as fasthyper/backends/cuda calls them. They check nothing that Python has checked: shapes agree, the
// dtype is one, results are contiguous.
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

// The parameters of a generated layer: H (O, I, R), bias (O, R), W0 (O, I), b0 (O), and what their gradients go to.
struct Layer {
  const Maybe &head, &bias, &base_weight, &base_bias;
};

// Out (B·N, P) of a fold; A, C and d are W0, bias and b0, in forward.
template <class T>
static Fold<T> fold_of(
    const Tensor& u, const Tensor& v, const T* h, int64_t h_c, int64_t h_k, int64_t h_p, const Maybe& a, const Maybe& c,
    const Maybe& d, const Tensor& out, const Maybe& partial, int64_t per_split, bool tf32) {
  Fold<T> f{};
  f.u = rows<T>(u), f.v = rows<T>(v);
  f.h = h, f.h_c = h_c, f.h_k = h_k, f.h_p = h_p;
  f.a = data<T>(a), f.a_p = stride(a, 0), f.a_c = stride(a, 1);
  f.c = data<T>(c), f.c_p = stride(c, 0), f.c_k = stride(c, 1);
  f.d = data<T>(d), f.d_p = stride(d, 0);
  f.out = data<T>(out), f.partial = data<float>(partial);
  f.N = size(u, 1), f.M = size(u, 0) * f.N, f.C = size(u, 2), f.K = size(v, 1);
  f.P = static_cast<int>(out.numel() / f.M), f.per_split = static_cast<int>(per_split);
  f.h_width = width_of(f.h, f.h_k, f.h_c, f.h_p);
  f.a_width = width_of(f.a, f.a_c, f.a_p), f.c_width = width_of(f.c, f.c_k, f.c_p);
  f.u_aligned = width_of(f.u) >= 4, f.v_aligned = width_of(f.v) >= 4;
  f.tf32 = tf32;
  f.cut();
  return f;
}

template <class T>
static Fold<T> fold_of(
    const Tensor& x, const Tensor& z, const Layer& layer, const Tensor& out, const Maybe& partial, int64_t per_split,
    bool tf32) {
  const Tensor& h = *layer.head;
  return fold_of<T>(
      x, z, data<T>(h), h.stride(1), h.stride(2), h.stride(0), layer.base_weight, layer.bias, layer.base_bias, out,
      partial, per_split, tf32);
}

// Whether a kernel for sm_90a does such a call; then it is launched.
template <class T, template <class> class Call>
static bool launched_on_hopper(const Call<T>& call, Stream stream) {
  if constexpr (sizeof(T) == 2) {
    if (hopper_misfit(call)) return false;
    launch_on_hopper(call, stream);
    return true;
  }
  return false;
}

// out = fold of u (B, N, C), v (B, K), H (C, K, P), A (P, C), C (P, K), d (P). hopper: by the kernel for sm_90a, if it
// does such a call, which is what is returned.
static bool fold_op(
    const Tensor& u, const Tensor& v, const Tensor& h, const Maybe& a, const Maybe& c, const Maybe& d, Tensor out,
    const Maybe& partial, int64_t per_split, bool wide, bool hopper, bool tf32) {
  const On on(u);
  by_dtype(u, [&](auto zero) {
    using T = decltype(zero);
    const Fold<T> f =
        fold_of<T>(u, v, data<T>(h), h.stride(0), h.stride(1), h.stride(2), a, c, d, out, partial, per_split, tf32);
    hopper = hopper && launched_on_hopper(f, on.stream());
    if (!hopper) launch_fold(f, wide, on.stream());
    Sums sums;
    const int64_t numel = out.numel();
    if (partial) sums.add(Sum{f.partial, f.out, 1, 1, numel, partial->numel() / numel, numel});
    launch_reduce<T>(sums, on.stream());
  });
  return hopper;
}

// dx (B, N, I), and dz (B, R) or its parts, (splits, B·N, R).
template <class T>
static DxDz<T> dx_dz_of(
    const Tensor& x, const Tensor& z, const Tensor& g, const Layer& layer, const Maybe& dx, const Maybe& dz,
    float* dz_parts, int64_t per_split, bool tf32, int64_t activation) {
  DxDz<T> f{};
  const Maybe &h = layer.head, &bias = layer.bias, &base = layer.base_weight;
  f.g = rows<T>(g), f.z = rows<T>(z), f.x = rows<T>(x);
  f.h = data<T>(h), f.h_o = stride(h, 0), f.h_i = stride(h, 1), f.h_r = stride(h, 2);
  f.bias = data<T>(bias), f.bias_o = stride(bias, 0), f.bias_r = stride(bias, 1);
  f.base = data<T>(base), f.base_o = stride(base, 0), f.base_i = stride(base, 1);
  f.dx = data<T>(dx);
  if (dz) f.dz = {data<T>(dz), dz_parts};
  f.N = size(x, 1), f.M = size(x, 0) * f.N, f.I = size(x, 2), f.O = size(g, 2), f.R = size(z, 1);
  f.per_split = static_cast<int>(per_split);
  f.g_width = width_of(f.g), f.z_aligned = width_of(f.z) >= 4;
  f.h_width = width_of(f.h, f.h_r, f.h_o, f.h_i), f.bias_width = width_of(f.bias, f.bias_r, f.bias_o);
  // Columns of W0 begin where a split does.
  f.base_width = width_of(f.base, f.base_i, f.base_o, per_split < f.I ? per_split : 0);
  f.tf32 = tf32, f.activation = static_cast<Activation>(activation);
  return f;
}

// Gradients of what is in `grads`, or parts of all, (splits, numbers of all), which `sums` then adds up.
template <class T>
static WeightGrad<T> weight_grad_of(
    const Tensor& x, const Tensor& z, const Tensor& g, const Layer& grads, const Maybe& parts, int64_t per_split,
    bool tf32, int64_t activation, Sums& sums) {
  WeightGrad<T> f{};
  f.x = rows<T>(x), f.z = rows<T>(z), f.g = rows<T>(g);
  f.N = size(x, 1), f.M = size(x, 0) * f.N, f.I = size(x, 2), f.O = size(g, 2), f.R = size(z, 1);
  f.per_split = static_cast<int>(per_split);
  f.z_width = width_of(f.z), f.g_width = width_of(f.g);
  f.tf32 = tf32, f.activation = static_cast<Activation>(activation);
  float* part = data<float>(parts);
  const int64_t splits = cdiv(f.M, f.per_split);
  f.partial_stride = parts ? parts->numel() / splits : 0;
  const auto target = [&](const Maybe& out) -> Target<T> {
    if (!out) return {nullptr, nullptr};
    if (!parts) return {data<T>(out), nullptr};
    sums.add(Sum{part, out->data_ptr(), 1, 1, out->numel(), splits, f.partial_stride});
    const Target<T> to{nullptr, part};
    part += out->numel();
    return to;
  };
  f.head = target(grads.head), f.bias = target(grads.bias);
  f.base_weight = target(grads.base_weight), f.base_bias = target(grads.base_bias);
  return f;
}

// How dz (B, R) comes from parts, (splits, B·N, R).
static Sum sum_of_dz(const Tensor& x, const Tensor& dz, const Tensor& parts) {
  const int64_t B = x.size(0), N = x.size(1), R = dz.size(1);
  return {data<float>(parts), dz.data_ptr(), B, N, R, parts.numel() / (B * N * R), B * N * R};
}

// All gradients of a layer. hopper: dx and dz, and dH, by kernels for sm_90a, if they do such a call; returned is how
// many of the two did.
static int64_t grads_op(
    const Tensor& x, const Tensor& z, const Maybe& h, const Maybe& bias, const Maybe& base, const Tensor& g,
    const Maybe& dx, const Maybe& dz, const Maybe& dz_parts, const Maybe& dh, const Maybe& dbias, const Maybe& dbase,
    const Maybe& db0, const Maybe& parts, int64_t inputs_per_split, int64_t rows_per_split, bool wide, bool hopper,
    bool tf32) {
  const On on(x);
  int64_t on_hopper = 0;
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    Sums sums;
    const Maybe none;
    const Layer layer{h, bias, base, none}, grads{dh, dbias, dbase, db0};
    auto of_rows = dx_dz_of<T>(x, z, g, layer, dx, dz, data<float>(dz_parts), inputs_per_split, tf32, 0);
    auto of_weight = weight_grad_of<T>(x, z, g, grads, parts, rows_per_split, tf32, 0, sums);
    if (dz && dz_parts) sums.add(sum_of_dz(x, *dz, *dz_parts));
    if (hopper && launched_on_hopper(of_rows, on.stream())) ++on_hopper, of_rows.dx = nullptr, of_rows.dz = {};
    auto of_head = of_weight;
    of_head.bias = of_head.base_weight = of_head.base_bias = {};
    if (hopper && launched_on_hopper(of_head, on.stream())) ++on_hopper, of_weight.head = {};
    launch_grads(of_rows, of_weight, wide, on.stream());
    launch_reduce<T>(sums, on.stream());
  });
  return on_hopper;
}

// The generation of parts whose code runs on the current device, 90 of 9.0; of PTX for an older one, that. It throws
// where there is none for it.
static int64_t generation_op() {
#ifdef FASTHYPER_EMULATED
  return 90;
#else
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, reduce<float>));
  return least(attributes.binaryVersion, attributes.ptxVersion);
#endif
}

// Bytes of shared memory that a block of `grads` takes.
static int64_t grads_shared_op(int64_t O, int64_t inputs_per_split, int64_t itemsize, bool dx, bool wide) {
  const auto bytes = [&](auto zero) -> int64_t {
    using T = decltype(zero);
    const int o = static_cast<int>(O), inputs = static_cast<int>(inputs_per_split);
    const int rows =
        wide ? DxDzShape<T, 8, 1>::shared_bytes(o, inputs, dx) : DxDzShape<T, 2, 4>::shared_bytes(o, inputs, dx);
    return rows > WeightGradShape<T>::SHARED ? rows : WeightGradShape<T>::SHARED;
  };
  return itemsize == 4 ? bytes(float{}) : bytes(bfloat16{});
}

// A constant that the kernels are compiled with, by its name: the sizes of tiles, from which Python computes splits,
// and the numbers of activations. fasthyper/backends/cuda/library.py describes each.
static int64_t constant_op(std::string name) {
  using Fold = FoldShape<float, 2, 4, 1, 8>;
  using WideFold = FoldShape<float, 4, 1, 2, 8>;
  using Rows = DxDzShape<float, 2, 4>;
  using WeightGrads = WeightGradShape<float>;
  using HopperWeightGrads = HopperWeightGradShape<128>;
  static_assert(Fold::BP == WideFold::BP && WeightGrads::WI == HopperWeightGrads::INPUTS);
  static_assert(Fold::BM == Rows::BM && WideFold::BM == DxDzShape<float, 8, 1>::BM);
  const std::pair<const char*, int64_t> constants[] = {
      {"rows", Fold::BM},
      {"wide_rows", WideFold::BM},
      {"columns", Fold::BP},
      {"kept_outputs", Rows::DEPTH},
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

// a (B, N, J) and y (B, N, O) of two layers; `partial`, where the first one's sums come in parts, (splits, B·N, J).
static void primary_op(
    const Tensor& x, const Tensor& z, const Tensor& h1, const Maybe& bias1, const Maybe& base1, const Maybe& b1,
    const Tensor& h2, const Maybe& bias2, const Maybe& base2, const Maybe& b2, Tensor a, Tensor y, const Maybe& partial,
    int64_t per_split, bool tf32, int64_t activation) {
  const On on(x);
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Maybe head1 = h1, head2 = h2;
    const auto first = fold_of<T>(x, z, Layer{head1, bias1, base1, b1}, a, partial, per_split, tf32);
    auto second = fold_of<T>(a, z, Layer{head2, bias2, base2, b2}, y, Maybe(), a.size(2), tf32);
    second.activation = static_cast<Activation>(activation);
    if (partial) launch_fold(first, false, on.stream());
    launch_primary(first, second, on.stream());
  });
}

// All gradients of both layers. da (B, N, J): that of a; dz_parts (1 + splits, B·N, R): dz of the second layer, then of
// the first; parts1 and parts2 as in `grads`.
static void primary_grads_op(
    const Tensor& x, const Tensor& z, const Tensor& h1, const Maybe& bias1, const Maybe& base1, const Tensor& h2,
    const Maybe& bias2, const Maybe& base2, const Tensor& a, const Tensor& g, const Maybe& dx, const Maybe& dz,
    const Maybe& dz_parts, const Maybe& dh1, const Maybe& dbias1, const Maybe& dbase1, const Maybe& db1,
    const Maybe& dh2, const Maybe& dbias2, const Maybe& dbase2, const Maybe& db2, Tensor da, const Maybe& parts1,
    const Maybe& parts2, int64_t inputs_per_split, int64_t rows_per_split1, int64_t rows_per_split2, bool tf32,
    int64_t activation) {
  const On on(x);
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    Sums sums;
    const Maybe head1 = h1, head2 = h2, of_a = da, none;
    float* const dz2 = data<float>(dz_parts);
    float* const dz1 = dz2 ? dz2 + x.size(0) * x.size(1) * z.size(1) : nullptr;
    const auto rows2 =
        dx_dz_of<T>(a, z, g, Layer{head2, bias2, base2, none}, of_a, dz, dz2, a.size(2), tf32, activation);
    const auto weight2 =
        weight_grad_of<T>(a, z, g, Layer{dh2, dbias2, dbase2, db2}, parts2, rows_per_split2, tf32, activation, sums);
    const auto rows1 = dx_dz_of<T>(x, z, da, Layer{head1, bias1, base1, none}, dx, dz, dz1, inputs_per_split, tf32, 0);
    const auto weight1 =
        weight_grad_of<T>(x, z, da, Layer{dh1, dbias1, dbase1, db1}, parts1, rows_per_split1, tf32, 0, sums);
    if (dz) sums.add(sum_of_dz(x, *dz, *dz_parts));
    launch_active_grads(rows2, weight2, on.stream());
    launch_grads(rows1, weight1, false, on.stream());
    launch_reduce<T>(sums, on.stream());
  });
}

}  // namespace fasthyper

// The macros take names as they stand: one level more expands them.
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
