// The sampler's ops: `kernels/eager_sample.py`.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "calls.h"
#include "vector.h"

constexpr float NEVER = -std::numeric_limits<float>::infinity();
constexpr long TILE = 4096;  // tokens of a row that one thread looks at

// The natural logarithm of positive normal numbers, to about 1 unit in the last place (Cephes' logf: x = 2^e m, a
// polynomial in m - 1, which is between sqrt(1/2) and sqrt(2)).
static inline vfloat log(vfloat x) {
  vint e = ((vint)x - 0x3F3504F3) >> 23;
  vfloat f = (vfloat)((vint)x - (e << 23)) - 1.0f, n = __builtin_convertvector(e, vfloat), z = f * f;
  vfloat p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  return f + (p * f * z - n * 2.12194440e-4f - 0.5f * z) + n * 0.693359375f;
}

static inline vuint mix32(vuint bits) {
  bits ^= bits >> 16;
  bits *= 0x7FEB352Du;
  bits ^= bits >> 15;
  bits *= 0x846CA68Bu;
  return bits ^ (bits >> 16);
}

// From 0 to 1, by a key's two words and tokens; neither end is reached.
static inline vfloat uniform(uint32_t first, uint32_t second, vuint token_ids) {
  vuint bits = mix32(mix32(token_ids * 0x9E3779B9u + first) ^ second);
  vfloat u = (__builtin_convertvector((vint)(bits >> 1), vfloat) + 0.5f) * 0x1p-31f;
  vfloat largest = splat(1 - 0x1p-24f);
  return u > largest ? largest : u;
}

// Noise of uniform numbers. Whole vectors only, and one piece of code for all that call it, so that a token has the same
// noise wherever it stands.
__attribute__((noinline)) static vfloat gumbel(vfloat u) {
  // -log1p(-u) = log(w) * u / (w - 1) with w = 1 - u as rounded, whose error both factors share (Kahan, in Goldberg
  // 1991, theorem 4).
  vfloat rest = 1.0f - u, gap = rest - 1.0f;
  vint whole = gap == 0.0f;
  vfloat exponential = log(rest) * (u / (whole ? splat(-1.0f) : gap));
  return -log(whole ? u : exponential);
}

// What noise stays below: -log(-log(1 - u)) <= -log(u), of which only the exponent is looked at.
static inline vfloat most_noise(vfloat u) {
  return __builtin_convertvector(127 - ((vint)u >> 23), vfloat) * 0.6931473f + 1e-3f;
}
constexpr float MOST_NOISE = 22.5f;  // of the smallest number, 2^-32

static inline bool any(vint mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#else
  int32_t found = 0;
  for (int i = 0; i < W; i++) found |= mask[i];
  return found;
#endif
}

static inline vint lanes() {
  vint v;
  for (int i = 0; i < W; i++) v[i] = i;
  return v;
}

// keys: [rows, 2]; token_ids: [n], or [rows, n] where ids_row is n and not 0; out: [rows, n].
extern "C" void counter_noise(const void* keys, const void* token_ids, void* out, long rows, long n, long ids_row,
                              int threads) {
#pragma omp parallel for num_threads(threads) if (rows * n > SERIAL)
  for (long r = 0; r < rows; r++) {
    const uint32_t* key = (const uint32_t*)keys + 2 * r;
    const uint32_t* ids = (const uint32_t*)token_ids + r * ids_row;
    float* to = (float*)out + r * n;
    for (long i = 0; i < n; i += W) {
      long count = n - i < W ? n - i : W;
      vuint some = {};
      std::memcpy(&some, ids + i, 4 * count);
      vfloat noise = gumbel(uniform(key[0], key[1], some));
      std::memcpy(to + i, &noise, 4 * count);
    }
  }
}

struct Best {
  float value;
  long place;
};

// Of equals the first; NaN is above all.
static inline bool beats(float a, float b) { return a > b || (a != a && b == b); }

