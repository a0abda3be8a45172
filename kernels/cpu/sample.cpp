// The sampler's ops: `kernels/eager_sample.py`.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "calls.h"
#include "vector.h"

constexpr float NEVER = -std::numeric_limits<float>::infinity();
constexpr long TILE = 4096;  // tokens of a row that one thread looks at
constexpr int AT_ONCE = 4;  // vectors

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

// What a token's noise is made of, by a key's two words; its ids times a constant go in, so that a loop can add them up.
constexpr uint32_t STRIDE = 0x9E3779B9u;
static inline vuint noise_bits(uint32_t first, uint32_t second, vuint strided) {
  return mix32(mix32(strided + first) ^ second);
}

// From 0 to 1; neither end is reached.
static inline vfloat uniform(vuint bits) {
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

// How often noise can be halved, by its bits: with u >= 2^-(zeros + 1), noise <= -log(u) <= (zeros + 1) log 2.
static inline vfloat leading_zeros(vuint bits) {
#if defined(__AVX512CD__)
  return __builtin_convertvector((vint)_mm512_lzcnt_epi32((__m512i)bits), vfloat);
#else
  vfloat u = __builtin_convertvector((vint)(bits >> 1), vfloat);
  return __builtin_convertvector(157 - ((vint)(u + 0.5f) >> 23), vfloat);
#endif
}

static inline bool any(vint mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#else
  int32_t found = 0;
  for (int i = 0; i < W; i++) found |= mask[i];
  return found;
#endif
}

// Of each lane, whether it reaches the bound.
static inline uint32_t reaching(vfloat x, vfloat bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)bound, _CMP_GE_OQ);
#else
  vint mask = x >= bound;
  uint32_t bits = 0;
  for (int i = 0; i < W; i++) bits |= uint32_t(mask[i] != 0) << i;
  return bits;
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
      vfloat noise = gumbel(uniform(noise_bits(key[0], key[1], some * STRIDE)));
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

// A vector of what is at most n elements, and nothing after them.
template <class T> static inline vfloat load_some(const T* p, long n) {
  if (n >= W) return load(p);
  vfloat x = splat(NEVER);
  for (int i = 0; i < n; i++) x[i] = load_one(p + i);
  return x;
}

// NaN if there is one.
template <class T> static float largest(const T* x, long n) {
  vfloat most[AT_ONCE];
  vint strange = {};
  for (int j = 0; j < AT_ONCE; j++) most[j] = splat(NEVER);
  for (long i = 0; i < n; i += AT_ONCE * W)
    for (int j = 0; j < AT_ONCE && i + j * W < n; j++) {
      vfloat v = load_some(x + i + j * W, n - i - j * W);
      strange |= v != v;
      most[j] = max(v, most[j]);
    }
  if (any(strange)) return NAN;
  for (int j = 1; j < AT_ONCE; j++) most[0] = max(most[j], most[0]);
  return greatest(most[0]);
}

// Where the first one is, of any NaN if it is one; 0 if there is none.
template <class T> static long find(const T* x, long n, float value) {
  auto is_it = [&](float v) { return v == value || (v != v && value != value); };
  long place = 0;
  while (value == value && place + W <= n && !any(load(x + place) == value)) place += W;
  while (place < n && !is_it(load_one(x + place))) place++;
  return place < n ? place : 0;
}

// The noise is made of those tokens only that may win by it over `floor`, a score that some token has.
template <class T>
static Best best_drawn(const T* logits, float temperature, const uint32_t* key, uint32_t start, long n, float floor) {
  vfloat best = splat(NEVER);
  vint places = {};
  vuint strided = ((vuint)lanes() + start) * STRIDE;
  for (long i = 0; i < n; i += AT_ONCE * W, strided += AT_ONCE * W * STRIDE) {
    // A token cannot win if x / temperature + (zeros + 1) log 2 < floor, by more than is lost to rounding.
    float halvings = (floor - std::abs(floor) * 0x1p-20f - 1e-3f) * LOG2_E - 1, slope = LOG2_E / temperature;
    vint may_win = {};
    for (int j = 0; j < AT_ONCE && i + j * W < n; j++) {
      vuint bits = noise_bits(key[0], key[1], strided + j * W * STRIDE);
      may_win |= ~(leading_zeros(bits) <= halvings - load_some(logits + i + j * W, n - i - j * W) * slope);
    }
    if (!any(may_win)) continue;
    for (int j = 0; j < AT_ONCE && i + j * W < n; j++) {
      vuint bits = noise_bits(key[0], key[1], strided + j * W * STRIDE);
      vfloat scores = load_some(logits + i + j * W, n - i - j * W);
      if (!any(~(leading_zeros(bits) <= halvings - scores * slope))) continue;
      scores = scores / temperature + gumbel(uniform(bits));
      vint better = (scores > best) | ((scores != scores) & (best == best));
      best = better ? scores : best;
      places = better ? lanes() + int(i + j * W) : places;
      for (int k = 0; k < W; k++) floor = best[k] > floor ? best[k] : floor;
    }
  }
  Best found = {best[0], places[0]};
  for (int i = 1; i < W; i++)
    if (beats(best[i], found.value) || (!beats(found.value, best[i]) && places[i] < found.place))
      found = {best[i], places[i]};
  return found;
}

