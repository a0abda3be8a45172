// Paged attention of few rows (decode): vectors lie along head_dim, keys and values are read where they lie, all KV
// heads of a tile in one. Long sequences are split over tasks, whose results are combined.
#pragma once
#include <algorithm>
#include <vector>

#include "attention.h"
#include "product.h"

constexpr int FEW = 8;    // rows, at most
constexpr int KEYS = 32;  // taken at a time

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
    vectors[n] = SHUFFLE(a, b, (I & HALF ? W + I - HALF : I)...) +
                 SHUFFLE(a, b, (I & HALF ? W + I : I + HALF)...);
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

// Keys and values that are taken together.
template <class T> struct KeyTile {
  long start;
  int count = 0;
  const T *keys[KEYS], *values[KEYS];  // of the task's first KV head

  // The first of [from, stop), which is not empty.
  void find(const Cache<T>& cache, long from, long stop) {
    start = from, count = std::min<long>(KEYS, stop - from);
    cache.find(start, count, keys, values);
    for (int n = count; n % W; n++) keys[n] = keys[count - 1];  // so that W are taken at once
  }
};

// What parts of the work on a tile take, in a common measure.
constexpr long cost_of_dots(int head_dim) { return head_dim; }                            // of W keys, with a query
constexpr long cost_of_softmax() { return 4 * KEYS; }                                     // of a row
constexpr long cost_of_values(long vectors, int rows) { return vectors * (rows + 1); }

// Lines of the tile that follows, which come near evenly while one is worked on: a memory that is asked for more than it gives
// drops what it is asked for, and what it gives while it is not asked is lost.
template <class T> class Approach {
 public:
  // now: with `heads` KV heads of `rows` each; next: with `next_heads`, or empty.
  Approach(const Arguments& a, const KeyTile<T>& now, long heads, int rows, const KeyTile<T>& next, long next_heads)
      : next(next), count(next.count) {
    if (!count) return;
    key_bytes = next_heads * a.head_dim * sizeof(T), value_bytes = next_heads * (a.value_row / a.kv_heads) * sizeof(T);
    const char *key = (const char*)next.keys[0], *value = (const char*)next.values[0];
    long lines = count * lines_of(key_bytes);
    if (value < key || value >= key + key_bytes) lines += count * lines_of(value_bytes), count *= 2;  // else in the keys
    const long work = heads * (rows * ((now.count + W - 1) / W * cost_of_dots(a.head_dim) + cost_of_softmax()) +
                               cost_of_values(now.count * (a.value_dim / W), rows));
    rate = (lines * UNIT + work - 1) / work;
  }
  // So much has been done.
  void after(long cost) {
    for (credit += cost * rate; credit >= UNIT && at < count; credit -= UNIT) {
      const bool is_key = at < next.count;
      __builtin_prefetch((const char*)(is_key ? next.keys[at] : next.values[at - next.count]) + offset);
      offset += LINE;
      if (offset >= (is_key ? key_bytes : value_bytes)) offset = 0, at++;
    }
    asm volatile("");  // see `bring`
  }

 private:
  static constexpr long UNIT = 1 << 16;
  static long lines_of(long bytes) { return (bytes + LINE - 1) / LINE; }
  const KeyTile<T>& next;
  long key_bytes = 0, value_bytes = 0, rate = 0, credit = 0, offset = 0;
  int at = 0, count;  // rows: keys, then values
};