// The noise, which takes most of the time, is made of those tokens only that could win by it.
static Best best_of(const float* logits, float temperature, const uint32_t* key, uint32_t start, long n) {
  float floor = NEVER;  // the best of all lanes
  vfloat best = splat(floor);
  vint places = {}, at = lanes();
  for (long i = 0; i < n; i += W, at += W) {
    vfloat scores = splat(NEVER);
    if (n - i >= W) scores = load(logits + i);
    else std::memcpy(&scores, logits + i, 4 * (n - i));
    if (temperature) {
      scores = scores / temperature;
      if (!any(~(scores + MOST_NOISE <= floor))) continue;  // nor is NaN passed over
      vfloat u = uniform(key[0], key[1], (vuint)at + start);
      if (!any(~(scores + most_noise(u) <= floor))) continue;
      scores += gumbel(u);
    }
    vint better = (scores > best) | ((scores != scores) & (best == best));
    best = better ? scores : best;
    places = better ? at : places;
    if (temperature && any(better))
      for (int j = 0; j < W; j++) floor = best[j] > floor ? best[j] : floor;
  }
  Best found = {best[0], places[0]};
  for (int i = 1; i < W; i++)
    if (beats(best[i], found.value) || (!beats(found.value, best[i]) && places[i] < found.place))
      found = {best[i], places[i]};
  return found;
}

// logits: [rows, n], of tokens from `start` on; temperatures: [rows]; keys: [rows, 2]; values, token_ids: [rows].
extern "C" void sample_shard(const void* logits, const void* temperatures, const void* keys, void* values,
                             void* token_ids, long rows, long n, long stride, long start, int threads) {
  long tiles = (n + TILE - 1) / TILE;
  std::vector<Best> found(rows * tiles);
#pragma omp parallel for num_threads(threads) if (rows * n > SERIAL)
  for (long t = 0; t < rows * tiles; t++) {
    long r = t / tiles, first = t % tiles * TILE, count = n - first < TILE ? n - first : TILE;
    found[t] = best_of((const float*)logits + r * stride + first, ((const float*)temperatures)[r],
                       (const uint32_t*)keys + 2 * r, uint32_t(start + first), count);
    found[t].place += first;
  }
  for (long r = 0; r < rows; r++) {
    Best best = found[r * tiles];
    for (long t = 1; t < tiles; t++)
      if (beats(found[r * tiles + t].value, best.value)) best = found[r * tiles + t];
    ((float*)values)[r] = best.value;
    ((int64_t*)token_ids)[r] = start + best.place;
  }
}

// Of one row: the `count` likeliest, in their order, and the log of the sum of exp.
static float likeliest_of(const float* logits, long n, long count, float* values, int64_t* places) {
  // The maxima of at least 4 * count groups (a lane of some vectors each), as far as there are so many elements: the
  // count-th largest of them is not above the count-th largest element, and not far below.
  long vectors = (n + W - 1) / W, wanted = (4 * count + W - 1) / W, size = std::max(1L, vectors / wanted);
  long num_groups = (vectors + size - 1) / size;
  auto part = [&](long v) {
    vfloat x = splat(NEVER);
    if ((v + 1) * W <= n) x = load(logits + v * W);
    else std::memcpy(&x, logits + v * W, 4 * (n - v * W));
    return x;
  };
  std::vector<float> maxima(num_groups * W);
  for (long g = 0; g < num_groups; g++) {
    vfloat most = splat(NEVER);
    for (long v = g * size; v < std::min(vectors, (g + 1) * size); v++) {
      vfloat x = part(v);
      most = x > most ? x : most;
    }
    std::memcpy(&maxima[g * W], &most, sizeof most);
  }
  float top = *std::max_element(maxima.begin(), maxima.end()), least = NEVER;
  if (count < (long)maxima.size()) {
    std::nth_element(maxima.begin(), maxima.begin() + count - 1, maxima.end(), std::greater<float>());
    least = maxima[count - 1];
  }
  std::vector<std::pair<float, long>> found;
  double sum = 0;
  for (long g = 0; g < num_groups; g++) {
    vfloat sums = {};
    for (long v = g * size; v < std::min(vectors, (g + 1) * size); v++) {
      vfloat x = part(v);
      sums += exp(x - top);
      if (!any((x >= least) & (x > NEVER))) continue;
      for (int i = 0; i < W; i++)
        if (x[i] >= least && x[i] > NEVER) found.push_back({x[i], v * W + i});
    }
    for (int i = 0; i < W; i++) sum += sums[i];
  }
  auto before = [](const auto& a, const auto& b) { return a.first != b.first ? a.first > b.first : a.second < b.second; };
  long num_found = std::min(count, (long)found.size());
  std::partial_sort(found.begin(), found.begin() + num_found, found.end(), before);
  for (long i = 0; i < count; i++) {
    values[i] = i < num_found ? found[i].first : NEVER;
    places[i] = i < num_found ? found[i].second : 0;
  }
  return std::isinf(top) ? top : float(top + std::log(sum));
}

