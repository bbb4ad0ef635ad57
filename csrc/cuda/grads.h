// The whole backward in one launch: some blocks have rows of dx and dz, the others tiles of the parameters' gradients.
#pragma once
#include "dx_dz.h"
#include "instructions.h"
#include "weight_grad.h"

namespace fasthyper {

// Blocks whose registers fit into a multiprocessor side by side: what ptxas does without spilling.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool two_fit = false;
#else
constexpr bool two_fit = true;
#endif
template <class Shape, bool ACTIVE>
constexpr int blocks_at_once = Shape::KEEPS_G && two_fit && !ACTIVE ? 2 : 1;

template <class T, int WM, int WI, bool ACTIVE>
KERNEL(32 * WM * WI, (blocks_at_once<DxDzShape<T, WM, WI>, ACTIVE>))
grads(
    const GRID_CONSTANT DxDz<T> rows, const GRID_CONSTANT WeightGrad<T> weight, const int row_blocks,
    const int weight_blocks) {
  using Shape = DxDzShape<T, WM, WI>;
  if (block_x() < row_blocks) {
    const int blocks = cdiv(rows.M, Shape::BM);
    DxDzBlock<T, Shape, ACTIVE>(rows, shared_memory(), block_x() % blocks, block_x() / blocks).run();
  } else {
    const int k = block_x() - row_blocks;
    WeightGradBlock<T, ACTIVE>(weight, shared_memory(), k % weight_blocks, k / weight_blocks).run();
  }
}

template <class T, int WM, int WI, bool ACTIVE>
void run_grads(const DxDz<T>& rows, const WeightGrad<T>& weight, Stream stream) {
  using Shape = DxDzShape<T, WM, WI>;
  static_assert(Shape::THREADS == WeightGradShape<T>::THREADS);
  const bool of_rows = rows.dx || rows.dz.wanted();
  const int row_blocks = of_rows ? cdiv(rows.M, Shape::BM) * cdiv(rows.I, rows.per_split) : 0;
  const int weight_blocks = weight.blocks(), splits = cdiv(weight.M, weight.per_split);
  int shared = of_rows ? Shape::shared_bytes(rows.O, rows.per_split, rows.dx) : 0;
  if (weight_blocks && WeightGradShape<T>::SHARED > shared) shared = WeightGradShape<T>::SHARED;
  const Grid grid{static_cast<unsigned>(row_blocks + weight_blocks * splits)};
  if (grid.x)
    launch(&grads<T, WM, WI, ACTIVE>, grid, Shape::THREADS, shared, stream, rows, weight, row_blocks, weight_blocks);
}

}  // namespace fasthyper
