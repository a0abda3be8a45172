// rotary_store_kv: `kernels/eager.py`.
#include <cmath>
#include <type_traits>

#include "vector.h"

// NaN and infinities as zeros: what is not finite differs from itself once zero times it is added.
static inline vfloat finite(vfloat v) { return (v - v) == (v - v) ? v : vfloat{}; }
static inline float finite(float v) { return (v - v) == (v - v) ? v : 0.0f; }

template <class T, bool CLEAN>
static void rotate(const T* x, T* out, const T* cos, const T* sin, long half) {
  long i = 0;
  for (; i + W <= half; i += W) {
    vfloat a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    vfloat first = a * c - b * s, second = b * c + a * s;
    store(out + i, CLEAN ? finite(rounded<T>(first)) : first);
    store(out + half + i, CLEAN ? finite(rounded<T>(second)) : second);
  }
  for (; i < half; i++) {
    float a = load_one(x + i), b = load_one(x + half + i), c = load_one(cos + i), s = load_one(sin + i);
    float first = a * c - b * s, second = b * c + a * s;
    store_one(out + i, CLEAN ? finite(rounded<T>(first)) : first);
    store_one(out + half + i, CLEAN ? finite(rounded<T>(second)) : second);
  }
}

// query, key, value: a row of heads for each token, `stride_*` elements apart; cos, sin: [positions, head_dim / 2];
// caches: [slots, kv_heads, head_dim]; out: [num_tokens, heads, head_dim].
extern "C" void rotary_store_kv(int dtype, const void* query, const void* key, const void* value, const void* cos,
                                const void* sin, const int64_t* positions, void* key_cache, void* value_cache,
                                const int64_t* slots, void* out, long num_tokens, long heads, long kv_heads,
                                long head_dim, long stride_query, long stride_key, long stride_value, int threads) {
  by_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const long half = head_dim / 2, row = kv_heads * head_dim;
#pragma omp parallel for num_threads(threads) if (num_tokens * (heads + 2 * kv_heads) * head_dim > SERIAL)
    for (long t = 0; t < num_tokens; t++) {
      const T *c = (const T*)cos + positions[t] * half, *s = (const T*)sin + positions[t] * half;
      const T *q = (const T*)query + t * stride_query, *k = (const T*)key + t * stride_key;
      const T* v = (const T*)value + t * stride_value;
      T *o = (T*)out + t * heads * head_dim, *kc = (T*)key_cache + slots[t] * row, *vc = (T*)value_cache + slots[t] * row;
      for (long h = 0; h < heads; h++) rotate<T, false>(q + h * head_dim, o + h * head_dim, c, s, half);
      for (long h = 0; h < kv_heads; h++) rotate<T, true>(k + h * head_dim, kc + h * head_dim, c, s, half);
      long i = 0;
      for (; i + W <= row; i += W) store(vc + i, finite(load(v + i)));
      for (; i < row; i++) store_one(vc + i, finite(load_one(v + i)));
    }
  });
}
