// Kernels of all gradients of a layer, for all dtypes.
#include "grads.h"

#include "launchers.h"

namespace fasthyper {

template <class T>
void launch_grads(const DxDz<T>& dx_dz, const WeightGrad<T>& weight_grad, bool wide, Stream stream) {
  if (wide || dx_dz.O > NarrowDxDz<T>::DEPTH) run_grads<WideDxDz<T>, false>(dx_dz, weight_grad, stream);
  else run_grads<NarrowDxDz<T>, false>(dx_dz, weight_grad, stream);
}

template void launch_grads(const DxDz<float>&, const WeightGrad<float>&, bool, Stream);
template void launch_grads(const DxDz<bfloat16>&, const WeightGrad<bfloat16>&, bool, Stream);
template void launch_grads(const DxDz<float16>&, const WeightGrad<float16>&, bool, Stream);

}  // namespace fasthyper
