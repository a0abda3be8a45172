// linear: products of so few rows that reading the weight is all that takes time. It is read once, in a straight line.
#include <utility>
#include <vector>

#include "calls.h"
#include "product.h"

// oneDNN's panels, where this op reads its packed weights (`kernels/linear.py`): PANEL rows of the weight, which are
// columns of the product, side by side for each step along `in`. See `Step` for what a step is.
constexpr int PANEL = 64;
constexpr int DEPTH = 16;  // of which the steps of a panel are a multiple
constexpr int VECTORS = PANEL / W;
constexpr int MOST_ROWS = 6;  // at once: with WIDE columns, as many sums as registers hold beside what is added
constexpr int WIDE = W == 16 ? 4 : 2, NARROW = WIDE / 2;  // vectors of columns at once
constexpr long AHEAD = 4096;  // bytes

// What is to be brought near while a tile is computed, so that memory is busy while registers are: some lines in a step.
struct Ahead { const char* from; long stride; int lines; };

// M rows times C vectors of columns of a panel; L: ahead.lines.
template <class T, int M, int C, int L>
static void tile(const typename Step<T>::Row* const* x, const T* panel, long steps, Ahead ahead, vfloat (*sums)[C]) {
  typedef Step<T> S;
  vfloat s[M][C] = {};
  for (long i = 0; i < steps; i++, panel += PANEL * S::N) {
    for (int l = 0; l < L; l++) __builtin_prefetch(ahead.from + i * ahead.stride + l * LINE, 0, 2);
    decltype(S::weight(panel)) w[C];
    for (int c = 0; c < C; c++) w[c] = S::weight(panel + c * W * S::N);
    for (int m = 0; m < M; m++) {
      auto a = S::row(x[m] + i * S::N);
      for (int c = 0; c < C; c++) s[m][c] = S::add(s[m][c], a, w[c]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++) sums[m][c] = s[m][c];
}

// The same into `out`, of which `count` columns are left.
template <class T, int M, int C, int L>
static void columns(const typename Step<T>::Row* const* x, const T* panel, const T* bias, T* out, long steps, long count,
                    long out_stride, Ahead ahead) {
  vfloat sums[M][C];
  tile<T, M, C, L>(x, panel, steps, ahead, sums);
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++) {
      long column = c * W, left = count - column;
      T* o = out + m * out_stride + column;
      if (left >= W)
        store(o, bias ? sums[m][c] + load(bias + column) : sums[m][c]);
      else
        for (long i = 0; i < left; i++) store_one(o + i, bias ? sums[m][c][i] + load_one(bias + column + i) : sums[m][c][i]);
    }
}

// M rows of x with R rows of a plain weight.
template <class T, int M, int R>
static void dots(const typename Step<T>::Row* const* x, const T* weight, long stride, const T* bias, T* out, long in,
                 long out_stride) {
  typedef Step<T> S;
  constexpr int N = S::N * W;
  vfloat sums[M][R] = {};
  long i = 0;
  for (; i + N <= in; i += N) {
    decltype(S::weight(weight)) w[R];
    for (int r = 0; r < R; r++) {
      __builtin_prefetch((const char*)(weight + r * stride + i) + AHEAD);
      w[r] = S::weight(weight + r * stride + i);
    }
    for (int m = 0; m < M; m++) {
      auto a = S::vector(x[m] + i);
      for (int r = 0; r < R; r++) sums[m][r] = S::add(sums[m][r], a, w[r]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) {
      float total = sum(sums[m][r]);
      for (long j = i; j < in; j++) total += load_one(x[m] + j) * load_one(weight + r * stride + j);
      store_one(out + m * out_stride + r, bias ? total + load_one(bias + r) : total);
    }
}

template <class T, int C, int L, int... M>
static auto columns_of(long rows, std::integer_sequence<int, M...>) {
  static constexpr decltype(&columns<T, 1, C, L>) table[] = {columns<T, M + 1, C, L>...};
  return table[rows - 1];
}
template <class T, int C> static auto columns_of(long rows, int lines) {
  constexpr auto counts = std::make_integer_sequence<int, MOST_ROWS>();
  return lines >= 4   ? columns_of<T, C, 4>(rows, counts)
         : lines >= 2 ? columns_of<T, C, 2>(rows, counts)
         : lines      ? columns_of<T, C, 1>(rows, counts)
                      : columns_of<T, C, 0>(rows, counts);
}
constexpr int SUMS = MOST_ROWS * WIDE;
constexpr int WEIGHT_ROWS = 4;
constexpr int MOST_DOT_ROWS = SUMS / WEIGHT_ROWS;
template <class T, int R, int... M>
static auto dots_of(long rows, std::integer_sequence<int, M...>) {
  static constexpr decltype(&dots<T, 1, R>) table[] = {dots<T, M + 1, R>...};
  return table[rows - 1];
}
template <class T, int R> static auto dots_of(long rows) {
  return dots_of<T, R>(rows, std::make_integer_sequence<int, MOST_DOT_ROWS>());
}

// All rows times columns first..last (vectors) of a panel. The panel comes near with the first rows and stays for the others.
// next: the panel that follows, or null.
template <class T>
static void panel_columns(const typename Step<T>::Row* const* x, long rows, const T* panel, const T* next, const T* bias, T* out,
                          long steps, int first, int last, long count, long out_stride) {
  constexpr long STEP = PANEL * Step<T>::N * sizeof(T);
  long groups = (rows + MOST_ROWS - 1) / MOST_ROWS;
  int wide = last - first >= WIDE ? WIDE : NARROW;
  long passes = groups * ((last - first) / wide), pass = 0;
  for (long g = 0; g < groups; g++) {
    long begin = rows * g / groups, end = rows * (g + 1) / groups;
    for (int c = first; c < last; c += wide, pass++) {
      const T* p = panel + c * W * Step<T>::N;
      Ahead ahead = {(const char*)p + AHEAD, STEP, int(wide * W * Step<T>::N * sizeof(T) / LINE)};
      if (passes > 1) {
        const long share = (STEP + passes - 1) / passes;  // of the next panel, in a step of this pass
        ahead = {(const char*)next + pass * steps * share, share, next ? int((share + LINE - 1) / LINE) : 0};
      }
      auto columns = wide == WIDE ? columns_of<T, WIDE>(end - begin, ahead.lines) : columns_of<T, NARROW>(end - begin, ahead.lines);
      long column = c * W;
      columns(x + begin, p, bias ? bias + column : nullptr, out + begin * out_stride + column, steps, count - column, out_stride, ahead);
    }
  }
}

// x: [rows, in]; packed: [panels, steps, PANEL, step]; bias: [out_size] or null; out: [rows, out_size].
// Contiguous.
extern "C" void linear_packed(int dtype, const void* x, const void* packed, const void* bias, void* out, long rows,
                              long in, long out_size, int threads) {
  by_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Row = typename Step<T>::Row;
    long panels = (out_size + PANEL - 1) / PANEL, steps = (in + DEPTH * Step<T>::N - 1) / (DEPTH * Step<T>::N) * DEPTH;
    long padded = steps * Step<T>::N;
#pragma omp parallel num_threads(threads) if (in * out_size > SERIAL)
    {
      std::vector<Row> scratch(is_row<T>(in, padded) ? 0 : rows * padded);
      std::vector<const Row*> given(rows);
      for (long j = 0; j < rows; j++) given[j] = as_row((const T*)x + j * in, in, padded, scratch.data() + j * padded);
#pragma omp for schedule(static) nowait
      for (int part = 0; part < threads; part++) {
        long begin = 2 * panels * part / threads, end = 2 * panels * (part + 1) / threads;  // in half panels
        for (long half = begin; half < end;) {
          long panel = half / 2, stop = std::min(2 * panel + 2, end), column = panel * PANEL;
          const T* weight = (const T*)packed + panel * padded * PANEL;
          long first = (half - 2 * panel) * VECTORS / 2, last = (stop - 2 * panel) * VECTORS / 2;
          panel_columns<T>(given.data(), rows, weight, stop < end ? weight + padded * PANEL : nullptr,
                           bias ? (const T*)bias + column : nullptr, (T*)out + column, steps, first, last,
                           out_size - column, out_size);
          half = stop;
        }
      }
    }
  });
}

// The same with a plain weight [out_size, in] of rows `stride` elements apart, as dot products.
extern "C" void linear_plain(int dtype, const void* x, const void* weight, const void* bias, void* out, long rows, long in,
                             long out_size, long stride, int threads) {
  by_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Row = typename Step<T>::Row;
    long padded = (in + Step<T>::N - 1) / Step<T>::N * Step<T>::N;
#pragma omp parallel num_threads(threads) if (in * out_size > SERIAL)
    {
      std::vector<Row> scratch(is_row<T>(in, padded) ? 0 : rows * padded);
      std::vector<const Row*> given(rows);
      for (long j = 0; j < rows; j++) given[j] = as_row((const T*)x + j * in, in, padded, scratch.data() + j * padded);
#pragma omp for schedule(static) nowait
      for (long group = 0; group < (out_size + WEIGHT_ROWS - 1) / WEIGHT_ROWS; group++) {
        long row = group * WEIGHT_ROWS, left = std::min<long>(WEIGHT_ROWS, out_size - row);
        const T* w = (const T*)weight + row * stride;
        const T* b = bias ? (const T*)bias + row : nullptr;
        for (long start = 0; start < rows; start += MOST_DOT_ROWS) {
          long count = std::min<long>(MOST_DOT_ROWS, rows - start);
          T* o = (T*)out + start * out_size + row;
          if (left == WEIGHT_ROWS) dots_of<T, WEIGHT_ROWS>(count)(given.data() + start, w, stride, b, o, in, out_size);
          else
            for (long r = 0; r < left; r++)
              dots_of<T, 1>(count)(given.data() + start, w + r * stride, stride, b ? b + r : nullptr, o + r, in, out_size);
        }
      }
    }
  });
}

