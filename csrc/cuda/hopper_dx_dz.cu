// The kernels of dx and dz for sm_90a, and which calls they are for.
#include "hopper_dx_dz.h"

#include "hopper_instructions.h"
#include "hopper_launchers.h"
#include "hopper_layouts.h"

namespace fasthyper {

template <class T, int BR, int DEPTH>
KERNEL((HopperDxDzShape<BR, DEPTH>::THREADS), 1)
hopper_dx_dz(const GRID_CONSTANT HopperDxDz<T> all, const int row_blocks) {
  HOPPER_ONLY(
      HopperDxDzBlock<T, BR, DEPTH>(all, shared_memory(), block_x() % row_blocks, block_x() / row_blocks).run();)
}

template <class T>
static Field field_of_g(const DxDz<T>& f) {
  return field_of(f.g.data, f.O, 1, 0, f.M, f.N == 1 ? f.g.instance : f.g.point, 64);
}
template <class T>
static Field field_of_h(const DxDz<T>& f, int rows) {
  return field_of(f.h, f.R, f.I, f.h_i, f.O, f.h_o, rows);
}
template <class T>
static Field field_of_bias(const DxDz<T>& f, int rows) {
  return field_of(f.bias, f.R, 1, 0, f.O, f.bias_o, rows);
}
template <class T>
static Field field_of_base(const DxDz<T>& f, int rows) {
  return field_of(f.base, f.I, 1, 0, f.O, f.base_o, rows);
}

template <class T>
const char* hopper_misfit(const DxDz<T>& f) {
  if (f.M < 1 || f.I < 1 || f.O < 1 || f.R < 1) return "a side is empty";
  if (f.R > 128) return "R of more than 128";
  if (f.O > 256) return "O of more than 256";
  if (f.activation != Activation::none) return "an activation";
  if (!f.h || !f.dx || !f.dz.wanted()) return "dx or dz alone";
  if (!is_near(f.x, f.M, f.N, f.I)) return "more than 2^31 numbers of x";
  if (f.per_split < 1 || ((f.per_split < f.I || f.N > 1) && !f.dz.partial))
    return "splits or points without parts of dz";
  if (f.N > 1 && f.M > f.N && f.g.instance != f.N * f.g.point) return "rows of g that do not follow each other";
  if ((f.R > 1 && (f.h_r != 1 || (f.bias && f.bias_r != 1))) || (f.O > 1 && f.g.step != 1) ||
      (f.base && f.I > 1 && f.base_i != 1))
    return "a row of g, H, bias or W0 is not contiguous";
  if (const char* wrong = field_of_g(f).wrong()) return wrong;
  if (const char* wrong = field_of_h(f, 64).wrong()) return wrong;
  if (const char* wrong = f.bias ? field_of_bias(f, 64).wrong() : nullptr) return wrong;
  return f.base ? field_of_base(f, 64).wrong() : nullptr;
}

template <class T, int BR, int DEPTH>
static void run(const DxDz<T>& f, Stream stream) {
  using Shape = HopperDxDzShape<BR, DEPTH>;
  const HopperDxDz<T> all{
      f, tensor_map(field_of_g(f)), tensor_map(field_of_h(f, 16 * DEPTH)), tensor_map(field_of_bias(f, 16 * DEPTH)),
      tensor_map(field_of_base(f, 16 * DEPTH))};
  const int row_blocks = cdiv(f.M, Shape::BM);
  const Grid grid{static_cast<unsigned>(row_blocks * cdiv(f.I, f.per_split))};
  launch_hopper(&hopper_dx_dz<T, BR, DEPTH>, grid, Shape::THREADS, Shape::SHARED, stream, all, row_blocks);
}

template <class T, int BR>
static void run(const DxDz<T>& f, Stream stream) {
  if (f.O <= 32) run<T, BR, 2>(f, stream);
  else if (f.O <= 64) run<T, BR, 4>(f, stream);
  else if (f.O <= 128) run<T, BR, 8>(f, stream);
  else run<T, BR, 16>(f, stream);
}

template <class T>
void launch_on_hopper(const DxDz<T>& f, Stream stream) {
  f.R <= 64 ? run<T, 64>(f, stream) : run<T, 128>(f, stream);
}

template const char* hopper_misfit(const DxDz<bfloat16>&);
template const char* hopper_misfit(const DxDz<float16>&);
template void launch_on_hopper(const DxDz<bfloat16>&, Stream);
template void launch_on_hopper(const DxDz<float16>&, Stream);

}  // namespace fasthyper
