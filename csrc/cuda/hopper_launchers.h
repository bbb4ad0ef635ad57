// Launchers of the kernels for sm_90a, in bfloat16 and float16.
#pragma once
#include <type_traits>

#include "dx_dz.h"
#include "fold.h"
#include "hopper.h"
#include "instructions.h"
#include "weight_grad.h"

namespace fasthyper {

// Call with the columns of a tile of a matrix with n columns, as a constant.
template <class Call>
void dispatch_columns(int n, Call call) {
  switch (columns_for(n)) {
    case 48:
      return call(std::integral_constant<int, 48>{});
    case 64:
      return call(std::integral_constant<int, 64>{});
    case 96:
      return call(std::integral_constant<int, 96>{});
    default:
      return call(std::integral_constant<int, 128>{});
  }
}

// Return why the kernel does not support a call, or null.
template <class T>
const char* hopper_unsupported(const Fold<T>& f);
template <class T>
const char* hopper_unsupported(const WeightGrad<T>& f);
template <class T>
const char* hopper_unsupported(const DxDz<T>& f);

// fold: y or dx. weight_grad: only dH. dx_dz: both dx and dz.
template <class T>
void launch_hopper(const Fold<T>& f, Stream stream);
template <class T>
void launch_hopper(const WeightGrad<T>& f, Stream stream);
template <class T>
void launch_hopper(const DxDz<T>& f, Stream stream);

}  // namespace fasthyper
