// The operators of torch.ops.fasthyper_cpu for convolutions with weights of every instance. Results are written to
// tensors of the caller, which may be slices.
#pragma once

#include <torch/library.h>

#include "conv_weight_grad.h"
#include "tensors.h"

namespace fasthyper {
namespace {

// A convolution of images x to outputs y with kernels w, of which one or more are results.
struct Convolution {
  int64_t instances, groups, inputs, outputs;  // channels of a group
  ConvAxis axes[2];

  Convolution(
      const at::Tensor& x, const at::Tensor& w, const at::Tensor& y, at::IntArrayRef stride, at::IntArrayRef padding,
      at::IntArrayRef dilation, int64_t groups)
      : instances(x.size(0)), groups(groups) {
    for (const auto* t : {&x, &w, &y})
      TORCH_CHECK_TYPE(t->scalar_type() == at::kFloat, "convolutions must be float32, got ", t->scalar_type());
    TORCH_CHECK_VALUE(
        x.dim() == 4 && y.dim() == 4 && w.dim() == 5 && y.size(0) == instances && w.size(0) == instances &&
            groups > 0 && x.size(1) == w.size(2) * groups && y.size(1) == w.size(1) && w.size(1) % groups == 0,
        "images ", x.sizes(), ", weights ", w.sizes(), " and outputs ", y.sizes(), " of ", groups,
        " groups do not agree");
    inputs = w.size(2), outputs = w.size(1) / groups;
    TORCH_CHECK_VALUE(
        stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
        "stride, padding and dilation must have 2 entries");
    for (int k = 0; k < 2; ++k) {
      TORCH_CHECK_VALUE(stride[k] > 0 && dilation[k] > 0, "stride and dilation must be positive");
      axes[k] = {x.size(2 + k), y.size(2 + k), w.size(3 + k), stride[k], padding[k], dilation[k]};
    }
  }

  int64_t taps() const { return axes[0].kernel * axes[1].kernel; }
};

template <class S>
Images<S> images(const at::Tensor& t, S* data) {
  return {data, t.stride(0), t.stride(1), t.stride(2), t.stride(3), t.size(1), t.size(2), t.size(3)};
}

Images<const float> images(const at::Tensor& t) { return images(t, t.const_data_ptr<float>()); }
Images<float> images_out(const at::Tensor& t) { return images(t, t.mutable_data_ptr<float>()); }

// Whether the weights of an instance are contiguous.
bool contiguous_instances(const at::Tensor& w) {
  int64_t step = 1;
  for (int64_t k = 4; k > 0; --k) {
    if (w.size(k) != 1 && w.stride(k) != step) return false;
    step *= w.size(k);
  }
  return true;
}

at::Tensor readable_weights(const at::Tensor& w) {
  const at::Tensor held = realigned(w);
  return w.numel() == 0 || contiguous_instances(held) ? held : held.contiguous();
}

Shift shift_of(const std::optional<at::Tensor>& t, const at::Tensor& y) {
  if (!t) return {};
  TORCH_CHECK_TYPE(t->scalar_type() == at::kFloat, "shift must be float32, got ", t->scalar_type());
  TORCH_CHECK_VALUE(
      t->dim() == 2 && t->size(0) == y.size(0) && t->size(1) == y.size(1), "shift must have shape (", y.size(0), ", ",
      y.size(1), "), got ", t->sizes());
  return {t->const_data_ptr<float>(), t->stride(0), t->stride(1)};
}

void conv_instances(
    const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& shift, at::Tensor& y,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, int64_t workspace) {
  const Convolution c(x, w, y, stride, padding, dilation, groups);
  const auto from = realigned(x), weights = readable_weights(w);
  const auto added = realigned(shift);
  TORCH_CHECK_VALUE(aligned(y), "y must be aligned for its dtype");
  const Shift at_start = shift_of(added, y);
  if (y.numel() == 0) return;
  const int64_t source = c.taps(), target = c.inputs * source;
  const ConvWeights view{weights.const_data_ptr<float>(), weights.stride(0), c.outputs * target, target, source};
  const ForwardAxis rows(c.axes[0]), columns(c.axes[1]);
  AddTaps(images(from), images_out(y), c.instances, groups, view, at_start, rows, columns).run(workspace);
}

void conv_instances_input(
    const at::Tensor& g, const at::Tensor& w, const std::optional<at::Tensor>& shift, at::Tensor& dx,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, int64_t workspace) {
  const Convolution c(dx, w, g, stride, padding, dilation, groups);
  const auto from = realigned(g), weights = readable_weights(w);
  const auto added = realigned(shift);
  TORCH_CHECK_VALUE(aligned(dx), "dx must be aligned for its dtype");
  const Shift at_start = shift_of(added, dx);
  if (dx.numel() == 0) return;
  const int64_t target = c.taps(), source = c.inputs * target;
  const ConvWeights view{weights.const_data_ptr<float>(), weights.stride(0), c.outputs * source, target, source};
  const BackwardAxis rows(c.axes[0]), columns(c.axes[1]);
  AddTaps(images(from), images_out(dx), c.instances, groups, view, at_start, rows, columns).run(workspace);
}

void conv_instances_weight(
    const at::Tensor& x, const at::Tensor& g, at::Tensor& dw, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, int64_t workspace) {
  const Convolution c(x, dw, g, stride, padding, dilation, groups);
  if (dw.numel() == 0) return;
  TORCH_CHECK_VALUE(
      aligned(dw) && contiguous_instances(dw), "dw must be aligned, and contiguous except along instances");
  if (g.numel() == 0 || x.numel() == 0) {
    dw.zero_();
    return;
  }
  const auto images_of_x = realigned(x), images_of_g = realigned(g);
  const ConvWeightsOut to{dw.mutable_data_ptr<float>(), dw.stride(0), c.inputs * c.taps()};
  const ForwardAxis rows(c.axes[0]), columns(c.axes[1]);
  conv_weight_grad(images(images_of_x), images(images_of_g), c.instances, groups, to, rows, columns, workspace);
}

TORCH_LIBRARY_FRAGMENT(fasthyper_cpu, m) {
  m.def(
      "conv_instances(Tensor x, Tensor w, Tensor? shift, Tensor(a!) y, int[] stride, int[] padding, int[] dilation, "
      "int groups, int workspace) -> ()",
      conv_instances);
  m.def(
      "conv_instances_input(Tensor g, Tensor w, Tensor? shift, Tensor(a!) dx, int[] stride, int[] padding, "
      "int[] dilation, int groups, int workspace) -> ()",
      conv_instances_input);
  m.def(
      "conv_instances_weight(Tensor x, Tensor g, Tensor(a!) dw, int[] stride, int[] padding, int[] dilation, "
      "int groups, int workspace) -> ()",
      conv_instances_weight);
}

}  // namespace
}  // namespace fasthyper
