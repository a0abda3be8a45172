// Paged attention of few rows (decode): vectors lie along head_dim, and keys and values are read where they lie, those
// of the next tile being fetched meanwhile. Long sequences are split over tasks, whose results are combined.
#pragma once
#include <algorithm>
#include <vector>

#include "attention.h"
#include "product.h"

constexpr int FEW = 8;    // rows, at most
constexpr int KEYS = 64;  // taken at a time

// The softmax over some of the keys, to base 2, not yet divided: of each row of each KV head value_dim sums, then
struct Partial {
  float* rows;
  long value_dim;
  static long row_size(long value_dim) { return value_dim + W; }
  float* out(long r) const { return rows + r * row_size(value_dim); }
  float& maximum(long r) const { return out(r)[value_dim]; }
  float& total(long r) const { return out(r)[value_dim + 1]; }
};

// Some neighbouring KV heads of a sequence, and one of the splits of its keys. rows: of each KV head.
struct FewTask {
  long sequence, kv_head;
  int kv_heads, rows, split, splits;
  long slot;  // of its first split's partial result
};

// Lane n is the sum of vectors[n], for W of them; halves are added to halves.
template <int HALF, int... I> static inline vfloat sums_of(vfloat* vectors, std::integer_sequence<int, I...> lanes) {
  for (int n = 0; n < HALF; n++) {
    const vfloat a = vectors[n], b = vectors[n + HALF];
    vectors[n] = __builtin_shufflevector(a, b, (I & HALF ? W + I - HALF : I)...) +
                 __builtin_shufflevector(a, b, (I & HALF ? W + I : I + HALF)...);
  }
  if constexpr (HALF > 1) return sums_of<HALF / 2>(vectors, lanes);
  return vectors[0];
}

// The products of a query with W keys.
template <class T> static inline vfloat dots(const T* query, const T* const* keys, int head_dim) {
  typedef Step<T> S;
  vfloat sums[W] = {};
  int i = 0;
  if constexpr (S::N == 2)
    for (; i + 2 * W <= head_dim; i += 2 * W) {
      const auto q = S::vector(query + i);
      for (int n = 0; n < W; n++) sums[n] = S::add(sums[n], S::vector(keys[n] + i), q);
    }
  for (; i < head_dim; i += W) {
    const vfloat q = load(query + i);
    for (int n = 0; n < W; n++) sums[n] += load(keys[n] + i) * q;
  }
  return sums_of<W / 2>(sums, std::make_integer_sequence<int, W>());
}

// Adds values times weights to what decays, for C vectors of each of R rows from `first` on.
template <class T, int R, int C>
static inline void add_values(const Partial& to, long first, const float (*weights)[KEYS], const T* const* values,
                              int count, int i, const float* decay) {
  vfloat sums[R][C];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) sums[r][c] = load(to.out(first + r) + i + c * W) * decay[r];
  for (int n = 0; n < count; n++) {
    vfloat value[C];
    for (int c = 0; c < C; c++) value[c] = load(values[n] + i + c * W);
    for (int r = 0; r < R; r++) {
      const vfloat weight = splat(weights[r][n]);
      for (int c = 0; c < C; c++) sums[r][c] += value[c] * weight;
    }
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) store(to.out(first + r) + i + c * W, sums[r][c]);
}

static inline void fetch(const void* p, long bytes) {
  for (long i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)p + i);
}

// A tile of keys or values: where each lies for the first KV head of the task.
template <class T> using Places = const T* [KEYS];

// R rows of a KV head with the `count` keys from `start` on. next: the places of so many keys and values, to be fetched.
template <class T, int R>
static inline void attend_tile(const Arguments& a, const T* const* queries, const long* positions, const float* slopes,
                               long start, int count, const T* const* keys, const T* const* values, int next,
                               const T* const* next_keys, const T* const* next_values, const Partial& to, long first) {
  constexpr int C = W == 16 && R <= 6 ? 4 : R <= 4 ? 2 : 1;
  const int head_dim = a.head_dim, value_dim = a.value_dim, padded = (count + W - 1) / W * W;
  const float to_exponent = a.to_exponent();
  alignas(64) float weights[R][KEYS];
  float decay[R];
  for (int n = 0; n < padded; n += W) {
    for (int k = n; k < std::min(n + W, next); k++) fetch(next_keys[k], head_dim * sizeof(T));
    for (int r = 0; r < R; r++) store(weights[r] + n, dots(queries[r], keys + n, head_dim));
  }
  for (int r = 0; r < R; r++) {
    vfloat highest = splat(-INFINITY);
    for (int n = 0; n < padded; n += W) {
      vfloat s = load(weights[r] + n);
      if (a.changes_scores() || a.window || start + n + W > positions[r] + 1) {  // hides what is beyond the keys, too
        s = score(a, s, vint{} + int32_t(positions[r]), count_from(start + n), splat(slopes[r]));
        store(weights[r] + n, s);
      }
      highest = max(highest, s);
    }
    const float maximum = std::max(to.maximum(first + r), greatest(highest) * to_exponent);
    vfloat total = {};
    for (int n = 0; n < padded; n += W) {
      const vfloat weight = power_of_2(load(weights[r] + n) * to_exponent - maximum);
      store(weights[r] + n, weight);
      total += weight;
    }
    decay[r] = std::exp2(to.maximum(first + r) - maximum);
    to.total(first + r) = to.total(first + r) * decay[r] + sum(total);
    to.maximum(first + r) = maximum;
  }
  for (int n = 0; n < next; n++) fetch(next_values[n], value_dim * sizeof(T));
  int i = 0;
  for (; i + C * W <= value_dim; i += C * W) add_values<T, R, C>(to, first, weights, values, count, i, decay);
  for (; i < value_dim; i += W) add_values<T, R, 1>(to, first, weights, values, count, i, decay);
}

