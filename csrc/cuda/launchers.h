// What library.cu launches.
#pragma once
#include "dx_dz.h"
#include "fold.h"
#include "instructions.h"
#include "weight_grad.h"

namespace fasthyper {

// wide: blocks of 128 rows, not 32.
template <class T>
void launch_fold(const Fold<T>& f, bool wide, Stream stream);

// dx and dz, and all gradients of parameters.
template <class T>
void launch_grads(const DxDz<T>& dx_dz, const WeightGrad<T>& weight_grad, bool wide, Stream stream);

// The same where x is what an activation makes of its rows.
template <class T>
void launch_active_grads(const DxDz<T>& dx_dz, const WeightGrad<T>& weight_grad, Stream stream);

// Two layers and the activation between them. first.out is what the activation is applied to, second.u; where
// first.partial is given, its sums are there already, in parts.
template <class T>
void launch_primary(const Fold<T>& first, const Fold<T>& second, Stream stream);

}  // namespace fasthyper
