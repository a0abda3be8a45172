// Paged attention of few rows (decode): vectors lie along head_dim, keys and values are read where they lie, all KV
// heads of a tile in one. Long sequences are split over tasks, whose results are combined.
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

// The products of a query with W keys, which lie `offset` elements after `keys`.
template <class T> static inline vfloat dots(const T* query, const T* const* keys, long offset, int head_dim) {
  typedef Step<T> S;
  vfloat sums[W] = {};
  int i = 0;
  if constexpr (S::N == 2)
    for (; i + 2 * W <= head_dim; i += 2 * W) {
      const auto q = S::vector(query + i);
      for (int n = 0; n < W; n++) sums[n] = S::add(sums[n], S::vector(keys[n] + offset + i), q);
    }
  for (; i < head_dim; i += W) {
    const vfloat q = load(query + i);
    for (int n = 0; n < W; n++) sums[n] += load(keys[n] + offset + i) * q;
  }
  return sums_of<W / 2>(sums, std::make_integer_sequence<int, W>());
}

// Adds `count` values times weights to what decays: C vectors, from element i on, of R rows from `first` on. The values
// lie `offset` elements after `values`.
template <class T, int R, int C>
static inline void add_values(const Partial& to, long first, const float (*weights)[KEYS], const T* const* values,
                              long offset, int count, int i, const float* decay) {
  vfloat sums[R][C];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) sums[r][c] = load(to.out(first + r) + i + c * W) * decay[r];
  for (int n = 0; n < count; n++) {
    const T* from = values[n] + offset + i;
    vfloat value[C];
    for (int c = 0; c < C; c++) value[c] = load(from + c * W);
    for (int r = 0; r < R; r++) {
      const vfloat weight = splat(weights[r][n]);
      for (int c = 0; c < C; c++) sums[r][c] += value[c] * weight;
    }
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) store(to.out(first + r) + i + c * W, sums[r][c]);
}

// Keys and values that are taken together.
template <class T> struct KeyTile {
  long start;
  int count;
  const T *keys[KEYS], *values[KEYS];  // of the task's first KV head

  // The first of [from, stop), which is not empty.
  void find(const Cache<T>& cache, long from, long stop) {
    start = from, count = std::min<long>(KEYS, stop - from);
    cache.find(start, count, keys, values);
    for (int n = count; n % W; n++) keys[n] = keys[count - 1];  // so that W are taken at once
  }
};

// The queries of one KV head.
template <class T, int R> struct Queries {
  const T* row[R];
  long position[R];
  float slope[R];
};

// R rows of the task's KV head `head` with a tile.
template <class T, int R>
static inline void attend_tile(const Arguments& a, const Queries<T, R>& queries, long head, const KeyTile<T>& tile,
                               const Partial& to) {
  constexpr int C = W == 16 && R <= 6 ? 4 : R <= 4 ? 2 : 1;
  const int head_dim = a.head_dim, value_dim = a.value_dim, padded = (tile.count + W - 1) / W * W;
  const long first = head * R, keys_at = head * a.head_dim, values_at = head * (a.value_row / a.kv_heads);
  const float to_exponent = a.to_exponent();
  alignas(64) float weights[R][KEYS];
  float decay[R];
  for (int n = 0; n < padded; n += W)
    for (int r = 0; r < R; r++) store(weights[r] + n, dots(queries.row[r], tile.keys + n, keys_at, head_dim));
  for (int r = 0; r < R; r++) {
    const long position = queries.position[r];
    vfloat highest = splat(-INFINITY);
    for (int n = 0; n < padded; n += W) {
      vfloat s = load(weights[r] + n);
      if (a.changes_scores() || a.window || tile.start + n + W > position + 1) {  // hides what is beyond the keys, too
        s = score(a, s, vint{} + int32_t(position), count_from(tile.start + n), splat(queries.slope[r]));
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
  int i = 0;
  for (; i + C * W <= value_dim; i += C * W)
    add_values<T, R, C>(to, first, weights, tile.values, values_at, tile.count, i, decay);
  for (; i < value_dim; i += W)
    add_values<T, R, 1>(to, first, weights, tile.values, values_at, tile.count, i, decay);
}

template <class T, int R> void attend_few(const Arguments& a, const FewTask& task, const Partial& to) {
  const long num_queries = a.query_starts[task.sequence + 1] - a.query_starts[task.sequence];
  const long num_keys = a.key_lens[task.sequence], heads = task.kv_heads;
  std::vector<Queries<T, R>> queries(heads);
  for (long h = 0; h < heads; h++) {
    const Rows rows(a, task.sequence, task.kv_head + h);
    for (int r = 0; r < R; r++) {
      queries[h].row[r] = (const T*)a.query + rows.place(r) * a.head_dim;
      queries[h].position[r] = num_keys - num_queries + r / rows.group;
      queries[h].slope[r] = a.alibi_slopes ? a.alibi_slopes[rows.head(r)] : 0;
      std::fill_n(to.out(h * R + r), a.value_dim, 0.0f);
      to.maximum(h * R + r) = LOWEST, to.total(h * R + r) = 0;
    }
  }
  const long lowest = a.window ? std::max(0l, queries[0].position[0] - a.window + 1) : 0;
  const long each = ((num_keys - lowest + task.splits - 1) / task.splits + KEYS - 1) / KEYS * KEYS;
  const long first = std::min(num_keys, lowest + task.split * each), stop = std::min(num_keys, first + each);
  const Cache<T> cache(a, task.sequence, task.kv_head);
  KeyTile<T> tile;
  for (long start = first; start < stop; start += KEYS) {
    tile.find(cache, start, stop);
    for (long h = 0; h < heads; h++) attend_tile(a, queries[h], h, tile, to);
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
