// activation and gated_activation: `kernels/eager.py`.
#include <cstring>
#include <type_traits>

#include "calls.h"
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

template <Kind KIND> static inline vfloat activated(vfloat x) {
  if constexpr (KIND == SILU) return x / (1.0f + exp(-x));
  if constexpr (KIND == QUICK_GELU) return x / (1.0f + exp(x * -1.702f));
  if constexpr (KIND == GELU_TANH)  // (1 + tanh(t)) / 2 = 1 / (1 + exp(-2t)); 2 * sqrt(2 / pi)
    return x / (1.0f + exp((x + 0.044715f * x * x * x) * -1.5957691216f));
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

template <class T, Kind KIND, Input INPUT> static void row(const T* x, T* out, long n) {
  long i = 0;
  for (; i + W <= n; i += W) {
    const T* first = x + (INPUT == INTERLEAVED ? 2 * i : i);
    store(out + i, result<T, KIND, INPUT>(first, INPUT == INTERLEAVED ? first + W : first + n));
  }
  if (i == n) return;
  T rest[2 * W] = {}, last[W];  // what is left of the row, made whole
  const long left = n - i;
  if (INPUT == INTERLEAVED) {
    std::memcpy(rest, x + 2 * i, 2 * left * sizeof(T));
  } else {
    std::memcpy(rest, x + i, left * sizeof(T));
    if (INPUT == GATED) std::memcpy(rest + W, x + n + i, left * sizeof(T));
  }
  store(last, result<T, KIND, INPUT>(rest, rest + W));
  std::memcpy(out + i, last, left * sizeof(T));
}

template <class T, Kind KIND, Input INPUT>
static void rows(const void* x, void* out, long count, long n, long stride, int threads) {
#pragma omp parallel for num_threads(threads) if (count * n > SERIAL)
  for (long r = 0; r < count; r++) row<T, KIND, INPUT>((const T*)x + r * stride, (T*)out + r * n, n);
}

template <class T, Input INPUT>
static void by_kind(int kind, const void* x, void* out, long count, long n, long stride, int threads) {
  switch (kind) {
    case SILU: return rows<T, SILU, INPUT>(x, out, count, n, stride, threads);
    case GELU: return rows<T, GELU, INPUT>(x, out, count, n, stride, threads);
    case GELU_TANH: return rows<T, GELU_TANH, INPUT>(x, out, count, n, stride, threads);
    case QUICK_GELU: return rows<T, QUICK_GELU, INPUT>(x, out, count, n, stride, threads);
    case RELU: return rows<T, RELU, INPUT>(x, out, count, n, stride, threads);
    case RELU2: return rows<T, RELU2, INPUT>(x, out, count, n, stride, threads);
  }
}

// x: rows `stride` apart of n elements, or of 2 * n if gated; out: [count, n].
extern "C" void activation(int dtype, int kind, int gated, const void* x, void* out, long count, long n, long stride,
                           int threads) {
  by_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (kind == SWIGLU_OAI) rows<T, SWIGLU_OAI, INTERLEAVED>(x, out, count, n, stride, threads);
    else if (gated) by_kind<T, GATED>(kind, x, out, count, n, stride, threads);
    else by_kind<T, PLAIN>(kind, x, out, count, n, stride, threads);
  });
}
CALLABLE(activation)
