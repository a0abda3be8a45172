// activation and gated_activation: `kernels/eager.py`.
#include <type_traits>

#include "activation.h"
#include "calls.h"

template <class T, Kind KIND, Input INPUT>
static void rows(const void* x, void* out, long count, long n, long stride, int threads) {
#pragma omp parallel for num_threads(threads) if (count * n > SERIAL)
  for (long r = 0; r < count; r++) {
    const T* first = (const T*)x + r * stride;
    row<T, KIND, INPUT>(first, first + n, (T*)out + r * n, n);
  }
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
