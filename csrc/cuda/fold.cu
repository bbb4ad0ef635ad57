// Kernels of fold, for all dtypes and several tile shapes.
#include "fold.h"

#include "instructions.h"
#include "launchers.h"

namespace fasthyper {

constexpr int SMEM_LIMIT = 96 << 10;  // per CTA: two fit on an SM of sm_90, one on any since sm_80
constexpr int WAVE = 2 * 132;         // about as many CTAs as an H100 runs at once; results do not depend on it

template <class T, class Shape>
KERNEL(Shape::THREADS, Shape::MIN_CTAS_PER_SM)
fold(const GRID_CONSTANT Fold<T> f, const int stages) {
  FoldCta<T, Shape, false> cta(f, smem_base(), stages, cta_y() * Shape::BP, cta_z());
  const int m_tiles = cdiv(f.M, Shape::BM);
  for (int m_tile = cta_x(); m_tile < m_tiles; m_tile += grid_x())
    cta.run(m_tile * Shape::BM, m_tile != cta_x(), [&](int m, int p, float sum) {
      if (f.d && cta_z() == 0) sum += static_cast<float>(f.d[p * f.d_p]);
      if (f.partial) f.partial[(static_cast<int64_t>(cta_z()) * f.M + m) * f.P + p] = sum;
      else f.out[static_cast<int64_t>(m) * f.P + p] = static_cast<T>(sum);
    });
}

template <class Shape, class T>
static void run(const Fold<T>& f, Stream stream) {
  const int k_tiles = f.k_tiles(0, least(f.C, f.per_split), true);
  // Keep all tiles of H in shared memory if they fit, and if a CTA would otherwise load them again for more rows.
  const int m_tiles = cdiv(f.M, Shape::BM), p_tiles = cdiv(f.P, Shape::BP), splits = cdiv(f.C, f.per_split);
  const int wave = least(m_tiles, cdiv(WAVE, p_tiles * splits));
  const bool resident = m_tiles > wave && k_tiles <= (SMEM_LIMIT - Shape::REDUCTION_BYTES) / Shape::TILE_BYTES;
  const int stages = resident && k_tiles > Shape::PREFETCH ? k_tiles : Shape::PREFETCH + 1;
  const Grid grid{
      static_cast<unsigned>(resident ? wave : m_tiles), static_cast<unsigned>(p_tiles), static_cast<unsigned>(splits)};
  launch(&fold<T, Shape>, grid, Shape::THREADS, Shape::smem_bytes(stages), stream, f, stages);
}

template <class T>
void launch_fold(const Fold<T>& f, bool wide, Stream stream) {
  if (wide) run<WideFold<T>>(f, stream);
  else if (f.P > 32) run<NarrowFold<T>>(f, stream);
  else if (f.P > 16) run<NarrowFold<T, 4>>(f, stream);
  else run<NarrowFold<T, 2>>(f, stream);
}

template void launch_fold(const Fold<float>&, bool, Stream);
template void launch_fold(const Fold<bfloat16>&, bool, Stream);
template void launch_fold(const Fold<float16>&, bool, Stream);

}  // namespace fasthyper
