// add_layer_norm and head_layer_norm: `kernels/eager.py`.
#include <cmath>
#include <type_traits>

#include "calls.h"
#include "vector.h"

template <class T>
static void row(const T* x, const T* residual, const T* weight, const T* bias, T* out, T* total, long hidden,
                float eps) {
  float mean = sum_of(hidden, [&](long i, auto form) {
    auto v = load(x + i, form);
    if (residual) {
      v = rounded<T>(v + load(residual + i, form));
      store(total + i, v);
    }
    return v;
  }) / float(hidden);
  if (residual) x = total;
  float squares = sum_of(hidden, [&](long i, auto form) {
    auto centred = load(x + i, form) - mean;
    return centred * centred;
  });
  float scale = 1.0f / std::sqrt(squares / float(hidden) + eps);
  each(hidden, [&](long i, auto form) {
    auto v = (load(x + i, form) - mean) * scale;
    if (weight) v *= load(weight + i, form);
    if (bias) v += load(bias + i, form);
    store(out + i, v);
  });
}

// x: [outer, inner, hidden] by its strides; residual (or null), out, total: the same, contiguous; weight, bias (or
// null): [hidden], but a row of weights for each index of inner if own_weights.
extern "C" void add_layer_norm(int dtype, const void* x, const void* residual, const void* weight, const void* bias,
                               void* out, void* total, long outer, long inner, long hidden, long stride_outer,
                               long stride_inner, float eps, int own_weights, int threads) {
  by_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel for num_threads(threads) if (outer * inner * hidden > SERIAL)
    for (long r = 0; r < outer * inner; r++)
      row((const T*)x + r / inner * stride_outer + r % inner * stride_inner,
          residual ? (const T*)residual + r * hidden : nullptr,
          own_weights ? (const T*)weight + r % inner * hidden : (const T*)weight, (const T*)bias, (T*)out + r * hidden,
          (T*)total + r * hidden, hidden, eps);
  });
}
CALLABLE(add_layer_norm)
