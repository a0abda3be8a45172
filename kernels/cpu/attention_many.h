// Paged attention of many rows (prefill): vectors lie along the rows. Queries are transposed once for all keys, keys
// and values are broadcast, and nothing is ever summed across a vector. Products are taken in steps (`product.h`).
#pragma once
#include <algorithm>

#include "attention.h"
#include "product.h"

constexpr int NV = W == 16 ? 6 : 2;  // vectors of rows: with 4 keys or values beside, what registers hold
constexpr int ROWS = NV * W;
constexpr int TILE_KEYS = 128;  // taken at a time

template <class T> struct Tile {  // what a thread works on
  typedef typename Step<T>::Row Row;
  alignas(64) Row query[MAX_HEAD_DIM * ROWS];        // [step][ROWS][N]
  alignas(64) float scores[TILE_KEYS * ROWS];        // [key][ROWS]
  alignas(64) Row weights[TILE_KEYS * ROWS];         // [step][ROWS][N], as a step takes N keys
  alignas(64) float out[MAX_HEAD_DIM * ROWS];        // [value_dim][ROWS]
  alignas(64) Row keys[TILE_KEYS * MAX_HEAD_DIM];    // converted, where they cannot be read in place
  alignas(64) Row values[TILE_KEYS * MAX_HEAD_DIM];  // [step][value_dim][N]
};

// Keys or values taken at once with V vectors of rows: as many as hide an addition's latency. W is a multiple of 4.
constexpr int at_once(int V) { return W == 16 ? (V <= 3 ? 8 : 4) : W == 8 && V == 1 ? 8 : 4; }

// Keeps the compiler from loading x anew at each use, which would take as long as multiplying.
template <class X> static inline X in_register(X x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#endif
  return x;
}

// c[j][row] = c[j][row] * scale[row] (0 without) + sum over steps of a(j, step) * b[step][row] for J rows, of which `a` says
// where they are. highest: of each row of c, if asked for.
template <class T, int V, int J, class A>
static inline void multiply(float* c, A a, const typename Step<T>::Row* b, int steps, const vfloat* scale,
                            vfloat* highest = nullptr) {
  typedef Step<T> S;
  vfloat sums[J][V];
  for (int j = 0; j < J; j++)
    for (int v = 0; v < V; v++) sums[j][v] = scale ? load(c + j * ROWS + v * W) * scale[v] : vfloat{};
  for (int k = 0; k < steps; k++, b += ROWS * S::N) {
    decltype(S::vector(b)) row[V];
    for (int v = 0; v < V; v++) row[v] = in_register(S::vector(b + v * W * S::N));
    for (int j = 0; j < J; j++) {
      const auto x = S::row(a(j, k));
      for (int v = 0; v < V; v++) sums[j][v] = S::add(sums[j][v], x, row[v]);
    }
  }
  for (int j = 0; j < J; j++)
    for (int v = 0; v < V; v++) store(c + j * ROWS + v * W, sums[j][v]);
  if (highest)
    for (int v = 0; v < V; v++)
      for (int j = 0; j < J; j++) highest[v] = max(highest[v], sums[j][v]);
}

// The weights of a step's keys, as the product takes them.
static inline void put(float* to, const vfloat* weights) { store(to, weights[0]); }
#if defined(__AVX512BF16__)
static inline void put(bfloat16* to, const vfloat* weights) {
  const __m512i one_after_the_other = (__m512i)_mm512_cvtne2ps_pbh((__m512)weights[1], (__m512)weights[0]);
  const __m512i in_turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                            21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i pairs = _mm512_permutexvar_epi16(in_turns, one_after_the_other);
  std::memcpy(to, &pairs, sizeof pairs);
}
#endif

struct ManyTask { long sequence, kv_head, row; int rows; };

