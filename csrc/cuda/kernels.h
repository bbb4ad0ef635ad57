// What library.cu launches, and where the limits of a part stand.
#pragma once
#include "fold.h"
#include "reduce.h"
#include "weight_grad.h"

namespace fasthyper {

constexpr int SHARED_BYTES = 96 << 10;   // of a block: two of them on sm_90, one on every part since sm_80
constexpr int BLOCKS_AT_ONCE = 2 * 132;  // about as many as run side by side; no result depends on it

// wide: blocks of 128 rows, not 32.
template <class T>
void launch_fold(const Fold<T>& f, bool wide, Stream stream);

// dx and dz, and all gradients of parameters.
template <class T>
void launch_grads(const DxDz<T>& rows, const WeightGrad<T>& weight, bool wide, Stream stream);

// The same where x is what an activation makes of its rows.
template <class T>
void launch_active_grads(const DxDz<T>& rows, const WeightGrad<T>& weight, Stream stream);

// Two layers and the activation between them. first.out is what the activation is applied to, second.u; where
// first.partial is given, its sums are there already, in parts.
template <class T>
void launch_primary(const Fold<T>& first, const Fold<T>& second, Stream stream);

}  // namespace fasthyper
