// Kernels of fold for sm_90a, and the check whether they support a call.
#include "hopper_fold.h"

#include "hopper_instructions.h"
#include "hopper_launchers.h"
#include "hopper_layouts.h"

namespace fasthyper {

template <class T, int BN, bool SMALL_K>
KERNEL(HopperFoldShape<BN>::THREADS, 1)
hopper_fold(const GRID_CONSTANT HopperFold<T> params) {
  HOPPER_ONLY(HopperFoldCta<T, BN, SMALL_K>(params, smem_base()).run();)
}

// Return how many c share a row of a tile of H.
template <class T>
static int c_per_tile(const Fold<T>& f) {
  const bool small = (f.K == 16 || f.K == 32) && f.h_c == f.K && f.C > 1;
  return small ? per_row<T> / f.K : 1;
}

template <class T>
static TmaTensor h_tensor(const Fold<T>& f, int rows) {
  if (c_per_tile(f) > 1) return tma_tensor(f.h, static_cast<int64_t>(f.C) * f.K, 1, 0, f.P, f.h_p, rows);
  return tma_tensor(f.h, f.K, f.C, f.h_c, f.P, f.h_p, rows);
}
template <class T>
static TmaTensor a_tensor(const Fold<T>& f, int rows) {
  return tma_tensor(f.a, f.C, 1, 0, f.P, f.a_p, rows);
}
template <class T>
static TmaTensor c_tensor(const Fold<T>& f, int rows) {
  return tma_tensor(f.c, f.K, 1, 0, f.P, f.c_p, rows);
}

template <class T>
const char* hopper_unsupported(const Fold<T>& f) {
  if (f.M < 1 || f.C < 1 || f.K < 1 || f.P < 1) return "an axis is empty";
  if (f.activation != Activation::none) return "an activation";
  if (static_cast<int64_t>(f.C) * f.K >= int64_t(1) << 31) return "C times K of 2^31 or more";
  if (!fits_int32(f.u, f.M, f.N, f.C)) return "u spans 2^31 elements or more";
  if (f.per_split < 1 || (f.per_split < f.C && (f.per_split % 8 || !f.partial)))
    return "per_split is not a multiple of 8";
  if (f.h_k != 1 || (f.a && f.a_c != 1) || (f.c && f.c_k != 1)) return "a row of H, A or C is not contiguous";
  if (const char* why = h_tensor(f, 64).unsupported()) return why;
  if (const char* why = f.a ? a_tensor(f, 64).unsupported() : nullptr) return why;
  if (const char* why = f.c ? c_tensor(f, 64).unsupported() : nullptr) return why;
  return nullptr;
}

template <class T, int BN, bool SMALL_K>
static void run(const Fold<T>& f, Stream stream) {
  using Shape = HopperFoldShape<BN>;
  const HopperFold<T> params{
      f, tensor_map(h_tensor(f, BN)), tensor_map(a_tensor(f, BN)), tensor_map(c_tensor(f, BN)), c_per_tile(f)};
  const int tiles = cdiv(f.M, Shape::BM) * cdiv(f.P, BN) * cdiv(f.C, f.per_split);
  const Grid grid{static_cast<unsigned>(least(tiles, sm_count()))};
  launch_sm90a(&hopper_fold<T, BN, SMALL_K>, grid, 1, Shape::THREADS, Shape::SMEM_BYTES, stream, params);
}

template <class T>
void launch_hopper(const Fold<T>& f, Stream stream) {
  const bool small = c_per_tile(f) > 1;
  const auto with = [&](auto columns) {
    constexpr int BN = decltype(columns)::value;
    small ? run<T, BN, true>(f, stream) : run<T, BN, false>(f, stream);
  };
  dispatch_columns(f.P, with);
}

template const char* hopper_unsupported(const Fold<bfloat16>&);
template const char* hopper_unsupported(const Fold<float16>&);
template void launch_hopper(const Fold<bfloat16>&, Stream);
template void launch_hopper(const Fold<float16>&, Stream);

}  // namespace fasthyper