template <class T, int V>
void pack_queries(const Arguments& a, const long* place, Tile<T>& tile) {
  typedef Step<T> S;
  const int steps = a.head_dim / S::N;
  for (int first = 0; first < V * W; first += W) {
    const typename S::Row* from[W];
    for (int r = 0; r < W; r++)
      from[r] = as_row((const T*)a.query + place[first + r] * a.head_dim, a.head_dim, a.head_dim, tile.keys + r * a.head_dim);
    for (int step = 0; step < steps; step += W) {
      const int count = std::min(W, steps - step);
      vfloat square[W] = {};  // a step as one lane
      for (int r = 0; r < W; r++)
        if (count == W) square[r] = load_as<vfloat>(from[r] + step * S::N);
        else std::memcpy(&square[r], from[r] + step * S::N, 4 * count);
      transpose(square);
      for (int s = 0; s < count; s++)
        std::memcpy(tile.query + ((step + s) * ROWS + first) * S::N, &square[s], sizeof(vfloat));
    }
  }
}

// The values of `count` keys, with zeros for what a step is short of.
template <class T> void pack_values(const T* const* values, int count, int value_dim, typename Step<T>::Row* to) {
  constexpr int N = Step<T>::N;
  for (int n = 0; n < count; n += N, to += value_dim * N)
    for (int i = 0; i < value_dim; i += W)
      if constexpr (N == 1) {
        store(to + i, load(values[n] + i));
      } else {
        vuint pair = widened(values[n] + i);
        if (n + 1 < count) pair |= widened(values[n + 1] + i) << 16;
        std::memcpy(to + i * N, &pair, sizeof pair);
      }
}

// `count` keys as `Step` reads them, the last one again up to a multiple of `multiple`: in place, or converted.
template <class T>
static const typename Step<T>::Row* const* rows_of(const T** keys, int count, int multiple, int head_dim,
                                                   typename Step<T>::Row* scratch, const typename Step<T>::Row** converted) {
  const int padded = (count + multiple - 1) / multiple * multiple;
  std::fill(keys + count, keys + padded, keys[count - 1]);
  if constexpr (std::is_same_v<T, typename Step<T>::Row>) return keys;
  for (int n = 0; n < padded; n++) converted[n] = as_row(keys[n], head_dim, head_dim, scratch + n * head_dim);
  return converted;
}

// The running softmax over `count` scores of each row, of which the highest are given; decay: what earlier weights shrink
// by; maximum: of exponents.
template <class T, int V>
static inline void weigh(Tile<T>& tile, int count, float to_exponent, vfloat* highest, vfloat* maximum, vfloat* total,
                         vfloat* decay) {
  typedef Step<T> S;
  const int padded = (count + S::N - 1) / S::N * S::N;
  for (int n = count; n < padded; n++)
    for (int v = 0; v < V; v++) store(tile.scores + n * ROWS + v * W, splat(-INFINITY));
  vfloat sums[V];
  for (int v = 0; v < V; v++) sums[v] = vfloat{};
  for (int v = 0; v < V; v++) {
    highest[v] = max(maximum[v], highest[v] * to_exponent);
    decay[v] = power_of_2(maximum[v] - highest[v]);
    maximum[v] = highest[v];
  }
  for (int n = 0; n < padded; n += S::N)
    for (int v = 0; v < V; v++) {
      vfloat weights[S::N];
      for (int k = 0; k < S::N; k++) {
        const vfloat s = load(tile.scores + (n + k) * ROWS + v * W);
        weights[k] = power_of_2<S::N == 2>(s * to_exponent - highest[v]);
        sums[v] += weights[k];
      }
      put(tile.weights + (n * ROWS + v * W * S::N), weights);
    }
  for (int v = 0; v < V; v++) total[v] = total[v] * decay[v] + sums[v];
}

