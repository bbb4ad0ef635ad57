// Checks of the tensors that an operator gets, whoever calls it: kernels read and write memory as sizes and dtypes say.
#pragma once
#include <cstdint>
#include <initializer_list>

#include "arguments.h"
#include "limits.h"
#include "tensors.h"

namespace fasthyper {

// Throws unless tensors have the dtype and the device of x, and the sizes that are expected.
class Checks {
  const torch::headeronly::ScalarType dtype;
  const torch::stable::Device device;

 public:
  // x is (B, N, I). No axis may be empty: R and O are those of the layer.
  Checks(const Tensor& x, int64_t R, int64_t O) : dtype(x.scalar_type()), device(x.device()) {
    STD_TORCH_CHECK(x.dim() == 3, "x must have 3 axes, got ", x.dim());
    const auto B = x.size(0), N = x.size(1), I = x.size(2);
    for (const int64_t size : {B, N, I, R, O}) STD_TORCH_CHECK(size > 0, "no axis of x, z and weight may be empty");
    STD_TORCH_CHECK(B <= MOST_ROWS / N, "x has ", B, " times ", N, " rows, more than ", MOST_ROWS);
    for (const int64_t size : {I, R, O}) STD_TORCH_CHECK(size < int64_t(1) << 31, "an axis of ", size, " is too long");
  }

  void input(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) const {
    STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must have the dtype of x");
    STD_TORCH_CHECK(t.device() == device, name, " must be on the device of x");
    STD_TORCH_CHECK(t.dim() == int64_t(sizes.size()), name, " must have ", sizes.size(), " axes, got ", t.dim());
    int64_t axis = 0;
    for (const int64_t size : sizes) {
      STD_TORCH_CHECK(t.size(axis) == size, name, " must have ", size, " of axis ", axis, ", got ", t.size(axis));
      ++axis;
    }
  }
  void input(const char* name, const OptionalTensor& t, std::initializer_list<int64_t> sizes) const {
    if (t) input(name, *t, sizes);
  }
  void result(const char* name, const OptionalTensor& t, std::initializer_list<int64_t> sizes) const {
    input(name, t, sizes);
    STD_TORCH_CHECK(!t || t->is_contiguous(), name, " must be contiguous");
  }
  // The parameters of a layer, and the gradients that are computed of them.
  void layer(const Layer& given, int64_t R, int64_t I, int64_t O) const {
    input("the weight", given.head, {O, I, R}), input("the bias", given.bias, {O, R});
    input("the base weight", given.base_weight, {O, I}), input("the base bias", given.base_bias, {O});
  }
  void gradients(const Layer& results, int64_t R, int64_t I, int64_t O) const {
    result("the weight's gradient", results.head, {O, I, R}), result("the bias's gradient", results.bias, {O, R});
    result("the base weight's gradient", results.base_weight, {O, I});
    result("the base bias's gradient", results.base_bias, {O});
  }
};

}  // namespace fasthyper
