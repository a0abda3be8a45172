// route: `kernels/eager_moe.py`.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "calls.h"
#include "vector.h"

enum Scoring { SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN };

static void softmax(float* x, long n) {
  float peak = *std::max_element(x, x + n), total = 0;
  for (long i = 0; i < n; i++) total += x[i] = std::exp(x[i] - peak);
  for (long i = 0; i < n; i++) x[i] /= total;
}

typedef std::vector<std::pair<float, int>> Ranking;  // (score, number)

// Brings the k best scores to the front, best first. Of equals, which are common in bfloat16, those that torch.topk
// chooses on a CPU: by the same algorithms of the standard library, with the same order.
static void best(const std::vector<float>& scores, long k, Ranking& ranking) {
  long n = scores.size();
  ranking.resize(n);
  for (long i = 0; i < n; i++) ranking[i] = {scores[i], int(i)};
  auto before = [](const auto& a, const auto& b) {
    return (std::isnan(a.first) && !std::isnan(b.first)) || a.first > b.first;
  };
  auto begin = ranking.begin();
  if (k * 64 <= n) {
    std::partial_sort(begin, begin + k, ranking.end(), before);
  } else {
    std::nth_element(begin, begin + k - 1, ranking.end(), before);
    std::sort(begin, begin + k - 1, before);
  }
}

// logits: [num_tokens, experts]; correction: [experts] or null; weights, ids: [num_tokens, top_k].
extern "C" void route(int dtype, const void* logits, const float* correction, float* weights, int* ids, long num_tokens,
                      long experts, long top_k, int scoring, int normalise, float scale, long groups, long top_groups,
                      int best_two, int threads) {
  by_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const float none = -std::numeric_limits<float>::infinity();
    long size = experts / groups;
#pragma omp parallel num_threads(threads) if (num_tokens * experts > SERIAL)
    {
      std::vector<float> scores(experts), choice(experts), of_group(groups);
      Ranking ranking;
#pragma omp for
      for (long t = 0; t < num_tokens; t++) {
        for (long e = 0; e < experts; e++) scores[e] = load_one((const T*)logits + t * experts + e);
        if (scoring == SOFTMAX) softmax(scores.data(), experts);
        if (scoring == SIGMOID)
          for (float& score : scores) score = 1.0f / (1.0f + std::exp(-score));
        for (long e = 0; e < experts; e++) choice[e] = correction ? scores[e] + correction[e] : scores[e];
        if (top_groups < groups) {
          for (long g = 0; g < groups; g++) {
            float first = none, second = none;
            for (long e = g * size; e < (g + 1) * size; e++) {
              second = std::max(second, std::min(first, choice[e]));
              first = std::max(first, choice[e]);
            }
            of_group[g] = best_two ? first + second : first;
          }
          best(of_group, top_groups, ranking);
          for (long i = top_groups; i < groups; i++)
            std::fill_n(choice.begin() + ranking[i].second * size, size, none);
        }
        best(choice, top_k, ranking);
        float *w = weights + t * top_k, total = 0;
        for (long j = 0; j < top_k; j++) {
          ids[t * top_k + j] = ranking[j].second;
          w[j] = scores[ranking[j].second];
        }
        if (scoring == SOFTMAX_OF_CHOSEN) softmax(w, top_k);
        for (long j = 0; j < top_k; j++) total += w[j];
        for (long j = 0; j < top_k; j++) w[j] = (normalise ? w[j] / (total + 1e-20f) : w[j]) * scale;
      }
    }
  });
}
CALLABLE(route)