// Adds `count` values times weights to what decays: C vectors, from element i on, of R rows from `first` on. The values
// lie `offset` elements after `values`.
template <class T, int R, int C>
static inline void add_values(const Partial& to, long first, const float (*weights)[KEYS], const T* const* values,
                              Approach<T>& approach, long offset, int count, int i, const float* decay) {
  vfloat sums[R][C];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) sums[r][c] = load(to.out(first + r) + i + c * W) * decay[r];
  for (int n = 0; n < count; n++) {
    const T* from = values[n] + offset + i;
    approach.after(cost_of_values(C, R));
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

// The same of two-byte elements, two values at a time: pairs of values are made on the way, with weights in T.
#if defined(__AVX512BF16__)
template <int R>
static inline void add_values(const Partial& to, long first, const float (*weights)[KEYS], const bfloat16* const* values,
                              Approach<bfloat16>& approach, long offset, int count, long i, const float* decay) {
  // Element k of 32 lies in lane LOW[k] of low pairs or high ones: unpacking takes fours of each quarter in turns.
  static const __m512i first16 = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  static const __m512i last16 = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  alignas(64) bfloat16 pairs[R][KEYS + W];
  for (int r = 0; r < R; r++) {
    for (int n = 0; n < count; n += W) store(pairs[r] + n, load(weights[r] + n));
    if (count % 2) pairs[r][count].bits = 0;
  }
  vfloat low[R] = {}, high[R] = {};
  for (int n = 0; n < count; n += 2) {
    const __m512i a = load_as<__m512i>(values[n] + offset + i);
    const __m512i b = n + 1 < count ? load_as<__m512i>(values[n + 1] + offset + i) : _mm512_setzero_si512();
    approach.after(cost_of_values(4, R));
    const __m512i l = _mm512_unpacklo_epi16(a, b), h = _mm512_unpackhi_epi16(a, b);
    for (int r = 0; r < R; r++) {
      const __m512i pair = _mm512_set1_epi32(load_as<int32_t>(pairs[r] + n));
      low[r] = Step<bfloat16>::add(low[r], l, pair), high[r] = Step<bfloat16>::add(high[r], h, pair);
    }
  }
  for (int r = 0; r < R; r++) {
    float* out = to.out(first + r) + i;
    const __m512i l = (__m512i)low[r], h = (__m512i)high[r];
    store(out, load(out) * decay[r] + (vfloat)_mm512_permutex2var_epi32(l, first16, h));
    store(out + W, load(out + W) * decay[r] + (vfloat)_mm512_permutex2var_epi32(l, last16, h));
  }
}
#endif

// The queries of one KV head.
template <class T, int R> struct Queries {
  const T* row[R];
  long position[R];
  float slope[R];
};

// R rows of the task's KV head `head` with a tile. approach: what comes near meanwhile.
template <class T, int R>
static inline void attend_tile(const Arguments& a, const Queries<T, R>& queries, long head, const KeyTile<T>& tile,
                               Approach<T>& approach, const Partial& to) {
  constexpr int C = W == 16 && R <= 6 ? 4 : R <= 4 ? 2 : 1;
  const int head_dim = a.head_dim, value_dim = a.value_dim, padded = (tile.count + W - 1) / W * W;
  const long first = head * R, keys_at = head * a.head_dim, values_at = head * (a.value_row / a.kv_heads);
  const float to_exponent = a.to_exponent();
  alignas(64) float weights[R][KEYS];
  alignas(64) float decay[(R + W - 1) / W * W] = {};
  float totals[R];
  for (int n = 0; n < padded; n += W)
    for (int r = 0; r < R; r++) {
      approach.after(cost_of_dots(head_dim));
      store(weights[r] + n, dots(queries.row[r], tile.keys + n, keys_at, head_dim));
    }
  for (int r = 0; r < R; r++) {
    approach.after(cost_of_softmax());
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
      const vfloat weight = power_of_2<Step<T>::N == 2>(load(weights[r] + n) * to_exponent - maximum);
      store(weights[r] + n, weight);
      total += weight;
    }
    decay[r] = to.maximum(first + r) - maximum, totals[r] = sum(total);
    to.maximum(first + r) = maximum;
  }
  for (int r = 0; r < R; r += W) store(decay + r, power_of_2(load(decay + r)));
  for (int r = 0; r < R; r++) to.total(first + r) = to.total(first + r) * decay[r] + totals[r];
  int i = 0;
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bfloat16>)
    for (; i + 2 * W <= value_dim; i += 2 * W)
      add_values<R>(to, first, weights, tile.values, approach, values_at, tile.count, long(i), decay);
#endif
  for (; i + C * W <= value_dim; i += C * W)
    add_values<T, R, C>(to, first, weights, tile.values, approach, values_at, tile.count, i, decay);
  for (; i < value_dim; i += W)
    add_values<T, R, 1>(to, first, weights, tile.values, approach, values_at, tile.count, i, decay);
}

// The keys that a task takes.
struct KeyRange {
  long first, stop;
  KeyRange(const Arguments& a, const FewTask& task) {
    const long num_queries = a.query_starts[task.sequence + 1] - a.query_starts[task.sequence];
    const long num_keys = a.key_lens[task.sequence];
    const long lowest = a.window ? std::max(0l, num_keys - num_queries - a.window + 1) : 0;
    const long each = ((num_keys - lowest + task.splits - 1) / task.splits + KEYS - 1) / KEYS * KEYS;
    first = std::min(num_keys, lowest + task.split * each), stop = std::min(num_keys, first + each);
  }
};

// following: the task that comes after on this thread, or null.
template <class T, int R>
void attend_few(const Arguments& a, const FewTask& task, const FewTask* following, const Partial& to) {
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
  const KeyRange range(a, task);
  const Cache<T> cache(a, task.sequence, task.kv_head);
  KeyTile<T> tiles[2];
  if (range.first < range.stop) tiles[0].find(cache, range.first, range.stop);
  int now = 0;
  for (long start = range.first; start < range.stop; start += KEYS, now = 1 - now) {
    KeyTile<T>& next = tiles[1 - now];
    next.count = 0;
    long next_heads = heads;
    if (start + KEYS < range.stop) {
      next.find(cache, start + KEYS, range.stop);
    } else if (following) {
      const KeyRange beyond(a, *following);
      next_heads = following->kv_heads;
      if (beyond.first < beyond.stop)
        next.find(Cache<T>(a, following->sequence, following->kv_head), beyond.first, beyond.stop);
    }
    Approach<T> approach(a, tiles[now], heads, R, next, next_heads);
    for (long h = 0; h < heads; h++) attend_tile(a, queries[h], h, tiles[now], approach, to);
  }
}

template <class T> void split_keys(const Arguments& a, const FewTask& task, const FewTask* following, const Partial& to) {
  switch (task.rows) {
    case 1: return attend_few<T, 1>(a, task, following, to);
    case 2: return attend_few<T, 2>(a, task, following, to);
    case 3: return attend_few<T, 3>(a, task, following, to);
    case 4: return attend_few<T, 4>(a, task, following, to);
    case 5: return attend_few<T, 5>(a, task, following, to);
    case 6: return attend_few<T, 6>(a, task, following, to);
    case 7: return attend_few<T, 7>(a, task, following, to);
    default: return attend_few<T, 8>(a, task, following, to);
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
