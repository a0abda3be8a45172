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
#include <atomic>
#include <memory>
#include <type_traits>
#include <vector>

#include "attention_few.h"
#include "attention_many.h"
#include "calls.h"

namespace {

// KV heads that a task of the decode form takes together: what it reads of a token is in one piece, up to a page.
template <class T> int heads_together(const Arguments& a) {
  return std::clamp<long>(4096 / (a.head_dim * sizeof(T)), 1, a.kv_heads);
}

template <class T> void attend(const Arguments& a) {
  const long group = a.heads / a.kv_heads;
  const int together = heads_together<T>(a);
  const long size = together * FEW * Partial::row_size(a.value_dim);
  std::vector<ManyTask> many;
  std::vector<FewTask> few, divided;
  long few_keys = 0, parts = 0;
  for (long s = 0; s < a.num_seqs; s++)
    if ((a.query_starts[s + 1] - a.query_starts[s]) * group <= FEW) few_keys += a.key_lens[s] * a.kv_heads;
  const long share = std::max<long>(8 * KEYS, few_keys / (4 * a.threads));  // keys of a task, so that all threads work
  for (long s = 0; s < a.num_seqs; s++) {
    const long rows = (a.query_starts[s + 1] - a.query_starts[s]) * group;
    if (rows > FEW) {
      for (long h = 0; h < a.kv_heads; h++)
        for (long row = 0; row < rows; row += ROWS)
          many.push_back({s, h, row, int(std::min<long>(ROWS, rows - row))});
      continue;
    }
    for (long h = 0; h < a.kv_heads && rows; h += together) {
      const int heads = std::min<long>(together, a.kv_heads - h);
      const int splits = std::max<long>(1, (a.key_lens[s] * heads + share / 2) / share);
      for (int split = 0; split < splits; split++) few.push_back({s, h, heads, int(rows), split, splits, parts});
      if (splits > 1) divided.push_back(few.back()), parts += splits;
    }
  }
  std::reverse(many.begin(), many.end());  // a prompt's last rows see the most keys
  const std::unique_ptr<float[]> partial(new float[parts * size]);
  std::atomic<size_t> taken{0};
  const bool alone = few.size() + many.size() == 1;
#pragma omp parallel num_threads(a.threads) if (!alone)
  {
    static thread_local std::unique_ptr<Tile<T>> tile;
    if (!many.empty() && !tile) tile.reset(new Tile<T>);
    const std::unique_ptr<float[]> whole(few.empty() ? nullptr : new float[size]);
#pragma omp for schedule(dynamic, 1) nowait
    for (size_t i = 0; i < many.size(); i++) attend_rows<T>(a, many[i], *tile);
    // Each takes one task ahead, so that its first keys come near in time.
    for (size_t i = taken++, next; i < few.size(); i = next) {
      next = taken++;
      const bool divides = few[i].splits > 1;
      float* to = divides ? &partial[(few[i].slot + few[i].split) * size] : whole.get();
      split_keys<T>(a, few[i], next < few.size() ? &few[next] : nullptr, {to, a.value_dim});
      if (!divides) combine<T>(a, few[i], to, size);
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (size_t i = 0; i < divided.size(); i++) combine<T>(a, divided[i], &partial[divided[i].slot * size], size);
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
