// Conversions from tensors of torch's stable ABI to arguments of kernels.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

#include "instructions.h"
#include "limits.h"
#include "numbers.h"
#include "views.h"

#ifndef FASTHYPER_EMULATED
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace fasthyper {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}
template <class T>
T* data(const OptionalTensor& t) {
  return t ? data<T>(*t) : nullptr;
}

inline int size(const Tensor& t, int axis) { return static_cast<int>(t.size(axis)); }

// x or g, (B, N, features), or z, (B, R), whose rows all points share.
template <class T>
RowView<T> row_view(const Tensor& t) {
  const bool points = t.dim() == 3;
  return {data<T>(t), t.stride(0), points ? t.stride(1) : 0, t.stride(points ? 2 : 1)};
}

template <class T>
RowView<T> row_view(const OptionalTensor& t) {
  return t ? row_view<T>(*t) : RowView<T>{};
}

template <class T>
int copy_width(const RowView<T>& view) {
  return fasthyper::copy_width(view.data, view.stride, view.instance_stride, view.point_stride);
}

inline int64_t stride(const OptionalTensor& t, int axis) { return t ? t->stride(axis) : 0; }

// Makes a device the current one, and returns its current stream and its limits.
class DeviceScope {
#ifdef FASTHYPER_EMULATED
 public:
  explicit DeviceScope(int64_t) {}
  explicit DeviceScope(const Tensor&) {}
  Stream stream() const { return {}; }
  Limits limits(int64_t workspace) const { return limits_of(0, workspace); }
#else
  const torch::stable::accelerator::DeviceGuard guard;
  const int32_t device;

 public:
  // The guard leaves a new thread without a context where its device is current already, and TMA descriptors need one.
  explicit DeviceScope(int64_t index) : guard(int32_t(index)), device(int32_t(index)) { check(cudaSetDevice(device)); }
  explicit DeviceScope(const Tensor& t) : DeviceScope(t.get_device_index()) {}
  Stream stream() const {
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "torch was built without CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    return static_cast<Stream>(stream);
  }
  Limits limits(int64_t workspace) const { return limits_of(device, workspace); }
#endif
};

// Call with a zero of the dtype of t.
template <class Call>
void dispatch_dtype(const Tensor& t, Call call) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return call(float{});
    case ScalarType::BFloat16:
      return call(bfloat16{});
    case ScalarType::Half:
      return call(float16{});
    default:
      STD_TORCH_CHECK(false, "x must be float32, bfloat16 or float16");
  }
}

}  // namespace fasthyper
