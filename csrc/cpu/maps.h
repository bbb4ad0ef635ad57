// The functions φ of generated weights that `mapped.h` computes, and the gradient dP of P from dW. As in torch, a NaN
// stays a NaN.
#pragma once

#include <c10/util/Exception.h>

#include <string>
#include <string_view>

#include "pack.h"

namespace fasthyper {

typedef int32_t IntVec __attribute__((vector_size(WIDTH * sizeof(int32_t))));

inline Vec number(float x) { return Vec{} + x; }

// exp(x), with an error of about one unit in the last place: 2ⁿ times a polynomial on ±log(2) / 2.
inline Vec exponential(Vec x) {
  const Vec low = number(-104.f), high = number(89.f);  // beyond, the result is 0 or infinite
  Vec v = x < low ? low : x;
  v = v > high ? high : v;
  const Vec shifted = v * 1.44269504f + 12582912.f, n = shifted - 12582912.f;  // the nearest integer
  const Vec r = v - n * 0.693359375f + n * 2.12194440e-4f;
  Vec sum = number(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    sum = sum * r + c;
  const Vec y = sum * r * r + r + 1.f;
  // Two factors, because 2ⁿ itself may be no normal number. NaN is any integer here, and y is NaN.
  const IntVec power = (IntVec)shifted - 0x4b400000, half = power >> 1, rest = power - half;
  return y * (Vec)((half + 127) << 23) * (Vec)((rest + 127) << 23);
}

struct Abs {
  static Vec value(Vec p) { return p < 0.f ? -p : p; }
  static Vec gradient(Vec p, Vec dw) { return p > 0.f ? dw : p < 0.f ? -dw : Vec{}; }
};

struct Relu {
  static Vec value(Vec p) { return p < 0.f ? Vec{} : p; }
  static Vec gradient(Vec p, Vec dw) { return p <= 0.f ? Vec{} : dw; }
};

struct Exp {
  static Vec value(Vec p) { return exponential(p); }
  static Vec gradient(Vec p, Vec dw) { return value(p) * dw; }
};

struct Sigmoid {
  static Vec value(Vec p) { return 1.f / (1.f + exponential(-p)); }
  static Vec gradient(Vec p, Vec dw) {
    const Vec w = value(p);
    return w * (1.f - w) * dw;
  }
};

// Near 0 a polynomial, where 1 − 2 / (exp(2p) + 1) would lose digits.
struct Tanh {
  static Vec value(Vec p) {
    const Vec square = p * p, size = p < 0.f ? -p : p;
    Vec sum = number(-5.70498872745e-3f);
    for (const float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f})
      sum = sum * square + c;
    const Vec large = 1.f - 2.f / (exponential(size + size) + 1.f);
    return size < 0.625f ? sum * square * p + p : p < 0.f ? -large : large;
  }
  static Vec gradient(Vec p, Vec dw) {
    const Vec w = value(p);
    return (1.f - w * w) * dw;
  }
};

// Calls f(Map{}) for the map of this name.
template <class F>
void with_map(std::string_view name, F&& f) {
  if (name == "abs") return f(Abs{});
  if (name == "relu") return f(Relu{});
  if (name == "exp") return f(Exp{});
  if (name == "sigmoid") return f(Sigmoid{});
  if (name == "tanh") return f(Tanh{});
  TORCH_CHECK_VALUE(false, "map must be abs, relu, exp, sigmoid or tanh, got ", std::string(name));
}

}  // namespace fasthyper
