// Launchers of the kernels for sm_90a, in bfloat16 and float16.
#pragma once
#include "dx_dz.h"
#include "fold.h"
#include "instructions.h"
#include "weight_grad.h"

namespace fasthyper {

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
