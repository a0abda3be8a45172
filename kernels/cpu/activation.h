// Activation functions, and rows of them, plain or gated: `kernels/eager.py`.
#pragma once
#include <cstring>

#include "vector.h"

enum Kind { SILU, GELU, GELU_TANH, QUICK_GELU, RELU, RELU2, SWIGLU_OAI };  // as in `eager.KINDS`
enum Input { PLAIN, GATED, INTERLEAVED };

static inline vfloat at_most(vfloat x, float bound) { return x > bound ? splat(bound) : x; }
static inline vfloat at_least(vfloat x, float bound) { return x < bound ? splat(bound) : x; }

// The normal distribution's upper tail, 1 - Phi(x) for x >= 0, to about 1e-7 of itself: e^(-x²/2) times a polynomial in
// 1 / (1 + c x), the form of Abramowitz & Stegun 7.1.26; c and coefficients fitted for the least relative error up to 13.
static inline vfloat normal_tail(vfloat x) {
  vfloat t = 1.0f / (1.0f + 0.302f * x);
  vfloat p = t * 3.639861941e-2f - 1.567955166e-1f;
  p = p * t + 2.000968009e-1f;
  p = p * t - 4.908259213e-2f;
  p = p * t + 1.264061332e-1f;
  p = p * t + 1.010667309e-1f;
  p = p * t + 1.214788929e-1f;
  p = p * t + 1.204308942e-1f;
  return p * t * exp(x * x * -0.5f);
}

// e^x to be divided by: as far from `exp` as rounding x in its last place takes it; above 89 infinite or very large.
static inline vfloat divisor(vfloat x) {
#if defined(__AVX512DQ__)
  return power_of_2(x * LOG2_E);
#else
  return exp(x);
#endif
}

template <Kind KIND> static inline vfloat activated(vfloat x) {
  if constexpr (KIND == SILU) return x / (1.0f + divisor(-x));
  if constexpr (KIND == QUICK_GELU) return x / (1.0f + divisor(x * -1.702f));
  if constexpr (KIND == GELU_TANH)  // (1 + tanh(t)) / 2 = 1 / (1 + exp(-2t)); 2 * sqrt(2 / pi)
    return x / (1.0f + divisor((x + 0.044715f * x * x * x) * -1.5957691216f));
  if constexpr (KIND == GELU) {
    vfloat tail = normal_tail(x < 0.0f ? -x : x);
    return x * (x < 0.0f ? tail : 1.0f - tail);
  }
  vfloat positive = at_least(x, 0.0f);
  return KIND == RELU2 ? positive * positive : positive;
}

// W elements of the output, from W of the first half and W of the second, or from 2 * W in turns.
template <class T, Kind KIND, Input INPUT> static inline vfloat result(const T* first, const T* second) {
  if constexpr (INPUT == PLAIN) return activated<KIND>(load(first));
  if constexpr (INPUT == GATED) return rounded<T>(activated<KIND>(load(first))) * load(second);
  vfloat a = load(first), b = load(second), gate, up;
  for (int j = 0; j < W / 2; j++) {
    gate[j] = a[2 * j], up[j] = a[2 * j + 1];
    gate[j + W / 2] = b[2 * j], up[j + W / 2] = b[2 * j + 1];
  }
  return (at_least(at_most(up, 7.0f), -7.0f) + 1.0f) * activated<QUICK_GELU>(at_most(gate, 7.0f));
}

// n elements, from as many of gate and of up, or, INTERLEAVED, from 2 * n of gate.
template <class T, Kind KIND, Input INPUT> static void row(const T* gate, const T* up, T* out, long n) {
  long i = 0;
  for (; i + W <= n; i += W)
    if constexpr (INPUT == INTERLEAVED) store(out + i, result<T, KIND, INPUT>(gate + 2 * i, gate + 2 * i + W));
    else store(out + i, result<T, KIND, INPUT>(gate + i, up + i));
  if (i == n) return;
  T rest[2 * W] = {}, last[W];  // what is left of the row, made whole
  const long left = n - i;
  if (INPUT == INTERLEAVED) {
    std::memcpy(rest, gate + 2 * i, 2 * left * sizeof(T));
  } else {
    std::memcpy(rest, gate + i, left * sizeof(T));
    if (INPUT == GATED) std::memcpy(rest + W, up + i, left * sizeof(T));
  }
  store(last, result<T, KIND, INPUT>(rest, rest + W));
  std::memcpy(out + i, last, left * sizeof(T));
}

// What takes rows of gate and of up, by kind; null of one that takes them otherwise.
template <class T> using Gate = void (*)(const T* gate, const T* up, T* out, long n);
template <class T> static Gate<T> gate_of(int kind) {
  switch (kind) {
    case SILU: return row<T, SILU, GATED>;
    case GELU: return row<T, GELU, GATED>;
    case GELU_TANH: return row<T, GELU_TANH, GATED>;
    case QUICK_GELU: return row<T, QUICK_GELU, GATED>;
    case RELU: return row<T, RELU, GATED>;
    case RELU2: return row<T, RELU2, GATED>;
  }
  return nullptr;
}
