// Activations between two generated layers, and their derivatives.
#pragma once
#include <cmath>

#include "device.h"

namespace fasthyper {

enum class Activation : int { none, relu, tanh, sigmoid, silu, gelu };

DEVICE float sigmoid(float a) { return 1.f / (1.f + expf(-a)); }
DEVICE float normal_cdf(float a) { return 0.5f * (1.f + erff(a * 0.70710678f)); }

DEVICE float activate(float a, Activation by) {
  switch (by) {
    case Activation::relu:
      return a > 0.f || a != a ? a : 0.f;
    case Activation::tanh:
      return tanhf(a);
    case Activation::sigmoid:
      return sigmoid(a);
    case Activation::silu:
      return a * sigmoid(a);
    case Activation::gelu:
      return a * normal_cdf(a);
    default:
      return a;
  }
}

DEVICE float activation_derivative(float a, Activation by) {
  switch (by) {
    case Activation::relu:
      return a > 0.f ? 1.f : 0.f;
    case Activation::tanh: {
      const float y = tanhf(a);
      return 1.f - y * y;
    }
    case Activation::sigmoid: {
      const float y = sigmoid(a);
      return y * (1.f - y);
    }
    case Activation::silu: {
      const float y = sigmoid(a);
      return y * (1.f + a * (1.f - y));
    }
    case Activation::gelu:
      return normal_cdf(a) + a * 0.39894228f * expf(-0.5f * a * a);
    default:
      return 1.f;
  }
}

}  // namespace fasthyper
