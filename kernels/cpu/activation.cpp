// silu_and_mul: `kernels/eager.py`.
#include <cmath>
#include <type_traits>

#include "vector.h"

// gate_up: [rows, 2 * n], contiguous; out: [rows, n].
extern "C" void silu_and_mul(int dtype, const void* gate_up, void* out, long rows, long n, int threads) {
  by_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel for num_threads(threads) if (rows * n > SERIAL)
    for (long r = 0; r < rows; r++) {
      const T *gate = (const T*)gate_up + r * 2 * n, *up = gate + n;
      T* o = (T*)out + r * n;
      long i = 0;
      for (; i + W <= n; i += W) {
        vfloat g = load(gate + i);
        store(o + i, rounded<T>(g / (1.0f + exp(-g))) * load(up + i));
      }
      for (; i < n; i++) {
        float g = load_one(gate + i);
        store_one(o + i, rounded<T>(g / (1.0f + std::exp(-g))) * load_one(up + i));
      }
    }
  });
}
