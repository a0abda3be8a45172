// grouped_linear: `kernels/eager_moe.py`, with weights packed by `cpu/ops.py:bind_grouped_linear`.
#include <algorithm>
#include <utility>
#include <vector>

#include "calls.h"
#include "product.h"

// A panel is PANEL rows of an expert's weight, which are columns of its product, side by side for each step along `in`:
//
//     weight   [out, in]    a0 a1 a2 ..     packed   a0 b0 c0 .. | a1 b1 c1 .. | ..              one element a step
//                           b0 b1 b2 ..              a0 a1 b0 b1 c0 c1 .. | a2 a3 b2 b3 c2 c3 .. | ..            two
constexpr int PANEL = 2 * W;
#if defined(__AVX512F__)
constexpr int ROWS = 12;  // that a panel is multiplied with at once: their sums stay in registers
#else
constexpr int ROWS = 6;
#endif

// M rows times a panel, of which `count` columns are stored.
template <class T, int M>
static void multiply(const typename Step<T>::Row* const* x, const T* panel, const T* bias, T* out, long steps,
                     long count, long out_stride) {
  typedef Step<T> S;
  vfloat sums[M][2] = {};
  for (long i = 0; i < steps; i++, panel += PANEL * S::N) {
    auto left = S::weight(panel), right = S::weight(panel + W * S::N);
    for (int m = 0; m < M; m++) {
      auto a = S::row(x[m] + i * S::N);
      sums[m][0] = S::add(sums[m][0], a, left);
      sums[m][1] = S::add(sums[m][1], a, right);
    }
  }
  for (int m = 0; m < M; m++) {
    T* o = out + m * out_stride;
    for (int half = 0; half < 2; half++) {
      long first = half * W, left = count - first;
      if (left >= W) {
        store(o + first, bias ? sums[m][half] + load(bias + first) : sums[m][half]);
      } else {
        for (long c = 0; c < left; c++)
          store_one(o + first + c, bias ? sums[m][half][c] + load_one(bias + first + c) : sums[m][half][c]);
      }
    }
  }
}

template <class T, int... M>
static auto multiplier(long rows, std::integer_sequence<int, M...>) {
  static constexpr decltype(&multiply<T, 1>) table[] = {multiply<T, M + 1>...};
  return table[rows - 1];
}

// x: [.., in], of which row r takes x[pairs[r] / top_k], or x[r] where pairs is null; packed: [experts, panels, steps,
// PANEL, step]; bias: [experts, out_size] or null; starts: [experts + 1]; out: [.., out_size]. All contiguous.
extern "C" void grouped_linear(int dtype, const void* x, const void* packed, const void* bias, const int* pairs,
                               const int* starts, void* out, long experts, long in, long out_size, long top_k,
                               int threads) {
  by_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Row = typename Step<T>::Row;
    long panels = (out_size + PANEL - 1) / PANEL, steps = (in + Step<T>::N - 1) / Step<T>::N, padded = steps * Step<T>::N;
#pragma omp parallel num_threads(threads) if (starts[experts] * in * out_size > SERIAL)
    {
      std::vector<Row> scratch(ROWS * padded);
#pragma omp for collapse(2) schedule(dynamic) nowait
      for (long e = 0; e < experts; e++)
        for (long p = 0; p < panels; p++) {
          long start = starts[e], stop = starts[e + 1], column = p * PANEL, count = std::min<long>(PANEL, out_size - column);
          const T* panel = (const T*)packed + (e * panels + p) * padded * PANEL;
          const T* b = bias ? (const T*)bias + e * out_size + column : nullptr;
          for (long parts = (stop - start + ROWS - 1) / ROWS; parts > 0; parts--) {  // alike in size
            long m = (stop - start + parts - 1) / parts;
            const Row* rows[ROWS];
            for (long j = 0; j < m; j++) {
              long source = pairs ? pairs[start + j] / top_k : start + j;
              rows[j] = as_row((const T*)x + source * in, in, padded, scratch.data() + j * padded);
            }
            auto multiply = multiplier<T>(m, std::make_integer_sequence<int, ROWS>());
            multiply(rows, panel, b, (T*)out + start * out_size + column, steps, count, out_size);
            start += m;
          }
        }
    }
  });
}

// How weights are packed: rows in a panel, elements in a step.
extern "C" int grouped_panel() { return PANEL; }
extern "C" int grouped_step(int dtype) {
  int n;
  by_dtype(dtype, [&](auto* type) { n = Step<std::remove_pointer_t<decltype(type)>>::N; });
  return n;
}
CALLABLE(grouped_linear)
