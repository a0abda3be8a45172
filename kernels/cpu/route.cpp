// route: `kernels/eager_moe.py`. Of equals the one with the lowest number is chosen, and NaN counts as lower than all.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "vector.h"

enum Scoring { SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN };

static void softmax(float* x, long n) {
  float peak = *std::max_element(x, x + n), total = 0;
  for (long i = 0; i < n; i++) total += x[i] = std::exp(x[i] - peak);
  for (long i = 0; i < n; i++) x[i] /= total;
}

// The numbers of the k best of n, best first, into the first k of `order`.
static void best(const float* score, long n, long k, std::vector<int>& order) {
  std::iota(order.begin(), order.begin() + n, 0);
  std::partial_sort(order.begin(), order.begin() + k, order.begin() + n,
                    [&](int a, int b) { return score[a] != score[b] ? score[a] > score[b] : a < b; });
}

// logits: [num_tokens, experts]; correction: [experts] or null; weights, ids: [num_tokens, top_k].
extern "C" void route(int dtype, const void* logits, const float* correction, float* weights, int* ids, long num_tokens,
                      long experts, long top_k, int scoring, int normalise, float scale, long groups, long top_groups,
                      int best_two, int threads) {
  by_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const float none = -std::numeric_limits<float>::infinity(), lowest = std::numeric_limits<float>::lowest();
    long size = experts / groups;
#pragma omp parallel num_threads(threads) if (num_tokens * experts > SERIAL)
    {
      std::vector<float> scores(experts), choice(experts), of_group(groups);
      std::vector<int> order(experts);
#pragma omp for
      for (long t = 0; t < num_tokens; t++) {
        for (long e = 0; e < experts; e++) scores[e] = load_one((const T*)logits + t * experts + e);
        if (scoring == SOFTMAX) softmax(scores.data(), experts);
        if (scoring == SIGMOID)
          for (float& score : scores) score = 1.0f / (1.0f + std::exp(-score));
        for (long e = 0; e < experts; e++) {
          float score = correction ? scores[e] + correction[e] : scores[e];
          choice[e] = score > lowest ? score : lowest;
        }
        if (top_groups < groups) {
          for (long g = 0; g < groups; g++) {
            float first = none, second = none;
            for (long e = g * size; e < (g + 1) * size; e++) {
              second = std::max(second, std::min(first, choice[e]));
              first = std::max(first, choice[e]);
            }
            of_group[g] = best_two ? first + second : first;
          }
          best(of_group.data(), groups, top_groups, order);
          for (long i = top_groups; i < groups; i++)
            std::fill_n(choice.begin() + order[i] * size, size, none);
        }
        best(choice.data(), experts, top_k, order);
        float *w = weights + t * top_k, total = 0;
        for (long j = 0; j < top_k; j++) {
          ids[t * top_k + j] = order[j];
          w[j] = scores[order[j]];
        }
        if (scoring == SOFTMAX_OF_CHOSEN) softmax(w, top_k);
        for (long j = 0; j < top_k; j++) total += w[j];
        for (long j = 0; j < top_k; j++) w[j] = (normalise ? w[j] / (total + 1e-20f) : w[j]) * scale;
      }
    }
  });
}
