// The arguments of kernels from tensors.
#pragma once
#include <cstdint>

#include "activation.h"
#include "dx_dz.h"
#include "fold.h"
#include "reduce.h"
#include "tensors.h"
#include "weight_grad.h"

namespace fasthyper {

// The parameters of a generated layer, or their gradients: H (O, I, R), bias (O, R), W0 (O, I), b0 (O).
struct Layer {
  const OptionalTensor &head, &bias, &base_weight, &base_bias;
};

// Arguments of fold, with out (B·N, P). In forward A, C and d are W0, bias and b0.
template <class T>
Fold<T> fold_of(
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
Fold<T> fold_of(
    const Tensor& x, const Tensor& z, const Layer& layer, const Tensor& out, const OptionalTensor& partial,
    int64_t per_split, bool tf32) {
  const Tensor& h = *layer.head;
  return fold_of<T>(
      x, z, data<T>(h), h.stride(1), h.stride(2), h.stride(0), layer.base_weight, layer.bias, layer.base_bias, out,
      partial, per_split, tf32);
}

// R, of z or of H.
inline int features(const OptionalTensor& z, const OptionalTensor& h) { return z ? size(*z, 1) : size(*h, 2); }

// Arguments for dx (B, N, I), and for dz (B, R) or its partial sums (splits, B·N, R).
template <class T>
DxDz<T> dx_dz_of(
    const Tensor& x, const OptionalTensor& z, const Tensor& g, const Layer& layer, const OptionalTensor& dx,
    const OptionalTensor& dz, float* dz_partials, int64_t per_split, bool tf32, int64_t activation) {
  DxDz<T> f{};
  const OptionalTensor &h = layer.head, &bias = layer.bias, &base = layer.base_weight;
  f.g = row_view<T>(g), f.z = row_view<T>(z), f.x = row_view<T>(x);
  f.h = data<T>(h), f.h_o = stride(h, 0), f.h_i = stride(h, 1), f.h_r = stride(h, 2);
  f.bias = data<T>(bias), f.bias_o = stride(bias, 0), f.bias_r = stride(bias, 1);
  f.base = data<T>(base), f.base_o = stride(base, 0), f.base_i = stride(base, 1);
  f.dx = data<T>(dx);
  if (dz) f.dz = {data<T>(dz), dz_partials};
  f.N = size(x, 1), f.M = size(x, 0) * f.N, f.I = size(x, 2), f.O = size(g, 2), f.R = features(z, h);
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
WeightGrad<T> weight_grad_of(
    const Tensor& x, const OptionalTensor& z, const Tensor& g, const Layer& grads, const OptionalTensor& partials,
    int64_t per_split, bool tf32, int64_t activation, Reductions& reductions) {
  WeightGrad<T> f{};
  f.x = row_view<T>(x), f.z = row_view<T>(z), f.g = row_view<T>(g);
  f.N = size(x, 1), f.M = size(x, 0) * f.N, f.I = size(x, 2), f.O = size(g, 2), f.R = z ? size(*z, 1) : 0;
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
inline Reduction dz_reduction(const Tensor& x, const Tensor& dz, const Tensor& partials) {
  const int64_t B = x.size(0), N = x.size(1), R = dz.size(1);
  return {data<float>(partials), dz.data_ptr(), B, N, R, partials.numel() / (B * N * R), B * N * R};
}

}  // namespace fasthyper
