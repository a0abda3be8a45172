// plan_experts and combine: `kernels/eager_moe.py`.
#include <type_traits>

#include "calls.h"
#include "vector.h"

// ids, places: [num_pairs]; pairs: [num_pairs]; starts: [num_local + 1].
extern "C" void plan_experts(const int* ids, int* pairs, int* starts, int* places, long num_pairs, long first,
                             long num_local) {
  // While counting, starts[e + 1] counts expert e; while placing, it is where e's next row goes, and ends as e's last.
  auto local = [&](long p) { return ids[p] >= first && ids[p] < first + num_local; };
  for (long e = 0; e <= num_local; e++) starts[e] = 0;
  for (long p = 0; p < num_pairs; p++)
    if (local(p) && ids[p] - first + 2 <= num_local) starts[ids[p] - first + 2]++;
  for (long e = 1; e <= num_local; e++) starts[e] += starts[e - 1];
  for (long p = 0; p < num_pairs; p++) {
    places[p] = num_pairs;
    if (!local(p)) continue;
    places[p] = starts[ids[p] - first + 1]++;
    pairs[places[p]] = p;
  }
}

// rows: [.., hidden]; weights: float [num_tokens, top_k]; places: [num_tokens, top_k]; out: [num_tokens, hidden].
extern "C" void combine(int dtype, const void* rows, const float* weights, const int* places, void* out,
                        long num_tokens, long top_k, long hidden, int threads) {
  by_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    long elsewhere = num_tokens * top_k;
#pragma omp parallel for num_threads(threads) if (elsewhere * hidden > SERIAL)
    for (long t = 0; t < num_tokens; t++) {
      T* o = (T*)out + t * hidden;
      auto row = [&](long j) { return (const T*)rows + places[t * top_k + j] * hidden; };
      auto ours = [&](long j) { return places[t * top_k + j] != elsewhere; };
      long i = 0;
      for (; i + W <= hidden; i += W) {
        vfloat total = {};
        for (long j = 0; j < top_k; j++)
          if (ours(j)) total += load(row(j) + i) * weights[t * top_k + j];
        store(o + i, total);
      }
      for (; i < hidden; i++) {
        float total = 0;
        for (long j = 0; j < top_k; j++)
          if (ours(j)) total += load_one(row(j) + i) * weights[t * top_k + j];
        store_one(o + i, total);
      }
    }
  });
}
CALLABLE(plan_experts)
CALLABLE(combine)
