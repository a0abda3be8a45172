// rotary_store_kv: `kernels/eager.py`.
#include <cmath>
#include <type_traits>

#include "vector.h"

// NaN and infinities as zeros: what is not finite differs from itself once zero times it is added.
static inline vfloat finite(vfloat v) { return (v - v) == (v - v) ? v : vfloat{}; }
static inline float finite(float v) { return (v - v) == (v - v) ? v : 0.0f; }

template <class T, bool CLEAN> static void put(T* out, vfloat v) { store(out, CLEAN ? finite(rounded<T>(v)) : v); }
template <class T, bool CLEAN> static void put_one(T* out, float v) {
  store_one(out, CLEAN ? finite(rounded<T>(v)) : v);
}

// One head. Pair i is (i, i + width), or (2i, 2i + 1) if interleaved; what is beyond the pairs is copied.
template <class T, bool CLEAN>
static void rotate(const T* x, T* out, const T* cos, const T* sin, long width, long head_dim, bool interleaved) {
  long i = 0;
  for (; !interleaved && i + W <= width; i += W) {
    vfloat a = load(x + i), b = load(x + width + i), c = load(cos + i), s = load(sin + i);
    put<T, CLEAN>(out + i, a * c - b * s);
    put<T, CLEAN>(out + width + i, b * c + a * s);
  }
  for (; i < width; i++) {
    const long first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : width + i;
    float a = load_one(x + first), b = load_one(x + second), c = load_one(cos + i), s = load_one(sin + i);
    put_one<T, CLEAN>(out + first, a * c - b * s);
    put_one<T, CLEAN>(out + second, b * c + a * s);
  }
  for (i = 2 * width; i + W <= head_dim; i += W) put<T, CLEAN>(out + i, load(x + i));
  for (; i < head_dim; i++) put_one<T, CLEAN>(out + i, load_one(x + i));
}

// query, key, value: a row of heads for each token, `stride_*` elements apart; value null: only keys are stored; cos, sin:
// [positions, width]; caches: [slots, kv_heads, head_dim or value_dim]; slot -1 is not stored; out: [num_tokens, heads,
// head_dim].
extern "C" void rotary_store_kv(int dtype, const void* query, const void* key, const void* value, const void* cos,
                                const void* sin, const int64_t* positions, void* key_cache, void* value_cache,
                                const int64_t* slots, void* out, long num_tokens, long heads, long kv_heads,
                                long head_dim, long value_dim, long width, long stride_query, long stride_key,
                                long stride_value, int interleaved, int threads) {
  by_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const long row = kv_heads * head_dim, value_row = kv_heads * value_dim;
#pragma omp parallel for num_threads(threads) if (num_tokens * (heads + 2 * kv_heads) * head_dim > SERIAL)
    for (long t = 0; t < num_tokens; t++) {
      const T *c = (const T*)cos + positions[t] * width, *s = (const T*)sin + positions[t] * width;
      const T *q = (const T*)query + t * stride_query, *k = (const T*)key + t * stride_key;
      T* o = (T*)out + t * heads * head_dim;
      for (long h = 0; h < heads; h++)
        rotate<T, false>(q + h * head_dim, o + h * head_dim, c, s, width, head_dim, interleaved);
      if (slots[t] < 0) continue;
      T* kc = (T*)key_cache + slots[t] * row;
      for (long h = 0; h < kv_heads; h++)
        rotate<T, true>(k + h * head_dim, kc + h * head_dim, c, s, width, head_dim, interleaved);
      if (!value) continue;
      const T* v = (const T*)value + t * stride_value;
      T* vc = (T*)value_cache + slots[t] * value_row;
      long i = 0;
      for (; i + W <= value_row; i += W) store(vc + i, finite(load(v + i)));
      for (; i < value_row; i++) store_one(vc + i, finite(load_one(v + i)));
    }
  });
}