// logits: [rows, n], of tokens from `start` on; temperatures: [rows]; keys: [rows, 2]; values, token_ids: [rows].
template <class T>
static void sample(const T* logits, const float* temperatures, const uint32_t* keys, float* values, int64_t* token_ids, long rows,
                   long n, long stride, long start, int threads) {
  long tiles = (n + TILE - 1) / TILE;
  std::vector<Best> found(rows * tiles);
#pragma omp parallel num_threads(threads) if (rows * n > SERIAL)
  {
    long row = -1;
    float floor = NEVER;  // what the row's tiles have that were this thread's
#pragma omp for
    for (long t = 0; t < rows * tiles; t++) {
      long r = t / tiles, first = t % tiles * TILE, count = n - first < TILE ? n - first : TILE;
      const T* from = logits + r * stride + first;
      if (float temperature = temperatures[r]) {
        floor = r == row ? floor : NEVER, row = r;
        found[t] = best_drawn(from, temperature, keys + 2 * r, uint32_t(start + first), count, floor);
        floor = found[t].value > floor ? found[t].value : floor;
      } else {
        found[t] = {largest(from, count), 0};  // its place is looked for if it is the row's
      }
    }
  }
#pragma omp parallel for num_threads(threads) if (rows * TILE > 4 * SERIAL)
  for (long r = 0; r < rows; r++) {
    const Best* of_row = found.data() + r * tiles;
    long tile = 0;
    for (long t = 1; t < tiles; t++)
      if (beats(of_row[t].value, of_row[tile].value)) tile = t;
    values[r] = of_row[tile].value;
    token_ids[r] = start + tile * TILE + of_row[tile].place;
    if (!temperatures[r]) token_ids[r] += find(logits + r * stride + tile * TILE, n - tile * TILE, values[r]);
  }
}

extern "C" void sample_shard(int dtype, const void* logits, const float* temperatures, const uint32_t* keys, float* values,
                             int64_t* token_ids, long rows, long n, long stride, long start, int threads) {
  by_dtype(dtype, [&](auto* type) {
    sample((decltype(type))logits, temperatures, keys, values, token_ids, rows, n, stride, start, threads);
  });
}

