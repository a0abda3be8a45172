// paged_attention: `kernels/eager.py`, reading the blocks where they lie.
//
// The rows of a sequence and a KV head are its queries times the query heads of the group: row = query * group + head,
// so that one pass over the keys serves them all. Softmax is taken along the way (Milakov & Gimelshein 2018; Dao et al.
// 2022): a running maximum, what was summed so far being scaled when it grows. Two forms:
//
//   few rows (decode)    vectors lie along head_dim; long sequences are split over tasks, whose results are combined
//   many rows (prefill)  vectors lie along the rows: queries are transposed once, keys and values are broadcast,
//                        and nothing is ever summed across a vector
#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>
#include <vector>

#include "calls.h"
#include "vector.h"

namespace {

constexpr int FEW = 8;             // rows of the decode form, at most
constexpr int KEYS = 64;           // keys taken at a time
constexpr int MAX_HEAD_DIM = 576;  // of keys, queries and values; a multiple of W
constexpr int NV = W == 16 ? 6 : 2;  // vectors of rows in the prefill form: with 4 keys beside, what registers hold
constexpr int ROWS = NV * W;
constexpr float LOWEST = -1e30f;  // a maximum before the first key: finite, so that differences are no NaN

struct Arguments {
  const void *query, *key_cache, *value_cache;
  void* out;
  const int32_t *block_tables, *query_starts, *key_lens;
  long num_seqs, max_blocks, heads, kv_heads, head_dim, value_dim;
  long value_row;  // elements from a slot's values to the next slot's
  long block_size;
  float scale, softcap;               // softcap 0: none
  long window;                        // 0: none
  const float *sinks, *alibi_slopes;  // of each head; null: none
  int threads;
};

// One sequence's keys and values of one KV head.
template <class T> struct Cache {
  const T *keys, *values;
  const int32_t* table;
  long block_size, row, value_row;

  Cache(const Arguments& a, long sequence, long kv_head)
      : keys((const T*)a.key_cache + kv_head * a.head_dim),
        values((const T*)a.value_cache + kv_head * (a.value_row / a.kv_heads)),
        table(a.block_tables + sequence * a.max_blocks), block_size(a.block_size), row(a.kv_heads * a.head_dim),
        value_row(a.value_row) {}

  // Offsets of the tokens `first` to `first + count` within `keys` and `values`.
  void offsets(long first, int count, long* of_keys, long* of_values) const {
    long block = first / block_size, within = first % block_size;
    for (int n = 0; n < count; n++) {
      const long slot = table[block] * block_size + within;
      of_keys[n] = slot * row, of_values[n] = slot * value_row;
      if (++within == block_size) within = 0, block++;
    }
  }
};

// Row r of a sequence and KV head: where it lies in query and output, and which query head it is.
struct Rows {
  long start, group, heads, kv_head;
  Rows(const Arguments& a, long sequence, long kv_head)
      : start(a.query_starts[sequence]), group(a.heads / a.kv_heads), heads(a.heads), kv_head(kv_head) {}
  long head(long r) const { return kv_head * group + r % group; }
  long place(long r) const { return (start + r / group) * heads + head(r); }  // in heads
};

static inline vfloat tanh(vfloat x) { return 1.0f - 2.0f / (exp(x * 2.0f) + 1.0f); }

// What comes between a product and the softmax. query, key: positions; slope: ALiBi's (Press et al. 2022).
static inline vfloat score(const Arguments& a, vfloat product, vint query, vint key, vfloat slope) {
  if (a.softcap) product = a.softcap * tanh(product / a.softcap);
  if (a.alibi_slopes) product += slope * __builtin_convertvector(key - query, vfloat);
  vint hidden = key > query;
  if (a.window) hidden |= key <= query - int32_t(a.window);
  return hidden ? splat(-INFINITY) : product;
}

static inline vint count_from(long first) {
  vint v;
  for (int i = 0; i < W; i++) v[i] = int32_t(first) + i;
  return v;
}

// ---- few rows ---------------------------------------------------------------------------------------------------

struct Partial {  // the softmax over some of the keys, not yet divided
  float maximum[FEW], total[FEW];
  alignas(64) float out[FEW][MAX_HEAD_DIM];
};

struct FewRows {
  alignas(64) float query[FEW][MAX_HEAD_DIM];
  long position[FEW];
  float slope[FEW];
};

// R rows over the keys [first, stop).
template <class T, int R>
void attend_few(const Arguments& a, const Cache<T>& cache, const FewRows& rows, long first, long stop, Partial& result) {
  const int vectors = a.head_dim / W, value_vectors = a.value_dim / W;
  alignas(64) float scores[R][KEYS];
  long keys_at[KEYS], values_at[KEYS];
  for (int r = 0; r < R; r++) {
    result.maximum[r] = LOWEST, result.total[r] = 0;
    std::fill_n(result.out[r], a.value_dim, 0.0f);
  }
  for (long start = first; start < stop; start += KEYS) {
    const int count = std::min<long>(KEYS, stop - start);
    cache.offsets(start, count, keys_at, values_at);
    for (int n = 0; n < count; n++) {
      const T* key = cache.keys + keys_at[n];
      vfloat dots[R] = {};
      for (int i = 0; i < vectors; i++) {
        vfloat k = load(key + i * W);
        for (int r = 0; r < R; r++) dots[r] += k * load(rows.query[r] + i * W);
      }
      for (int r = 0; r < R; r++) scores[r][n] = sum(dots[r]);
    }
    for (int r = 0; r < R; r++) {
      std::fill(scores[r] + count, scores[r] + KEYS, -INFINITY);
      vfloat highest = splat(result.maximum[r]);
      for (int n = 0; n < KEYS; n += W) {
        const vint query = vint{} + int32_t(rows.position[r]);
        vfloat s = score(a, load(scores[r] + n), query, count_from(start + n), splat(rows.slope[r]));
        store(scores[r] + n, s);
        highest = max(highest, s);
      }
      float maximum = highest[0];
      for (int i = 1; i < W; i++) maximum = std::max(maximum, highest[i]);
      vfloat total = {};
      for (int n = 0; n < KEYS; n += W) {
        vfloat weight = exp(load(scores[r] + n) - maximum);
        store(scores[r] + n, weight);
        total += weight;
      }
      float decay = std::exp(result.maximum[r] - maximum);
      result.total[r] = result.total[r] * decay + sum(total);
      result.maximum[r] = maximum;
      for (int i = 0; i < value_vectors; i++) store(result.out[r] + i * W, load(result.out[r] + i * W) * decay);
    }
    for (int i = 0; i < value_vectors; i++) {
      vfloat out[R];
      for (int r = 0; r < R; r++) out[r] = load(result.out[r] + i * W);
      for (int n = 0; n < count; n++) {
        vfloat value = load(cache.values + values_at[n] + i * W);
        for (int r = 0; r < R; r++) out[r] += value * scores[r][n];
      }
      for (int r = 0; r < R; r++) store(result.out[r] + i * W, out[r]);
    }
  }
}

struct FewTask { long sequence, kv_head; int rows, split, splits; long slot; };

template <class T> void split_keys(const Arguments& a, const FewTask& task, Partial& result) {
  const Rows rows(a, task.sequence, task.kv_head);
  const long keys = a.key_lens[task.sequence], queries = a.query_starts[task.sequence + 1] - rows.start;
  FewRows few;
  for (int r = 0; r < task.rows; r++) {
    const T* from = (const T*)a.query + rows.place(r) * a.head_dim;
    for (long i = 0; i < a.head_dim; i += W) store(few.query[r] + i, load(from + i) * a.scale);
    few.position[r] = keys - queries + r / rows.group;
    few.slope[r] = a.alibi_slopes ? a.alibi_slopes[rows.head(r)] : 0;
  }
  const long lowest = a.window ? std::max(0l, few.position[0] - a.window + 1) : 0;
  const long each = ((keys - lowest + task.splits - 1) / task.splits + KEYS - 1) / KEYS * KEYS;
  const long first = std::min(keys, lowest + task.split * each), stop = std::min(keys, first + each);
  const Cache<T> cache(a, task.sequence, task.kv_head);
  switch (task.rows) {
    case 1: return attend_few<T, 1>(a, cache, few, first, stop, result);
    case 2: return attend_few<T, 2>(a, cache, few, first, stop, result);
    case 3: return attend_few<T, 3>(a, cache, few, first, stop, result);
    case 4: return attend_few<T, 4>(a, cache, few, first, stop, result);
    case 5: return attend_few<T, 5>(a, cache, few, first, stop, result);
    case 6: return attend_few<T, 6>(a, cache, few, first, stop, result);
    case 7: return attend_few<T, 7>(a, cache, few, first, stop, result);
    default: return attend_few<T, 8>(a, cache, few, first, stop, result);
  }
}

// The splits of one sequence and KV head, put together and written out.
template <class T> void combine(const Arguments& a, const FewTask& task, const Partial* parts) {
  const Rows rows(a, task.sequence, task.kv_head);
  for (int r = 0; r < task.rows; r++) {
    float maximum = LOWEST, total = 0;
    for (int s = 0; s < task.splits; s++) maximum = std::max(maximum, parts[s].maximum[r]);
    vfloat out[MAX_HEAD_DIM / W];
    std::fill_n(out, a.value_dim / W, vfloat{});
    for (int s = 0; s < task.splits; s++) {
      const float weight = std::exp(parts[s].maximum[r] - maximum);
      total += parts[s].total[r] * weight;
      for (long i = 0; i < a.value_dim / W; i++) out[i] += load(parts[s].out[r] + i * W) * weight;
    }
    if (a.sinks) total += std::exp(a.sinks[rows.head(r)] - maximum);
    const float inverse = total > 0 ? 1 / total : 0;
    T* to = (T*)a.out + rows.place(r) * a.value_dim;
    for (long i = 0; i < a.value_dim / W; i++) store(to + i * W, out[i] * inverse);
  }
}

// ---- many rows --------------------------------------------------------------------------------------------------

struct Tile {  // of a task in the prefill form; row vectors [.][ROWS]
  alignas(64) float query[MAX_HEAD_DIM * ROWS], out[MAX_HEAD_DIM * ROWS], weights[KEYS * ROWS];
  alignas(64) float keys[KEYS * MAX_HEAD_DIM], values[KEYS * MAX_HEAD_DIM];
};

// c[i][row] += sum over k < depth of a[i * a_i + k * a_k] * b[k][row], four i at a time, V vectors of rows.
template <int V> void accumulate(float* c, const float* a, const float* b, int count, int depth, long a_i, long a_k) {
  int i = 0;
  for (; i + 4 <= count; i += 4) {
    vfloat sums[4][V];
    for (int j = 0; j < 4; j++)
      for (int v = 0; v < V; v++) sums[j][v] = load(c + (i + j) * ROWS + v * W);
    const float* from = a + i * a_i;
    for (int k = 0; k < depth; k++, from += a_k) {
      vfloat row[V];
      for (int v = 0; v < V; v++) row[v] = load(b + k * ROWS + v * W);
      for (int j = 0; j < 4; j++) {
        const vfloat x = splat(from[j * a_i]);
        for (int v = 0; v < V; v++) sums[j][v] += x * row[v];
      }
    }
    for (int j = 0; j < 4; j++)
      for (int v = 0; v < V; v++) store(c + (i + j) * ROWS + v * W, sums[j][v]);
  }
  for (; i < count; i++)
    for (int v = 0; v < V; v++) {
      vfloat total = load(c + i * ROWS + v * W);
      for (int k = 0; k < depth; k++) total += load(b + k * ROWS + v * W) * a[i * a_i + k * a_k];
      store(c + i * ROWS + v * W, total);
    }
}

struct ManyTask { long sequence, kv_head, row; int rows; };

template <class T, int V> void attend_many(const Arguments& a, const ManyTask& task, Tile& tile) {
  const Rows rows(a, task.sequence, task.kv_head);
  const Cache<T> cache(a, task.sequence, task.kv_head);
  const int head_dim = a.head_dim, value_dim = a.value_dim;
  // A value that is the last elements of its key is not converted twice.
  const bool in_keys = a.value_cache == (const T*)a.key_cache + head_dim - value_dim;
  const float* values = in_keys ? tile.keys + head_dim - value_dim : tile.values;
  const int value_row = in_keys ? head_dim : value_dim;
  const long before = a.key_lens[task.sequence] - (a.query_starts[task.sequence + 1] - rows.start);
  alignas(64) int32_t position[ROWS];
  alignas(64) float slope[ROWS] = {};
  for (int r = 0; r < V * W; r++) {
    if (r >= task.rows) {
      for (int d = 0; d < head_dim; d++) tile.query[d * ROWS + r] = 0;
      position[r] = position[task.rows - 1];
      continue;
    }
    const T* from = (const T*)a.query + rows.place(task.row + r) * head_dim;
    for (int d = 0; d < head_dim; d++) tile.query[d * ROWS + r] = load_one(from + d) * a.scale;
    position[r] = before + (task.row + r) / rows.group;
    if (a.alibi_slopes) slope[r] = a.alibi_slopes[rows.head(task.row + r)];
  }
  std::fill_n(tile.out, value_dim * ROWS, 0.0f);
  vfloat maximum[V], total[V];
  for (int v = 0; v < V; v++) maximum[v] = splat(LOWEST), total[v] = vfloat{};

  const long stop = position[task.rows - 1] + 1;
  const bool plain = !a.softcap && !a.alibi_slopes && !a.window;
  long keys_at[KEYS], values_at[KEYS];
  for (long start = a.window ? std::max(0l, position[0] - a.window + 1) : 0; start < stop; start += KEYS) {
    const int count = std::min<long>(KEYS, stop - start);
    cache.offsets(start, count, keys_at, values_at);
    for (int n = 0; n < count; n++) {
      const T *key = cache.keys + keys_at[n], *value = cache.values + values_at[n];
      for (int i = 0; i < head_dim; i += W) store(tile.keys + n * head_dim + i, load(key + i));
      if (in_keys) continue;
      for (int i = 0; i < value_dim; i += W) store(tile.values + n * value_dim + i, load(value + i));
    }
    std::fill_n(tile.weights, count * ROWS, 0.0f);
    accumulate<V>(tile.weights, tile.keys, tile.query, count, head_dim, head_dim, 1);
    if (!plain || start + count - 1 > position[0])
      for (int n = 0; n < count; n++)
        for (int v = 0; v < V; v++) {
          float* w = tile.weights + n * ROWS + v * W;
          const vint key = vint{} + int32_t(start + n);
          store(w, score(a, load(w), load_as<vint>(position + v * W), key, load(slope + v * W)));
        }
    for (int v = 0; v < V; v++) {
      vfloat highest = maximum[v], sums = {};
      for (int n = 0; n < count; n++) highest = max(highest, load(tile.weights + n * ROWS + v * W));
      for (int n = 0; n < count; n++) {
        float* w = tile.weights + n * ROWS + v * W;
        const vfloat weight = exp(load(w) - highest);
        store(w, weight);
        sums += weight;
      }
      const vfloat decay = exp(maximum[v] - highest);
      total[v] = total[v] * decay + sums;
      maximum[v] = highest;
      for (int d = 0; d < value_dim; d++) store(tile.out + d * ROWS + v * W, load(tile.out + d * ROWS + v * W) * decay);
    }
    accumulate<V>(tile.out, values, tile.weights, value_dim, count, 1, value_row);
  }
  alignas(64) float inverse[ROWS], sink[ROWS];
  if (a.sinks)
    for (int r = 0; r < V * W; r++) sink[r] = a.sinks[rows.head(task.row + std::min(r, task.rows - 1))];
  for (int v = 0; v < V; v++) {
    if (a.sinks) total[v] += exp(load(sink + v * W) - maximum[v]);
    store(inverse + v * W, total[v] > vfloat{} ? 1.0f / total[v] : vfloat{});
  }
  for (int r = 0; r < task.rows; r++) {
    T* to = (T*)a.out + rows.place(task.row + r) * value_dim;
    for (int d = 0; d < value_dim; d++) store_one(to + d, tile.out[d * ROWS + r] * inverse[r]);
  }
}

template <class T> void attend_rows(const Arguments& a, const ManyTask& task, Tile& tile) {
  static_assert(NV == 6 || NV == 2);
  switch ((task.rows + W - 1) / W) {
    case 1: return attend_many<T, 1>(a, task, tile);
    case 2: return attend_many<T, 2>(a, task, tile);
    case 3: return attend_many<T, std::min(NV, 3)>(a, task, tile);
    case 4: return attend_many<T, std::min(NV, 4)>(a, task, tile);
    case 5: return attend_many<T, std::min(NV, 5)>(a, task, tile);
    default: return attend_many<T, NV>(a, task, tile);
  }
}

// ---- a step -----------------------------------------------------------------------------------------------------

template <class T> void attend(const Arguments& a) {
  const long group = a.heads / a.kv_heads;
  std::vector<ManyTask> many;
  std::vector<FewTask> few, divided;
  long few_keys = 0;
  for (long s = 0; s < a.num_seqs; s++)
    if ((a.query_starts[s + 1] - a.query_starts[s]) * group <= FEW) few_keys += a.key_lens[s] * a.kv_heads;
  const long share = std::max<long>(4 * KEYS, few_keys / (4 * a.threads));  // keys of a task, so that all threads work
  long slots = 0;
  for (long s = 0; s < a.num_seqs; s++) {
    const long rows = (a.query_starts[s + 1] - a.query_starts[s]) * group;
    for (long h = 0; h < a.kv_heads && rows; h++) {
      if (rows <= FEW) {
        const int splits = std::max<long>(1, (a.key_lens[s] + share / 2) / share);
        for (int split = 0; split < splits; split++) few.push_back({s, h, int(rows), split, splits, slots});
        if (splits > 1) divided.push_back(few.back()), slots += splits;
      } else {
        for (long row = 0; row < rows; row += ROWS)
          many.push_back({s, h, row, int(std::min<long>(ROWS, rows - row))});
      }
    }
  }
  std::reverse(many.begin(), many.end());  // a prompt's last rows see the most keys
  const std::unique_ptr<Partial[]> parts(new Partial[slots]);
  const bool alone = few.size() + many.size() == 1;
#pragma omp parallel num_threads(a.threads) if (!alone)
  {
    static thread_local std::unique_ptr<Tile> tile;
    if (!many.empty() && !tile) tile.reset(new Tile);
#pragma omp for schedule(dynamic, 1) nowait
    for (size_t i = 0; i < many.size(); i++) attend_rows<T>(a, many[i], *tile);
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < few.size(); i++) {
      if (few[i].splits > 1) {
        split_keys<T>(a, few[i], parts[few[i].slot + few[i].split]);
      } else {
        Partial whole;
        split_keys<T>(a, few[i], whole);
        combine<T>(a, few[i], &whole);
      }
    }
#pragma omp for schedule(static)
    for (size_t i = 0; i < divided.size(); i++) combine<T>(a, divided[i], &parts[divided[i].slot]);
  }
}

}  // namespace

