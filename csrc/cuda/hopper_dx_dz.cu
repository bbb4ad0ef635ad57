// Kernels of dx and dz for sm_90a, and the check whether they support a call.
#include "hopper_dx_dz.h"

#include "hopper_instructions.h"
#include "hopper_launchers.h"
#include "hopper_layouts.h"

namespace fasthyper {

template <class T, int BR, int DEPTH>
KERNEL((HopperDxDzShape<BR, DEPTH>::THREADS), 1)
hopper_dx_dz(const GRID_CONSTANT HopperDxDz<T> params, const int m_tiles) {
  HOPPER_ONLY(HopperDxDzCta<T, BR, DEPTH>(params, smem_base(), cta_x() % m_tiles, cta_x() / m_tiles).run();)
}

template <class T>
static TmaTensor g_tensor(const DxDz<T>& f) {
  return tma_tensor(f.g.data, f.O, 1, 0, f.M, f.N == 1 ? f.g.instance_stride : f.g.point_stride, 64);
}
template <class T>
static TmaTensor h_tensor(const DxDz<T>& f, int rows) {
  return tma_tensor(f.h, f.R, f.I, f.h_i, f.O, f.h_o, rows);
}
template <class T>
static TmaTensor bias_tensor(const DxDz<T>& f, int rows) {
  return tma_tensor(f.bias, f.R, 1, 0, f.O, f.bias_o, rows);
}
template <class T>
static TmaTensor base_tensor(const DxDz<T>& f, int rows) {
  return tma_tensor(f.base, f.I, 1, 0, f.O, f.base_o, rows);
}

template <class T>
const char* hopper_unsupported(const DxDz<T>& f) {
  if (f.M < 1 || f.I < 1 || f.O < 1 || f.R < 1) return "an axis is empty";
  if (f.R > 128) return "R of more than 128";
  if (f.O > 256) return "O of more than 256";
  if (f.activation != Activation::none) return "an activation";
  if (!f.h || !f.dx || !f.dz.requested()) return "only one of dx and dz is requested";
  if (!fits_int32(f.x, f.M, f.N, f.I)) return "x spans 2^31 elements or more";
  if (f.per_split < 1 || ((f.per_split < f.I || f.N > 1) && !f.dz.partial))
    return "splits or points without partial sums of dz";
  if (f.N > 1 && f.M > f.N && f.g.instance_stride != f.N * f.g.point_stride) return "rows of g have no common stride";
  if ((f.R > 1 && (f.h_r != 1 || (f.bias && f.bias_r != 1))) || (f.O > 1 && f.g.stride != 1) ||
      (f.base && f.I > 1 && f.base_i != 1))
    return "a row of g, H, bias or W0 is not contiguous";
  if (const char* why = g_tensor(f).unsupported()) return why;
  if (const char* why = h_tensor(f, 64).unsupported()) return why;
  if (const char* why = f.bias ? bias_tensor(f, 64).unsupported() : nullptr) return why;
  return f.base ? base_tensor(f, 64).unsupported() : nullptr;
}

template <class T, int BR, int DEPTH>
static void run(const DxDz<T>& f, Stream stream) {
  using Shape = HopperDxDzShape<BR, DEPTH>;
  const int tiles = cdiv(f.M, Shape::BM), cluster = cluster_for(tiles), m_tiles = cdiv(tiles, cluster) * cluster;
  const int rows = 16 * DEPTH / cluster;
  const HopperDxDz<T> params{
      f, tensor_map(g_tensor(f)), tensor_map(h_tensor(f, rows)), tensor_map(bias_tensor(f, rows)),
      tensor_map(base_tensor(f, rows))};
  const Grid grid{static_cast<unsigned>(m_tiles * cdiv(f.I, f.per_split))};
  launch_sm90a(&hopper_dx_dz<T, BR, DEPTH>, grid, cluster, Shape::THREADS, Shape::SMEM_BYTES, stream, params, m_tiles);
}

template <class T, int BR>
static void run(const DxDz<T>& f, Stream stream) {
  if (f.O <= 32) run<T, BR, 2>(f, stream);
  else if (f.O <= 48) run<T, BR, 3>(f, stream);
  else if (f.O <= 64) run<T, BR, 4>(f, stream);
  else if (f.O <= 96) run<T, BR, 6>(f, stream);
  else if (f.O <= 128) run<T, BR, 8>(f, stream);
  else run<T, BR, 16>(f, stream);
}

template <class T>
void launch_hopper(const DxDz<T>& f, Stream stream) {
  dispatch_columns(f.R, [&](auto columns) { run<T, decltype(columns)::value>(f, stream); });
}

template const char* hopper_unsupported(const DxDz<bfloat16>&);
template const char* hopper_unsupported(const DxDz<float16>&);
template void launch_hopper(const DxDz<bfloat16>&, Stream);
template void launch_hopper(const DxDz<float16>&, Stream);

}  // namespace fasthyper
