// What library.cu launches where it can: kernels for sm_90a, of bfloat16 and float16.
#pragma once
#include "hopper.h"
#include "kernels.h"

namespace fasthyper {

// What of a call these kernels do not do, or null.
template <class T>
const char* hopper_misfit(const Fold<T>& f);
template <class T>
const char* hopper_misfit(const WeightGrad<T>& f);
template <class T>
const char* hopper_misfit(const DxDz<T>& f);

// y or dx; dH alone; dx and dz.
template <class T>
void launch_on_hopper(const Fold<T>& f, Stream stream);
template <class T>
void launch_on_hopper(const WeightGrad<T>& f, Stream stream);
template <class T>
void launch_on_hopper(const DxDz<T>& f, Stream stream);

// Whether 31 bits lead to every number of rows of `count`.
template <class T>
bool is_near(const Rows<T>& rows, int M, int N, int64_t count) {
  return (M / N - 1) * rows.instance + (N - 1) * rows.point + (count - 1) * rows.step < int64_t(1) << 31;
}

// A field of rows: `count` numbers side by side, `middle` and `rows` of them; what has one of an axis has no stride.
inline Field field_of(
    const void* base, int64_t count, int64_t middle, int64_t middle_stride, int64_t rows, int64_t row_stride,
    int box_rows) {
  return {
      base, {count, middle, rows}, {middle == 1 ? 8 : middle_stride, rows == 1 ? 8 : row_stride}, {64, 1, box_rows}};
}

}  // namespace fasthyper
