// Kernels of dH for sm_90a, and the check whether they support a call.
#include "hopper_weight_grad.h"

#include "hopper_instructions.h"
#include "hopper_launchers.h"
#include "hopper_layouts.h"

namespace fasthyper {

template <class T, int BN>
KERNEL(HopperWeightGradShape<BN>::THREADS, 1)
hopper_weight_grad(const GRID_CONSTANT HopperWeightGrad<T> params) {
  HOPPER_ONLY(HopperWeightGradCta<T, BN>(params, smem_base(), cta_x()).run();)
}

template <class T>
static TmaTensor z_tensor(const WeightGrad<T>& f, int rows) {
  return tma_tensor(f.z.data, f.R, 1, 0, f.M, f.z.instance_stride, rows);
}
template <class T>
static TmaTensor g_tensor(const WeightGrad<T>& f, int rows) {
  return tma_tensor(f.g.data, f.O, 1, 0, f.M, f.g.instance_stride, rows);
}

template <class T>
const char* hopper_unsupported(const WeightGrad<T>& f) {
  if (f.M < 1 || f.I < 1 || f.O < 1 || f.R < 1) return "an axis is empty";
  if (f.N != 1) return "more than one point";
  if (f.activation != Activation::none) return "an activation";
  if (!f.head.requested() || f.bias.requested() || f.base_weight.requested() || f.base_bias.requested())
    return "other gradients than dH";
  if (f.per_split < 1 || (f.per_split < f.M && (f.per_split % 64 || !f.head.partial)))
    return "per_split is not a multiple of 64";
  if ((f.R > 1 && f.z.stride != 1) || (f.O > 1 && f.g.stride != 1)) return "a row of z or g is not contiguous";
  if (const char* why = z_tensor(f, 64).unsupported()) return why;
  return g_tensor(f, 64).unsupported();
}

template <class T, int BN>
static void run(const WeightGrad<T>& f, Stream stream) {
  using Shape = HopperWeightGradShape<BN>;
  const int i_tiles = cdiv(f.I, Shape::INPUTS), cluster = cluster_for(i_tiles), rows = Shape::BATCH / cluster;
  const HopperWeightGrad<T> params{f, tensor_map(z_tensor(f, rows)), tensor_map(g_tensor(f, rows))};
  const int ctas = cdiv(i_tiles, cluster) * cluster * cdiv(f.R, 64) * cdiv(f.O, BN) * cdiv(f.M, f.per_split);
  launch_sm90a(
      &hopper_weight_grad<T, BN>, Grid{static_cast<unsigned>(ctas)}, cluster, Shape::THREADS, Shape::SMEM_BYTES, stream,
      params);
}

template <class T>
void launch_hopper(const WeightGrad<T>& f, Stream stream) {
  dispatch_columns(f.O, [&](auto columns) { run<T, decltype(columns)::value>(f, stream); });
}

template const char* hopper_unsupported(const WeightGrad<bfloat16>&);
template const char* hopper_unsupported(const WeightGrad<float16>&);
template void launch_hopper(const WeightGrad<bfloat16>&, Stream);
template void launch_hopper(const WeightGrad<float16>&, Stream);

}  // namespace fasthyper
