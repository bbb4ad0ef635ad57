// The left operand of a product as the lanes of a warp hold it, as it is or generated.
#pragma once
#include <cstdint>

#include "instructions.h"
#include "numbers.h"

namespace fasthyper {

// float32 as two numbers of the matrix units' ten bits, whose sum has twenty.
DEVICE void split_tf32(float v, uint32_t& high, uint32_t& low) {
  high = to_tf32(v);
  low = to_tf32(v - as_float(high));
}

// The left operand of a product, 16 rows by a step, as the lanes of a warp hold it: rows lane/4 and eight below it,
// words lane%4 and four to the right. `plain` takes it as it lies; `generated` multiplies each row by a number.
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
  // Three products of ten bits give twenty; allowed TF32, one does. Matrix units cut off what a sum is too large for,
  // so that step by step a long one would drift: each step is summed for itself, and added with rounding.
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
  // u0 and u1 in each half of their words: what rows lane/4 and lane/4 + 8 are multiplied by.
  DEVICE void set(const uint32_t (&v)[4], uint32_t u0, uint32_t u1) { set(v, {u0, u1, u0, u1}); }
  // The same for columns: what words lane%4 and lane%4 + 4 are multiplied by.
  DEVICE void set_columns(const uint32_t (&v)[4], uint32_t u0, uint32_t u1) { set(v, {u0, u0, u1, u1}); }
  DEVICE void set(const uint32_t (&v)[4], const uint32_t (&u)[4]) {
    uint32_t product[4];
    for (int q = 0; q < 4; ++q) product[q] = mul(v[q], u[q], T{});
    PlainFragment<T>::set(product);
  }
};

// float16 has no range for products: they are made in float32 and rounded to the matrix units' TF32, which has as many
// digits. Low and high numbers of the words are then two products: the order of a sum is free.
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