// query: [num_tokens, heads, head_dim]; out: [num_tokens, heads, value_dim]; key_cache: [num_blocks, block_size,
// kv_heads, head_dim]; value_cache: [num_blocks, block_size, kv_heads, value_dim], or the last elements of each head in
// key_cache, its slots `value_row` elements apart; block_tables: [num_seqs, max_blocks]; query_starts: [num_seqs + 1];
// key_lens: [num_seqs], 0 where the output is to be zeros; sinks, alibi_slopes: [heads], float32, or null; softcap,
// window: 0 for none; all else contiguous, head_dim and value_dim multiples of `head_dim_multiple()` up to
// `max_head_dim()`.
extern "C" void paged_attention(int dtype, const void* query, const void* key_cache, const void* value_cache, void* out,
                                const int32_t* block_tables, const int32_t* query_starts, const int32_t* key_lens,
                                long num_seqs, long max_blocks, long heads, long kv_heads, long head_dim,
                                long value_dim, long value_row, long block_size, float scale, float softcap,
                                long window, const float* sinks, const float* alibi_slopes, int threads) {
  const Arguments a{query, key_cache, value_cache, out, block_tables, query_starts, key_lens, num_seqs, max_blocks,
                    heads, kv_heads, head_dim, value_dim, value_row, block_size, scale, softcap, window, sinks,
                    alibi_slopes, threads};
  by_dtype(dtype, [&](auto* type) { attend<std::remove_pointer_t<decltype(type)>>(a); });
}

extern "C" int head_dim_multiple() { return W; }
extern "C" int max_head_dim() { return MAX_HEAD_DIM; }
CALLABLE(paged_attention)
