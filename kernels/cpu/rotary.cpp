// rotary_store_kv and store_kv: `kernels/eager.py`.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "calls.h"
#include "vector.h"

constexpr long AHEAD = 3;  // tokens

// NaN and infinities as zeros: what is not finite differs from itself once zero times it is added.
static inline vfloat finite(vfloat v) { return (v - v) == (v - v) ? v : vfloat{}; }
static inline float finite(float v) { return (v - v) == (v - v) ? v : 0.0f; }

template <class T, bool CLEAN, class V> static void put(T* out, V v) { store(out, CLEAN ? finite(rounded<T>(v)) : v); }

// One head. Pair i is (i, i + width), or (2i, 2i + 1) if interleaved; what is beyond the pairs is copied.
template <class T, bool CLEAN>
static void rotate(const T* x, T* out, const T* cos, const T* sin, long width, long head_dim, bool interleaved) {
  auto pair = [&](long i, long first, long second, auto form) {
    auto a = load(x + first, form), b = load(x + second, form), c = load(cos + i, form), s = load(sin + i, form);
    put<T, CLEAN>(out + first, a * c - b * s);
    put<T, CLEAN>(out + second, b * c + a * s);
  };
  if (interleaved)
    for (long i = 0; i < width; i++) pair(i, 2 * i, 2 * i + 1, 0.0f);
  else
    each(width, [&](long i, auto form) { pair(i, i, width + i, form); });
  each(head_dim - 2 * width, [&](long i, auto form) {
    put<T, CLEAN>(out + 2 * width + i, load(x + 2 * width + i, form));
  });
}

// A token's heads, `stride` elements apart, as one row of their slot.
template <class T> static void store_heads(const T* x, T* out, long heads, long head_dim, long stride) {
  for (long h = 0; h < heads; h++)
    each(head_dim, [&](long i, auto form) { store(out + h * head_dim + i, finite(load(x + h * stride + i, form))); });
}

// query, key, value: tokens and heads by their strides, value null if only keys are stored; cos, sin: [positions, width];
// caches: [slots, kv_heads, head_dim or value_dim]; slot -1 is not stored; out: [num_tokens, heads, head_dim].
extern "C" void rotary_store_kv(int dtype, const void* query, const void* key, const void* value, const void* cos,
                                const void* sin, const int64_t* positions, void* key_cache, void* value_cache,
                                const int64_t* slots, void* out, long num_tokens, long heads, long kv_heads,
                                long head_dim, long value_dim, long width, long query_token, long query_head,
                                long key_token, long key_head, long value_token, long value_head, int interleaved,
                                int threads) {
  by_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const long key_row = kv_heads * head_dim, value_row = kv_heads * value_dim;
#pragma omp parallel for num_threads(threads) if (num_tokens * (heads + 2 * kv_heads) * head_dim > SERIAL)
    for (long t = 0; t < num_tokens; t++) {
      // A batch's slots lie all over the cache, and a store that waits keeps others waiting.
      const long ahead = std::min(t + AHEAD, num_tokens - 1);
      if (slots[ahead] >= 0) {
        bring<true>((const T*)key_cache + slots[ahead] * key_row, key_row * sizeof(T));
        if (value) bring<true>((const T*)value_cache + slots[ahead] * value_row, value_row * sizeof(T));
      }
      const T *c = (const T*)cos + positions[t] * width, *s = (const T*)sin + positions[t] * width;
      const T *q = (const T*)query + t * query_token, *k = (const T*)key + t * key_token;
      T* o = (T*)out + t * heads * head_dim;
      for (long h = 0; h < heads; h++)
        rotate<T, false>(q + h * query_head, o + h * head_dim, c, s, width, head_dim, interleaved);
      if (slots[t] < 0) continue;
      T* kc = (T*)key_cache + slots[t] * key_row;
      for (long h = 0; h < kv_heads; h++)
        rotate<T, true>(k + h * key_head, kc + h * head_dim, c, s, width, head_dim, interleaved);
      if (!value) continue;
      store_heads((const T*)value + t * value_token, (T*)value_cache + slots[t] * value_row, kv_heads, value_dim,
                  value_head);
    }
  });
}

// As above.
extern "C" void store_kv(int dtype, const void* key, const void* value, void* key_cache, void* value_cache,
                         const int64_t* slots, long num_tokens, long kv_heads, long head_dim, long value_dim,
                         long key_token, long key_head, long value_token, long value_head, int threads) {
  by_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel for num_threads(threads) if (num_tokens * kv_heads * (head_dim + value_dim) > SERIAL)
    for (long t = 0; t < num_tokens; t++) {
      if (slots[t] < 0) continue;
      store_heads((const T*)key + t * key_token, (T*)key_cache + slots[t] * kv_heads * head_dim, kv_heads, head_dim,
                  key_head);
      store_heads((const T*)value + t * value_token, (T*)value_cache + slots[t] * kv_heads * value_dim, kv_heads,
                  value_dim, value_head);
    }
  });
}
CALLABLE(rotary_store_kv)
CALLABLE(store_kv)