// logits: [rows, n], contiguous; values, places: [rows, count]; masses: [rows].
extern "C" void likeliest(const void* logits, void* values, void* places, void* masses, long rows, long n, long count,
                          int threads) {
#pragma omp parallel for num_threads(threads) if (rows * n > SERIAL)
  for (long r = 0; r < rows; r++)
    ((float*)masses)[r] = likeliest_of((const float*)logits + r * n, n, count, (float*)values + r * count,
                                       (int64_t*)places + r * count);
}

// Of one row: the place of the token that is drawn, and whether every token that is kept is among the n.
static std::pair<long, bool> draw_of(const float* values, const int64_t* token_ids, double mass, double floor, double top_k,
                                     double top_p, double min_p, const uint32_t* key, long n) {
  bool nothing_missing = std::isinf(floor) && floor < 0, is_all = std::isinf(top_k);
  double kth = values[is_all || top_k > n ? n - 1 : long(top_k) - 1];
  long count = 0;  // of the first ones, which top-k keeps: equals of the k-th stay
  while (count < n && (count < top_k || values[count] >= kth)) count++;
  if (!is_all) {
    double sum = 0;
    for (long i = 0; i < count; i++) sum += std::exp(double(values[i]) - values[0]);
    mass = values[0] + std::log(sum);
  }
  double total = 0, least = values[0] + std::log(min_p);
  long kept = 0;
  for (; kept < count; kept++) {
    double value = values[kept];
    if (!(value >= least && value > NEVER)) break;
    double probability = top_p < 1 ? std::exp(value - mass) : 0;
    total += probability;
    if (kept && top_p < 1 && !(total - probability < top_p)) break;
  }
  bool complete = nothing_missing || ((!kept || values[kept - 1] > floor) && (is_all || kth > floor));
  Best best = {NEVER, 0};
  for (long i = 0; i < kept; i += W) {
    vuint ids = {};
    for (long j = 0; j < W && i + j < kept; j++) ids[j] = uint32_t(token_ids[i + j]);
    vfloat noise = gumbel(uniform(key[0], key[1], ids));
    for (long j = 0; j < W && i + j < kept; j++)
      if (float score = values[i + j] + noise[j]; beats(score, best.value)) best = {score, i + j};
  }
  return {best.place, complete};
}

// values: [rows, n], descending; token_ids: [rows, n]; mass, floor: [rows]; filters: [3, rows], top-k (inf: off), top-p and
// min-p; keys: [rows, 2]; drawn, complete: [rows].
extern "C" void draw_filtered(const void* values, const void* token_ids, const void* mass, const void* floor,
                              const void* filters, const void* keys, void* drawn, void* complete, long rows, long n,
                              int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 4)
  for (long r = 0; r < rows; r++) {
    const int64_t* ids = (const int64_t*)token_ids + r * n;
    const double* filter = (const double*)filters + r;
    auto [place, is_complete] = draw_of((const float*)values + r * n, ids, ((const double*)mass)[r], ((const double*)floor)[r],
                                        filter[0], filter[rows], filter[2 * rows], (const uint32_t*)keys + 2 * r, n);
    ((int64_t*)drawn)[r] = ids[place];
    ((bool*)complete)[r] = is_complete;
  }
}

// logits: [.., n], of tokens from `start` on; rows: which of them each mask is for, null: the first, the second, ...;
// mask: [num_masks, words], bit i % 32 of word i // 32 for token i.
extern "C" void apply_bitmask(void* logits, const void* rows, const void* mask, long num_masks, long words, long n,
                              long start, int threads) {
#pragma omp parallel for num_threads(threads) if (num_masks * n > SERIAL)
  for (long m = 0; m < num_masks; m++) {
    const uint32_t* bits = (const uint32_t*)mask + m * words;
    float* row = (float*)logits + (rows ? ((const int64_t*)rows)[m] : m) * n;
    for (long i = 0; i < n;) {
      long token = start + i, shift = token % 32, count = 32 - shift < n - i ? 32 - shift : n - i;
      uint32_t some = bits[token / 32] >> shift;
      if (some == 0 && count == 32) {
        for (int j = 0; j < 32; j++) row[i + j] = NEVER;
      } else if (~some) {
        for (long j = 0; j < count; j++)
          if (!(some >> j & 1)) row[i + j] = NEVER;
      }
      i += count;
    }
  }
}
CALLABLE(counter_noise)
CALLABLE(sample_shard)
CALLABLE(apply_bitmask)
CALLABLE(draw_filtered)
CALLABLE(likeliest)
