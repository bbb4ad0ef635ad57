// Kernels of fold, for every dtype and as many columns as there are.
#include "fold.h"

#include "instructions.h"
#include "launchers.h"

namespace fasthyper {

constexpr int SHARED_BYTES = 96 << 10;   // of a block: two of them on sm_90, one on every part since sm_80
constexpr int BLOCKS_AT_ONCE = 2 * 132;  // about as many as run side by side; no result depends on it

template <class T, int WM, int WK, int MT, int NT>
KERNEL(32 * WM * WK, (FoldShape<T, WM, WK, MT, NT>::AT_ONCE))
fold(const GRID_CONSTANT Fold<T> f, const int tiles) {
  using Shape = FoldShape<T, WM, WK, MT, NT>;
  FoldBlock<T, Shape, false> block(f, shared_memory(), tiles, block_y() * Shape::BP, block_z());
  const int blocks = cdiv(f.M, Shape::BM);
  for (int m = block_x(); m < blocks; m += blocks_x())
    block.run(m * Shape::BM, m != block_x(), [&](int m, int p, float sum) {
      if (f.d && block_z() == 0) sum += static_cast<float>(f.d[p * f.d_p]);
      if (f.partial) f.partial[(static_cast<int64_t>(block_z()) * f.M + m) * f.P + p] = sum;
      else f.out[static_cast<int64_t>(m) * f.P + p] = static_cast<T>(sum);
    });
}

template <class T, int WM, int WK, int MT, int NT>
static void run(const Fold<T>& f, Stream stream) {
  using Shape = FoldShape<T, WM, WK, MT, NT>;
  const int pieces = f.pieces(0, least(f.C, f.per_split), true);
  // All tiles, where that is no more than a block may have and further rows would read them again; else what is sent
  // for ahead.
  const int rows = cdiv(f.M, Shape::BM), columns = cdiv(f.P, Shape::BP), splits = cdiv(f.C, f.per_split);
  const int blocks = least(rows, cdiv(BLOCKS_AT_ONCE, columns * splits));
  const bool all = rows > blocks && Shape::shared_bytes(pieces) <= SHARED_BYTES;
  const int tiles = all && pieces > Shape::AHEAD ? pieces : Shape::AHEAD + 1;
  const Grid grid{
      static_cast<unsigned>(all ? blocks : rows), static_cast<unsigned>(columns), static_cast<unsigned>(splits)};
  launch(&fold<T, WM, WK, MT, NT>, grid, Shape::THREADS, Shape::shared_bytes(tiles), stream, f, tiles);
}

template <class T>
void launch_fold(const Fold<T>& f, bool wide, Stream stream) {
  if (wide) run<T, 4, 1, 2, 8>(f, stream);
  else if (f.P > 32) run<T, 2, 4, 1, 8>(f, stream);
  else if (f.P > 16) run<T, 2, 4, 1, 4>(f, stream);
  else run<T, 2, 4, 1, 2>(f, stream);
}

template void launch_fold(const Fold<float>&, bool, Stream);
template void launch_fold(const Fold<bfloat16>&, bool, Stream);
template void launch_fold(const Fold<float16>&, bool, Stream);

}  // namespace fasthyper
