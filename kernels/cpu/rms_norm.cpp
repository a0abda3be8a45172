// rms_norm and add_rms_norm: `kernels/eager.py`. Each step rounds as the eager definition does.
#include <cmath>
#include <type_traits>

#include "vector.h"

template <class T>
static void row(const T* x, const T* residual, const T* weight, T* out, T* total, long hidden, float eps,
                float offset) {
  vfloat squares = {};
  float tail = 0;
  long i = 0;
  const T* source = x;
  if (residual) source = total;
  for (; i + W <= hidden; i += W) {
    vfloat v = load(x + i);
    if (residual) {
      v = rounded<T>(v + load(residual + i));
      store(total + i, v);
    }
    squares += v * v;
  }
  for (; i < hidden; i++) {
    float v = load_one(x + i);
    if (residual) {
      v = rounded<T>(v + load_one(residual + i));
      store_one(total + i, v);
    }
    tail += v * v;
  }
  float scale = 1.0f / std::sqrt((sum(squares) + tail) / float(hidden) + eps);
  for (i = 0; i + W <= hidden; i += W) {
    vfloat v = load(source + i) * scale, w = load(weight + i);
    store(out + i, offset ? v * (w + offset) : rounded<T>(v) * w);
  }
  for (; i < hidden; i++) {
    float v = load_one(source + i) * scale, w = load_one(weight + i);
    store_one(out + i, offset ? v * (w + offset) : rounded<T>(v) * w);
  }
}

// x, residual (or null), out, total: [rows, hidden], contiguous; weight: [hidden].
extern "C" void add_rms_norm(int dtype, const void* x, const void* residual, const void* weight, void* out, void* total,
                             long rows, long hidden, float eps, float offset, int threads) {
  by_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel for num_threads(threads) if (rows * hidden > SERIAL)
    for (long r = 0; r < rows; r++)
      row((const T*)x + r * hidden, residual ? (const T*)residual + r * hidden : nullptr, (const T*)weight,
          (T*)out + r * hidden, (T*)total + r * hidden, hidden, eps, offset);
  });
}
