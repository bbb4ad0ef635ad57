// The kernels of dH for sm_90a, and which calls they are for.
#include "hopper_weight_grad.h"

#include "hopper_instructions.h"
#include "hopper_launchers.h"
#include "hopper_layouts.h"

namespace fasthyper {

template <class T, int BN>
KERNEL(HopperWeightGradShape<BN>::THREADS, 1)
hopper_weight_grad(const GRID_CONSTANT HopperWeightGrad<T> all) {
  HOPPER_ONLY(HopperWeightGradBlock<T, BN>(all, shared_memory(), block_x()).run();)
}

template <class T>
static Field field_of_z(const WeightGrad<T>& f) {
  return field_of(f.z.data, f.R, 1, 0, f.M, f.z.instance, 64);
}
template <class T>
static Field field_of_g(const WeightGrad<T>& f) {
  return field_of(f.g.data, f.O, 1, 0, f.M, f.g.instance, 64);
}

template <class T>
const char* hopper_misfit(const WeightGrad<T>& f) {
  if (f.M < 1 || f.I < 1 || f.O < 1 || f.R < 1) return "a side is empty";
  if (f.N != 1) return "more than one point";
  if (f.activation != Activation::none) return "an activation";
  if (!f.head.wanted() || f.bias.wanted() || f.base_weight.wanted() || f.base_bias.wanted())
    return "other gradients than dH";
  if (f.per_split < 1 || (f.per_split < f.M && (f.per_split % 64 || !f.head.partial)))
    return "splits are not of a multiple of 64";
  if ((f.R > 1 && f.z.step != 1) || (f.O > 1 && f.g.step != 1)) return "a row of z or g is not contiguous";
  if (const char* wrong = field_of_z(f).wrong()) return wrong;
  return field_of_g(f).wrong();
}

template <class T, int BN>
static void run(const WeightGrad<T>& f, Stream stream) {
  using Shape = HopperWeightGradShape<BN>;
  const HopperWeightGrad<T> all{f, tensor_map(field_of_z(f)), tensor_map(field_of_g(f))};
  const int blocks = cdiv(f.I, Shape::INPUTS) * cdiv(f.R, 64) * cdiv(f.O, BN) * cdiv(f.M, f.per_split);
  launch_hopper(
      &hopper_weight_grad<T, BN>, Grid{static_cast<unsigned>(blocks)}, Shape::THREADS, Shape::SHARED, stream, all);
}

template <class T>
void launch_on_hopper(const WeightGrad<T>& f, Stream stream) {
  f.O <= 64 ? run<T, 64>(f, stream) : run<T, 128>(f, stream);
}

template const char* hopper_misfit(const WeightGrad<bfloat16>&);
template const char* hopper_misfit(const WeightGrad<float16>&);
template void launch_on_hopper(const WeightGrad<bfloat16>&, Stream);
template void launch_on_hopper(const WeightGrad<float16>&, Stream);

}  // namespace fasthyper
