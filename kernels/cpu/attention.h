// What both forms of paged_attention.cpp stand on: the arguments, where a sequence's keys and values lie, the scores.
#pragma once
#include <algorithm>
#include <cmath>

#include "vector.h"

constexpr int MAX_HEAD_DIM = 576;  // of keys, queries and values; a multiple of W
constexpr float LOWEST = -1e30f;   // a maximum before the first key: finite, so that differences are no NaN

struct Arguments {
  const void *query, *key_cache, *value_cache;
  void* out;
  const int32_t *block_tables, *query_starts, *key_lens;
  long num_seqs, max_blocks, heads, kv_heads, head_dim, value_dim;
  long value_row;  // elements from a slot's values to the next slot's
  long block_size;
  float scale, softcap;               // scale > 0; softcap 0: none
  long window;                        // 0: none
  const float *sinks, *alibi_slopes;  // of each head; null: none
  int threads;

  bool changes_scores() const { return softcap || alibi_slopes; }
  // The softmax is taken to base 2: what a score is multiplied by for it.
  float to_exponent() const { return changes_scores() ? LOG2_E : scale * LOG2_E; }
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

  // Where the tokens `first` to `first + count` lie.
  void find(long first, int count, const T** key, const T** value) const {
    long block = first / block_size, within = first % block_size;
    for (int n = 0; n < count; block++, within = 0) {
      const long slot = table[block] * block_size + within, stop = std::min<long>(count, n + block_size - within);
      const T *k = keys + slot * row, *v = values + slot * value_row;
      for (; n < stop; n++, k += row, v += value_row) key[n] = k, value[n] = v;
    }
  }
};

// A row of a sequence and KV head: where it lies in query and output, and which query head it is.
struct Rows {
  long start, group, heads, kv_head;
  Rows(const Arguments& a, long sequence, long kv_head)
      : start(a.query_starts[sequence]), group(a.heads / a.kv_heads), heads(a.heads), kv_head(kv_head) {}
  long head(long r) const { return kv_head * group + r % group; }
  long place(long r) const { return (start + r / group) * heads + head(r); }  // in heads
};

static inline vfloat tanh(vfloat x) { return 1.0f - 2.0f / (exp(x * 2.0f) + 1.0f); }

// A product of query and key as the softmax takes it. query, key: positions; slope: ALiBi's (Press et al. 2022).
static inline vfloat score(const Arguments& a, vfloat product, vint query, vint key, vfloat slope) {
  if (a.changes_scores()) product *= a.scale;
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
