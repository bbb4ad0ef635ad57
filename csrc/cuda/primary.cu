// A generated primary of two layers. A CTA computes both layers for its rows, so that no CTA waits for another.
//
//     a = x (H1 z + W1)ᵀ + bias1 z + b1          y = σ(a) (H2 z + W2)ᵀ + bias2 z + b2
//
// If x has many features and the batch few rows, `fold` computes partial sums of the first layer, and this kernel adds
// them. Backward is grads of the second layer, where x is σ(a) and dx the gradient of a, then grads of the first.
#include "fold.h"
#include "grads.h"
#include "instructions.h"
#include "launchers.h"

namespace fasthyper {

// Add the partial sums of the first layer for the rows of this CTA.
template <class T>
DEVICE void add_partials(const Fold<T>& f, int m0, int rows, int threads) {
  constexpr int LANES = 8;  // per sum: each lane adds every eighth partial sum
  const int splits = cdiv(f.C, f.per_split), lane = thread() % LANES;
  const int64_t size = static_cast<int64_t>(f.M) * f.P;
  const int here = least(rows, f.M - m0) * f.P;
  for (int k = thread() / LANES; k < cdiv(here, threads / LANES) * (threads / LANES); k += threads / LANES) {
    const int64_t at = static_cast<int64_t>(m0) * f.P + k;
    float sum = 0.f;
    for (int s = lane; k < here && s < splits; s += LANES) sum += f.partial[s * size + at];
#pragma unroll
    for (int mask = 1; mask < LANES; mask *= 2) sum += shuffle_xor(sum, mask);
    if (lane == 0 && k < here) f.out[at] = static_cast<T>(sum);
  }
}

template <class T, class Shape, bool ACTIVE>
DEVICE void run_layer(const Fold<T>& f, int m0, int stages) {
  for (int p0 = 0; p0 < f.P; p0 += Shape::BP)
    FoldCta<T, Shape, ACTIVE>(f, smem_base(), stages, p0, 0).run(m0, false, [&](int m, int p, float sum) {
      if (f.d) sum += static_cast<float>(f.d[p * f.d_p]);
      f.out[static_cast<int64_t>(m) * f.P + p] = static_cast<T>(sum);
    });
}

template <class T, int NT>
KERNEL(256, (NarrowFold<T, NT>::MIN_CTAS_PER_SM))
primary(const GRID_CONSTANT Fold<T> first, const GRID_CONSTANT Fold<T> second, const int stages) {
  using Shape = NarrowFold<T, NT>;
  const int m0 = cta_x() * Shape::BM;
  if (first.partial) add_partials(first, m0, Shape::BM, Shape::THREADS);
  else run_layer<T, Shape, false>(first, m0, stages);
  sync_threads();  // the second layer reads the output of the first
  run_layer<T, Shape, true>(second, m0, stages);
}

template <class T, int NT>
static void run(const Fold<T>& first, const Fold<T>& second, Stream stream) {
  using Shape = NarrowFold<T, NT>;
  constexpr int stages = Shape::PREFETCH + 1;
  const Grid grid{static_cast<unsigned>(cdiv(second.M, Shape::BM))};
  launch(&primary<T, NT>, grid, Shape::THREADS, Shape::smem_bytes(stages), stream, first, second, stages);
}

template <class T>
void launch_primary(const Fold<T>& first, const Fold<T>& second, Stream stream) {
  const int columns = first.P > second.P && !first.partial ? first.P : second.P;
  if (columns > 32) run<T, 8>(first, second, stream);
  else if (columns > 16) run<T, 4>(first, second, stream);
  else run<T, 2>(first, second, stream);
}

template <class T>
void launch_active_grads(const DxDz<T>& rows, const WeightGrad<T>& weight, Stream stream) {
  run_grads<NarrowDxDz<T>, true>(rows, weight, stream);
}

template void launch_primary(const Fold<float>&, const Fold<float>&, Stream);
template void launch_primary(const Fold<bfloat16>&, const Fold<bfloat16>&, Stream);
template void launch_primary(const Fold<float16>&, const Fold<float16>&, Stream);
template void launch_active_grads(const DxDz<float>&, const WeightGrad<float>&, Stream);
template void launch_active_grads(const DxDz<bfloat16>&, const WeightGrad<bfloat16>&, Stream);
template void launch_active_grads(const DxDz<float16>&, const WeightGrad<float16>&, Stream);

}  // namespace fasthyper
