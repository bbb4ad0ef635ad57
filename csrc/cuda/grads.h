// Backward in one launch: some CTAs compute rows of dx and dz, the others tiles of the parameters' gradients.
#pragma once
#include "dx_dz.h"
#include "instructions.h"
#include "weight_grad.h"

namespace fasthyper {

// CTAs per SM for which ptxas does not spill registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool two_ctas_fit = false;
#else
constexpr bool two_ctas_fit = true;
#endif
template <class Shape, bool ACTIVE>
constexpr int min_ctas_per_sm = Shape::G_OPERAND_IN_REGISTERS && two_ctas_fit && !ACTIVE ? 2 : 1;

template <class T, class Shape, bool ACTIVE>
KERNEL(Shape::THREADS, (min_ctas_per_sm<Shape, ACTIVE>))
grads(
    const GRID_CONSTANT DxDz<T> dx_dz, const GRID_CONSTANT WeightGrad<T> weight_grad, const int dx_dz_ctas,
    const int weight_grad_ctas) {
  if (cta_x() < dx_dz_ctas) {
    const int m_tiles = cdiv(dx_dz.M, Shape::BM);
    DxDzCta<T, Shape, ACTIVE>(dx_dz, smem_base(), cta_x() % m_tiles, cta_x() / m_tiles).run();
  } else {
    const int k = cta_x() - dx_dz_ctas;
    WeightGradCta<T, ACTIVE>(weight_grad, smem_base(), k % weight_grad_ctas, k / weight_grad_ctas).run();
  }
}

template <class Shape, bool ACTIVE, class T>
void run_grads(const DxDz<T>& dx_dz, const WeightGrad<T>& weight_grad, Stream stream) {
  static_assert(Shape::THREADS == WeightGradShape<T>::THREADS);
  const bool has_dx_dz = dx_dz.dx || dx_dz.dz.requested();
  const int dx_dz_ctas = has_dx_dz ? cdiv(dx_dz.M, Shape::BM) * cdiv(dx_dz.I, dx_dz.per_split) : 0;
  const int weight_grad_ctas = weight_grad.ctas(), splits = cdiv(weight_grad.M, weight_grad.per_split);
  int smem_bytes = has_dx_dz ? Shape::smem_bytes(dx_dz.O, dx_dz.per_split, dx_dz.dx) : 0;
  if (weight_grad_ctas && WeightGradShape<T>::SMEM_BYTES > smem_bytes) smem_bytes = WeightGradShape<T>::SMEM_BYTES;
  const Grid grid{static_cast<unsigned>(dx_dz_ctas + weight_grad_ctas * splits)};
  if (grid.x)
    launch(
        &grads<T, Shape, ACTIVE>, grid, Shape::THREADS, smem_bytes, stream, dx_dz, weight_grad, dx_dz_ctas,
        weight_grad_ctas);
}

}  // namespace fasthyper
