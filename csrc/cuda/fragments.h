// Fragments of the left operand of mma: loaded as they are, or generated.
#pragma once
#include <cstdint>

#include "instructions.h"
#include "numbers.h"

namespace fasthyper {

// Split float32 into two TF32 numbers of ten bits, whose sum has twenty.
DEVICE void split_tf32(float v, uint32_t& high, uint32_t& low) {
  high = to_tf32(v);
  low = to_tf32(v - as_float(high));
}

// The left operand of an mma, 16 rows by one k-step. A lane holds rows lane/4 and lane/4 + 8, and words lane%4 and
// lane%4 + 4 of each. PlainFragment takes the words as they are; GeneratedFragment multiplies them by another operand.
template <class T>
struct PlainFragment {
  uint32_t words[4];
  DEVICE void set(const uint32_t (&v)[4]) {
    for (int q = 0; q < 4; ++q) words[q] = v[q];
  }
  DEVICE void accumulate(float (&d)[4], uint32_t b0, uint32_t b1, bool) const { mma(d, words, b0, b1, T{}); }
};

template <>
struct PlainFragment<float> {
  uint32_t high[4], low[4];
  DEVICE void set(const uint32_t (&v)[4]) {
    for (int q = 0; q < 4; ++q) split_tf32(as_float(v[q]), high[q], low[q]);
  }
  // Three products of ten bits give twenty bits; if TF32 is allowed, one product is enough. Tensor cores truncate
  // when they add, and a long sum would drift. So each k-step is summed on its own, and added with rounding.
  DEVICE void accumulate(float (&d)[4], uint32_t b0, uint32_t b1, bool tf32) const {
    uint32_t high0, high1, low0, low1;
    split_tf32(as_float(b0), high0, low0);
    split_tf32(as_float(b1), high1, low1);
    if (tf32) return mma(d, high, high0, high1, 0.f);
    float step[4] = {};
    mma(step, low, high0, high1, 0.f);
    mma(step, high, low0, low1, 0.f);
    mma(step, high, high0, high1, 0.f);
    for (int e = 0; e < 4; ++e) d[e] += step[e];
  }
};

template <class T>
struct GeneratedFragment : PlainFragment<T> {
  // Multiply rows lane/4 and lane/4 + 8 by u0 and u1, which have the same element in both halves.
  DEVICE void set(const uint32_t (&v)[4], uint32_t u0, uint32_t u1) { set(v, {u0, u1, u0, u1}); }
  // Multiply words lane%4 and lane%4 + 4 of each row by u0 and u1.
  DEVICE void set_columns(const uint32_t (&v)[4], uint32_t u0, uint32_t u1) { set(v, {u0, u0, u1, u1}); }
  DEVICE void set(const uint32_t (&v)[4], const uint32_t (&u)[4]) {
    uint32_t product[4];
    for (int q = 0; q < 4; ++q) product[q] = mul(v[q], u[q], T{});
    PlainFragment<T>::set(product);
  }
};

// Products could leave the range of float16. They are computed in float32 and rounded to TF32, which has as many bits
// of mantissa as float16. The low and the high elements of the words are then two mma instructions, as the order of a
// sum is free.
template <>
struct GeneratedFragment<float16> {
  uint32_t words[2][4];
  DEVICE void set(const uint32_t (&v)[4], uint32_t u0, uint32_t u1) { set(v, {u0, u1, u0, u1}); }
  DEVICE void set_columns(const uint32_t (&v)[4], uint32_t u0, uint32_t u1) { set(v, {u0, u0, u1, u1}); }
  DEVICE void set(const uint32_t (&v)[4], const uint32_t (&u)[4]) {
    for (int q = 0; q < 4; ++q)
      for (int h = 0; h < 2; ++h) words[h][q] = to_tf32(unpack(v[q], h, float16{}) * unpack(u[q], h, float16{}));
  }
  DEVICE void accumulate(float (&d)[4], uint32_t b0, uint32_t b1, bool) const {
    for (int h = 0; h < 2; ++h)
      mma(d, words[h], as_uint(unpack(b0, h, float16{})), as_uint(unpack(b1, h, float16{})), 0.f);
  }
};

}  // namespace fasthyper
