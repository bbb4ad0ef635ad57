// Layouts of shared memory that TMA and wgmma of sm_90a share, and tensors as TMA takes them.
//
// Shared memory holds operands in rows of 128 bytes whose chunks of 16 are swizzled: bits 4 to 6 of an address are
// XORed with bits 7 to 9, so that eight rows at a multiple of 1024 make a pattern. A box is written so, and a product
// reads so, by descriptors (bits 0-13 the address, 16-29 LBO, 32-45 SBO, all in units of 16 bytes; 62-63 = 1: 128-byte
// swizzle). For 16-bit numbers, of an operand with sides mn (m or n) and k, 16 of k to a product:
//
//     k side by side:   (mn, k) at  mn / 8 · SBO + mn % 8 · 128 + k · 2                         LBO unused
//     mn side by side:  (mn, k) at  mn / 64 · LBO + mn % 64 · 2 + k / 8 · SBO + k % 8 · 128     "transposed"
//
// These are CUTLASS's canonical layouts ((8,m),(T,2)):((8T,SBO),(1,T)) and ((T,8,m),(8,k)):((1,T,LBO),(8T,SBO)) with
// T = 8. The sixteen k of the next product are 32 bytes further in the first, 2048 in the second.
#pragma once
#include <cstdint>

#include "device.h"
#include "numbers.h"

namespace fasthyper {

constexpr int WARPGROUP = 128, SWIZZLE_ATOM_BYTES = 8 * ROW_BYTES;

using Mbarrier = uint64_t;

// Numbers of 16 bits as a tensor of three axes, the first side by side, and the box of them that is brought at a time.
struct TmaTensor {
  const void* data;
  int64_t dims[3], strides[2];  // strides of the second and third axis, in numbers
  int box[3];

  INLINE int box_bytes() const { return box[0] * box[1] * box[2] * 2; }

  // What is against it, or null.
  const char* unsupported() const {
    if (reinterpret_cast<uintptr_t>(data) % 16) return "a tensor does not begin at a multiple of 16 bytes";
    for (int axis = 0; axis < 3; ++axis) {
      if (dims[axis] < 1 || dims[axis] > int64_t(1) << 32) return "a tensor's side is empty or too long";
      if (box[axis] < 1 || box[axis] > 256) return "a box has a side of more than 256";
    }
    for (const int64_t stride : strides)
      if (stride < 1 || stride * 2 % 16 || stride * 2 >= int64_t(1) << 40)
        return "a tensor's rows do not begin at multiples of 16 bytes";
    if (box[0] * 2 > ROW_BYTES || box[0] * 2 % 16) return "a box's rows are no 16 to 128 bytes";
    return nullptr;
  }
};

// Descriptors; k16 is the step to the sixteen k of the next product.
INLINE uint64_t descriptor(uint32_t address, int lbo, int sbo) {
  return static_cast<uint64_t>(address >> 4) | static_cast<uint64_t>(lbo >> 4) << 16 |
         static_cast<uint64_t>(sbo >> 4) << 32 | uint64_t(1) << 62;
}
INLINE uint64_t k_major(uint32_t address) { return descriptor(address, 16, SWIZZLE_ATOM_BYTES); }
INLINE uint64_t mn_major(uint32_t address, int next_64) { return descriptor(address, next_64, SWIZZLE_ATOM_BYTES); }
constexpr uint64_t K_MAJOR_STEP = 32 >> 4, MN_MAJOR_STEP = 2 * SWIZZLE_ATOM_BYTES >> 4;

// A field of rows: `count` numbers side by side, `middle` and `rows` of them; what has one of an axis has no stride.
inline TmaTensor tma_tensor(
    const void* data, int64_t count, int64_t middle, int64_t middle_stride, int64_t rows, int64_t row_stride,
    int box_rows) {
  return {
      data, {count, middle, rows}, {middle == 1 ? 8 : middle_stride, rows == 1 ? 8 : row_stride}, {64, 1, box_rows}};
}

}  // namespace fasthyper
