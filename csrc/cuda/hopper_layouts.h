// Layouts of shared memory that TMA writes and wgmma reads, and the arguments of a TMA tensor map.
//
// Shared memory holds operands in rows of 128 bytes whose 16-byte chunks are swizzled: bits 4 to 6 of an address are
// XORed with bits 7 to 9. Eight rows, aligned to 1024 bytes, form a swizzle atom. wgmma finds an operand by a
// descriptor: bits 0-13 are the address, 16-29 LBO, 32-45 SBO, all in units of 16 bytes; bits 62-63 are 1, the 128-byte
// swizzle. For 16-bit elements (mn, k) of an operand, where mn is m or n, and 16 of k per instruction:
//
//     K-major:   (mn, k) at  mn / 8 · SBO + mn % 8 · 128 + k · 2                         LBO unused
//     MN-major:  (mn, k) at  mn / 64 · LBO + mn % 64 · 2 + k / 8 · SBO + k % 8 · 128     "transposed"
//
// These are CUTLASS's canonical layouts ((8,m),(T,2)):((8T,SBO),(1,T)) and ((T,8,m),(8,k)):((1,T,LBO),(8T,SBO)) with
// T = 8. The operand of the next k-step lies 32 bytes further in the first, 2048 bytes in the second.
#pragma once
#include <cstdint>

#include "device.h"
#include "numbers.h"

namespace fasthyper {

constexpr int WARPGROUP = 128, SWIZZLE_ATOM_BYTES = 8 * ROW_BYTES;

using Mbarrier = uint64_t;

// A tensor of 16-bit elements with three axes, the first contiguous, and the box that one TMA load copies.
struct TmaTensor {
  const void* data;
  int64_t dims[3], strides[2];  // strides of the second and third axis, in elements
  int box[3];

  INLINE int box_bytes() const { return box[0] * box[1] * box[2] * 2; }

  // Return why TMA cannot load it, or null.
  const char* unsupported() const {
    if (reinterpret_cast<uintptr_t>(data) % 16) return "a tensor is not aligned to 16 bytes";
    for (int axis = 0; axis < 3; ++axis) {
      if (dims[axis] < 1 || dims[axis] > int64_t(1) << 32) return "an axis of a tensor is empty or too long";
      if (box[axis] < 1 || box[axis] > 256) return "an axis of a box is empty or longer than 256";
    }
    for (const int64_t stride : strides)
      if (stride < 1 || stride * 2 % 16 || stride * 2 >= int64_t(1) << 40)
        return "a stride of a tensor is not a multiple of 16 bytes";
    if (box[0] * 2 > ROW_BYTES || box[0] * 2 % 16) return "rows of a box are not 16 to 128 bytes";
    return nullptr;
  }
};

// Descriptors, and the increments from one k-step to the next.
INLINE uint64_t descriptor(uint32_t address, int lbo, int sbo) {
  return static_cast<uint64_t>(address >> 4) | static_cast<uint64_t>(lbo >> 4) << 16 |
         static_cast<uint64_t>(sbo >> 4) << 32 | uint64_t(1) << 62;
}
INLINE uint64_t k_major(uint32_t address) { return descriptor(address, 16, SWIZZLE_ATOM_BYTES); }
INLINE uint64_t mn_major(uint32_t address, int next_64) { return descriptor(address, next_64, SWIZZLE_ATOM_BYTES); }
constexpr uint64_t K_MAJOR_STEP = 32 >> 4, MN_MAJOR_STEP = 2 * SWIZZLE_ATOM_BYTES >> 4;

// A tensor of (rows, middle, count), the last axis contiguous. An axis of size one needs no stride.
inline TmaTensor tma_tensor(
    const void* data, int64_t count, int64_t middle, int64_t middle_stride, int64_t rows, int64_t row_stride,
    int box_rows) {
  return {
      data, {count, middle, rows}, {middle == 1 ? 8 : middle_stride, rows == 1 ? 8 : row_stride}, {64, 1, box_rows}};
}

}  // namespace fasthyper