// Rows of a packed weight of `in` columns: token_ids [count], less `start`; out: [count, in]; zeros for a row that is not
// among `rows`.
extern "C" void embedding_packed(int dtype, const int64_t* token_ids, const void* packed, void* out, long count, long in,
                                 long rows, long start, int threads) {
  by_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr long N = Step<T>::N;
    long padded = (in + DEPTH * N - 1) / (DEPTH * N) * DEPTH * N;
#pragma omp parallel for num_threads(threads) if (count * in > SERIAL)
    for (long t = 0; t < count; t++) {
      long row = token_ids[t] - start;
      T* to = (T*)out + t * in;
      if (row < 0 || row >= rows) {
        std::fill(to, to + in, T{});
        continue;
      }
      const T* from = (const T*)packed + row / PANEL * padded * PANEL + row % PANEL * N;
      long whole = in / N * N;
      for (long i = 0; i < whole; i += N, from += PANEL * N)
        for (long n = 0; n < N; n++) to[i + n] = from[n];
      for (long i = whole; i < in; i++) to[i] = from[i - whole];
    }
  });
}

extern "C" int linear_panel() { return PANEL; }
extern "C" int linear_depth() { return DEPTH; }
CALLABLE(linear_packed)
CALLABLE(linear_plain)
CALLABLE(embedding_packed)
