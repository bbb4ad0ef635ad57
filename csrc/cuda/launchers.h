// Launchers of the kernels for sm_80 and newer.
#pragma once
#include "dx_dz.h"
#include "fold.h"
#include "instructions.h"
#include "weight_grad.h"

namespace fasthyper {

// wide: CTAs have 128 rows, otherwise 32.
template <class T>
void launch_fold(const Fold<T>& f, bool wide, Stream stream);

// dx and dz, and the gradients of all parameters.
template <class T>
void launch_grads(const DxDz<T>& dx_dz, const WeightGrad<T>& weight_grad, bool wide, Stream stream);

// The same, if an activation applies to x.
template <class T>
void launch_active_grads(const DxDz<T>& dx_dz, const WeightGrad<T>& weight_grad, Stream stream);

// Two layers and the activation between them. first.out is second.u, to which the activation applies. If first.partial
// is given, it already holds the partial sums of the first layer.
template <class T>
void launch_primary(const Fold<T>& first, const Fold<T>& second, Stream stream);

}  // namespace fasthyper
