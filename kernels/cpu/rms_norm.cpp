// rms_norm and add_rms_norm: `kernels/eager.py`. Each step rounds as the eager definition does.
#include <cmath>
#include <type_traits>

#include "calls.h"
#include "vector.h"

template <class T>
static void row(const T* x, const T* residual, const T* weight, T* out, T* total, long hidden, float eps,
                float offset) {
  float squares = sum_of(hidden, [&](long i, auto form) {
    auto v = load(x + i, form);
    if (residual) {
      v = rounded<T>(v + load(residual + i, form));
      store(total + i, v);
    }
    return v * v;
  });
  if (residual) x = total;
  float scale = 1.0f / std::sqrt(squares / float(hidden) + eps);
  each(hidden, [&](long i, auto form) {
    auto v = load(x + i, form) * scale, w = load(weight + i, form);
    store(out + i, offset ? v * (w + offset) : rounded<T>(v) * w);
  });
}

// x: [outer, inner, hidden] by its strides; residual (or null), out, total: the same, contiguous; weight: [hidden].
extern "C" void add_rms_norm(int dtype, const void* x, const void* residual, const void* weight, void* out, void* total,
                             long outer, long inner, long hidden, long stride_outer, long stride_inner, float eps,
                             float offset, int threads) {
  by_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel for num_threads(threads) if (outer * inner * hidden > SERIAL)
    for (long r = 0; r < outer * inner; r++)
      row((const T*)x + r / inner * stride_outer + r % inner * stride_inner,
          residual ? (const T*)residual + r * hidden : nullptr, (const T*)weight, (T*)out + r * hidden,
          (T*)total + r * hidden, hidden, eps, offset);
  });
}
CALLABLE(add_rms_norm)