template <class T, int V> void attend_many(const Arguments& a, const ManyTask& task, Tile<T>& tile) {
  typedef Step<T> S;
  typedef typename S::Row Row;
  constexpr int J = at_once(V);
  const Rows rows(a, task.sequence, task.kv_head);
  const Cache<T> cache(a, task.sequence, task.kv_head);
  const int head_dim = a.head_dim, value_dim = a.value_dim;
  const float to_exponent = a.to_exponent();
  const long before = a.key_lens[task.sequence] - (a.query_starts[task.sequence + 1] - rows.start);
  alignas(64) int32_t position[ROWS];
  alignas(64) float slope[ROWS] = {}, maxima[ROWS];
  long place[ROWS];
  long query = task.row / rows.group, in_group = task.row % rows.group;
  for (int r = 0; r < V * W; r++) {  // rows beyond the last are as the last, and are not written
    const long head = rows.kv_head * rows.group + in_group;
    place[r] = (rows.start + query) * rows.heads + head;
    position[r] = before + query;
    if (a.alibi_slopes) slope[r] = a.alibi_slopes[head];
    maxima[r] = a.sinks ? a.sinks[head] * LOG2_E : LOWEST;  // a sink is as a first key without value
    if (r + 1 < task.rows && ++in_group == rows.group) in_group = 0, query++;
  }
  pack_queries<T, V>(a, place, tile);
  std::fill_n(tile.out, value_dim * ROWS, 0.0f);
  vfloat maximum[V], total[V], decay[V];
  for (int v = 0; v < V; v++) maximum[v] = load(maxima + v * W), total[v] = splat(a.sinks ? 1 : 0);

  const T *keys[TILE_KEYS], *values[TILE_KEYS];
  const Row *converted[TILE_KEYS];
  const long first_query = position[0], last_query = position[V * W - 1], stop = last_query + 1;
  for (long start = a.window ? std::max(0l, first_query - a.window + 1) : 0; start < stop; start += TILE_KEYS) {
    const int count = std::min<long>(TILE_KEYS, stop - start);
    cache.find(start, count, keys, values);
    const typename S::Row* const* key_rows = rows_of(keys, count, J, head_dim, tile.keys, converted);
    // From which key on scores are to be changed: else the last ones, which some rows do not see.
    const bool all = a.changes_scores() || (a.window && start <= last_query - a.window);
    const int changed = all ? 0 : std::clamp<long>(first_query + 1 - start, 0, count) / J * J;
    vfloat highest[V];
    for (int v = 0; v < V; v++) highest[v] = splat(-INFINITY);
    for (int n = 0; n < count; n += J) {
      const Row* key[J];
      std::copy_n(key_rows + n, J, key);
      const auto at = [&](int j, int step) { return key[j] + step * S::N; };
      multiply<T, V, J>(tile.scores + n * ROWS, at, tile.query, head_dim / S::N, nullptr, n < changed ? highest : nullptr);
    }
    for (int n = changed; n < count; n++)
      for (int v = 0; v < V; v++) {
        float* s = tile.scores + n * ROWS + v * W;
        const vint key = vint{} + int32_t(start + n);
        const vfloat x = score(a, load(s), load_as<vint>(position + v * W), key, load(slope + v * W));
        store(s, x);
        highest[v] = max(highest[v], x);
      }
    weigh<T, V>(tile, count, to_exponent, highest, maximum, total, decay);
    constexpr bool in_place = std::is_same_v<T, Row> && S::N == 1;  // a step takes one value, and can where it lies
    if constexpr (!in_place) pack_values(values, count, value_dim, tile.values);
    for (int i = 0; i < value_dim; i += J) {
      const auto at = [&](int j, int step) -> const Row* {
        if constexpr (in_place) return values[step] + i + j;
        else return tile.values + (step * value_dim + i + j) * S::N;
      };
      multiply<T, V, J>(tile.out + i * ROWS, at, tile.weights, (count + S::N - 1) / S::N, decay);
    }
  }
  for (int v = 0; v < V; v++) {
    const vfloat inverse = total[v] > vfloat{} ? 1.0f / total[v] : vfloat{};
    for (int i = 0; i < value_dim; i += W) {
      vfloat square[W];
      for (int j = 0; j < W; j++) square[j] = load(tile.out + (i + j) * ROWS + v * W) * inverse;
      transpose(square);
      for (int r = 0; r < std::min(W, task.rows - v * W); r++)
        store((T*)a.out + place[v * W + r] * value_dim + i, square[r]);
    }
  }
}

template <class T> void attend_rows(const Arguments& a, const ManyTask& task, Tile<T>& tile) {
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