template <class T, int R> void attend_few(const Arguments& a, const FewTask& task, const Partial& to) {
  const long queries = a.query_starts[task.sequence + 1] - a.query_starts[task.sequence];
  const long keys = a.key_lens[task.sequence], heads = task.kv_heads;
  std::vector<const T*> query(heads * R);
  std::vector<float> slopes(heads * R);
  long positions[R];
  for (long h = 0; h < heads; h++) {
    const Rows rows(a, task.sequence, task.kv_head + h);
    for (int r = 0; r < R; r++) {
      query[h * R + r] = (const T*)a.query + rows.place(r) * a.head_dim;
      slopes[h * R + r] = a.alibi_slopes ? a.alibi_slopes[rows.head(r)] : 0;
      positions[r] = keys - queries + r / rows.group;
      std::fill_n(to.out(h * R + r), a.value_dim, 0.0f);
      to.maximum(h * R + r) = LOWEST, to.total(h * R + r) = 0;
    }
  }
  const long lowest = a.window ? std::max(0l, positions[0] - a.window + 1) : 0;
  const long each = ((keys - lowest + task.splits - 1) / task.splits + KEYS - 1) / KEYS * KEYS;
  const long first = std::min(keys, lowest + task.split * each), stop = std::min(keys, first + each);
  const Cache<T> cache(a, task.sequence, task.kv_head);
  const long value_head = a.value_row / a.kv_heads;
  const T *key[2][KEYS], *value[2][KEYS], *k[KEYS], *v[KEYS], *next_k[KEYS], *next_v[KEYS];
  int turn = 0, count = std::max(0l, std::min<long>(KEYS, stop - first));
  if (count) cache.find(first, count, key[0], value[0]);
  for (int n = 0; n < count; n++) fetch(key[0][n], heads * a.head_dim * sizeof(T));
  for (long start = first; start < stop; start += KEYS, turn ^= 1) {
    const int next = std::max(0l, std::min<long>(KEYS, stop - start - KEYS));
    if (next) cache.find(start + KEYS, next, key[turn ^ 1], value[turn ^ 1]);
    for (long h = 0; h < heads; h++) {
      for (int n = 0; n < KEYS; n++) {
        const int m = std::min(n, count - 1);
        k[n] = key[turn][m] + h * a.head_dim, v[n] = value[turn][m] + h * value_head;
      }
      for (int n = 0; n < next; n++)
        next_k[n] = key[turn ^ 1][n] + h * a.head_dim, next_v[n] = value[turn ^ 1][n] + h * value_head;
      attend_tile<T, R>(a, &query[h * R], positions, &slopes[h * R], start, count, k, v, next, next_k, next_v, to, h * R);
    }
    count = next;
  }
}

template <class T> void split_keys(const Arguments& a, const FewTask& task, const Partial& to) {
  switch (task.rows) {
    case 1: return attend_few<T, 1>(a, task, to);
    case 2: return attend_few<T, 2>(a, task, to);
    case 3: return attend_few<T, 3>(a, task, to);
    case 4: return attend_few<T, 4>(a, task, to);
    case 5: return attend_few<T, 5>(a, task, to);
    case 6: return attend_few<T, 6>(a, task, to);
    case 7: return attend_few<T, 7>(a, task, to);
    default: return attend_few<T, 8>(a, task, to);
  }
}

// The partial results of a task's splits, `size` floats apart, put together and written out.
template <class T> void combine(const Arguments& a, const FewTask& task, float* first, long size) {
  for (int h = 0; h < task.kv_heads; h++) {
    const Rows rows(a, task.sequence, task.kv_head + h);
    for (int r = 0; r < task.rows; r++) {
      const long row = h * task.rows + r;
      const float sink = a.sinks ? a.sinks[rows.head(r)] * LOG2_E : LOWEST;  // as a key without value
      float maximum = sink;
      for (int s = 0; s < task.splits; s++)
        maximum = std::max(maximum, Partial{first + s * size, a.value_dim}.maximum(row));
      float total = a.sinks ? std::exp2(sink - maximum) : 0;
      vfloat out[MAX_HEAD_DIM / W];
      std::fill_n(out, a.value_dim / W, vfloat{});
      for (int s = 0; s < task.splits; s++) {
        const Partial part{first + s * size, a.value_dim};
        const float weight = std::exp2(part.maximum(row) - maximum);
        total += part.total(row) * weight;
        for (long i = 0; i < a.value_dim / W; i++) out[i] += load(part.out(row) + i * W) * weight;
      }
      const float inverse = total > 0 ? 1 / total : 0;
      T* to = (T*)a.out + rows.place(r) * a.value_dim;
      for (long i = 0; i < a.value_dim / W; i++) store(to + i * W, out[i] * inverse);
    }
  }
}