// Numbers in the order of the floats, but for NaN, and of equals the first place last.
static inline uint64_t ranked(float x, uint32_t place) {
  uint32_t bits;
  x += 0.0f;  // of -0, 0
  std::memcpy(&bits, &x, 4);
  return uint64_t(bits ^ (bits >> 31 ? ~0u : 1u << 31)) << 32 | uint32_t(~place);
}
static inline float value_of(uint64_t ranked) {
  uint32_t bits = ranked >> 32;
  bits ^= bits >> 31 ? 1u << 31 : ~0u;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The sum of exp over numbers that come a few vectors at a time, and are multiplied by `slope`.
struct Mass {
  float slope, top = NEVER;
  double sum = 0;

  template <class Part> void add(vfloat most, long first, long stop, Part part) {
    float before = top;
    for (int i = 0; i < W; i++) top = most[i] > top ? most[i] : top;
    if (top == NEVER) return;
    if (sum && top > before) sum *= std::exp((double(before) - top) * slope);
    vfloat sums = {};
    for (long v = first; v < stop; v++) sums += power_of_2((part(v) - top) * (slope * LOG2_E));
    for (int i = 0; i < W; i++) sum += sums[i];
  }
};

// Where a float stands in the order of all, and which stands there.
static inline int32_t place_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits ^ (bits >> 31 & 0x7FFFFFFF);
}
static inline float at_place(int32_t place) {
  int32_t bits = place ^ (place >> 31 & 0x7FFFFFFF);
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// What at least `count` of the elements are not below, and not many more. There are as many, and no NaN.
static float bound_of(const vfloat* x, long vectors, long count) {
  int64_t low = place_of(NEVER), high = place_of(-NEVER) + 1;  // from -inf on: enough are not below `low`
  while (high - low > 1) {
    int64_t middle = (low + high) >> 1;
    const vfloat bound = splat(at_place(middle));
    long above = 0;
    for (long v = 0; v < vectors; v++) above += __builtin_popcount(reaching(x[v], bound));
    (above >= count ? low : high) = middle;
    if (above >= count && above <= count + count / 8) break;
  }
  return at_place(low);
}

typedef uint64_t vlong __attribute__((vector_size(4 * W)));

// Puts the `count` greatest first, in their order; all are different, and none is 0.
static void sort_greatest(std::vector<uint64_t>& x, long count) {
  constexpr long FEW = 16 * W, N = W / 2;  // of so few, counting for each how many are greater is faster
  const long size = x.size();
  if (size > FEW) {
    std::nth_element(x.begin(), x.begin() + count, x.end(), std::greater<uint64_t>());
    std::sort(x.begin(), x.begin() + count, std::greater<uint64_t>());
    return;
  }
  uint64_t given[FEW + N] = {};
  std::copy(x.begin(), x.end(), given);
  for (long i = 0; i < size; i += N) {
    const vlong some = load_as<vlong>(given + i);
    vlong greater = {};
    for (long j = 0; j < size; j++) greater -= (vlong)(given[j] > some);
    for (long k = 0; k < N && i + k < size; k++) x[greater[k]] = some[k];
  }
}

// Of one row: the `count` likeliest over the temperature, in their order; `limits` as `eager_sample.likeliest` has them.
template <class T>
static void likeliest_of(const T* logits, float temperature, long n, long count, bool with_mass, float* values,
                         int64_t* places, double* limits) {
  // The maxima of at least 4 * count groups (a lane of some vectors each), as far as there are so many elements: what
  // `count` of them are not below, as many elements are not, and not many more.
  long vectors = (n + W - 1) / W, wanted = (4 * count + W - 1) / W, size = std::max(1L, vectors / wanted);
  long num_groups = (vectors + size - 1) / size, block = std::max(1L, 64 / size);  // groups of a sum
  auto part = [&](long v) { return load_some(logits + v * W, n - v * W); };
  std::vector<vfloat> maxima(num_groups);
  Mass mass = {1 / temperature};
  for (long b = 0; b < num_groups; b += block) {
    long stop = std::min(num_groups, b + block);
    vfloat most = splat(NEVER);
    for (long g = b; g < stop; g++) {
      vfloat own = splat(NEVER), other = own;  // two, for speed
      long v = g * size, end = std::min(vectors, (g + 1) * size);
      for (; v + 2 <= end; v += 2) own = max(part(v), own), other = max(part(v + 1), other);
      if (v < end) own = max(part(v), own);
      maxima[g] = max(other, own), most = max(maxima[g], most);
    }
    if (with_mass) mass.add(most, b * size, std::min(vectors, stop * size), part);
  }
  float least = count < num_groups * W ? bound_of(maxima.data(), num_groups, count) : NEVER;
  const vfloat bound = splat(std::max(least, std::numeric_limits<float>::lowest()));  // above NEVER
  std::vector<uint64_t> found;
  found.reserve(2 * count);
  for (long g = 0; g < num_groups; g++) {
    if (!reaching(maxima[g], bound)) continue;
    for (long v = g * size; v < std::min(vectors, (g + 1) * size); v++)
      for (uint32_t in = reaching(part(v), bound); in; in &= in - 1) {
        long place = v * W + __builtin_ctz(in);
        found.push_back(ranked(load_one(logits + place) / temperature, place));
      }
  }
  long num_found = std::min(count, (long)found.size());
  sort_greatest(found, num_found);
  for (long i = 0; i < count; i++) {
    values[i] = i < num_found ? value_of(found[i]) : NEVER;
    places[i] = i < num_found ? uint32_t(~found[i]) : 0;
  }
  limits[0] = !with_mass ? 0 : std::isinf(mass.top) ? mass.top : mass.top / temperature + std::log(mass.sum);
  limits[1] = count < n ? values[count - 1] : NEVER;
}

// logits: [rows, n], contiguous; temperatures: [rows]; values, places: [rows, count]; limits: [rows, 2].
extern "C" void likeliest(int dtype, const void* logits, const float* temperatures, float* values, int64_t* places,
                          double* limits, long rows, long n, long count, int with_mass, int threads) {
  by_dtype(dtype, [&](auto* type) {
    auto from = (decltype(type))logits;
#pragma omp parallel for num_threads(threads) if (rows * n > SERIAL)
    for (long r = 0; r < rows; r++)
      likeliest_of(from + r * n, temperatures[r], n, count, with_mass, values + r * count, places + r * count, limits + 2 * r);
  });
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
    vfloat noise = gumbel(uniform(noise_bits(key[0], key[1], ids * STRIDE)));
    for (long j = 0; j < W && i + j < kept; j++)
      if (float score = values[i + j] + noise[j]; beats(score, best.value)) best = {score, i + j};
  }
  return {best.place, complete};
}

// values: [rows, n], descending; token_ids: [rows, n]; limits: [rows, 2]; filters: [3, rows], top-k (inf: off), top-p and
// min-p; keys: [rows, 2]; drawn: [2, rows], token ids and whether they are final.
extern "C" void draw_filtered(const void* values, const void* token_ids, const void* limits, const void* filters,
                              const void* keys, void* drawn, long rows, long n, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 4)
  for (long r = 0; r < rows; r++) {
    const int64_t* ids = (const int64_t*)token_ids + r * n;
    const double *limit = (const double*)limits + 2 * r, *filter = (const double*)filters + r;
    auto [place, is_complete] = draw_of((const float*)values + r * n, ids, limit[0], limit[1], filter[0], filter[rows],
                                        filter[2 * rows], (const uint32_t*)keys + 2 * r, n);
    ((int64_t*)drawn)[r] = ids[place];
    ((int64_t*)drawn)[rows + r] = is_complete;
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
