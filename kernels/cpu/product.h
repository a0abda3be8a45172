// What products of a few rows with a packed weight are made of.
#pragma once
#include <algorithm>
#include <type_traits>

#include "vector.h"

// A step: what the rows are read as, how many elements it takes, and the vector that is added to a sum. `row` repeats one
// step of a row, `vector` reads many.
template <class T> struct Step {
  typedef float Row;
  static constexpr int N = 1;
  static inline vfloat weight(const T* p) { return load(p); }
  static inline vfloat row(const float* p) { return splat(*p); }
  static inline vfloat vector(const float* p) { return load(p); }
  static inline vfloat add(vfloat sum, vfloat x, vfloat w) { return sum + x * w; }
};
#if defined(__AVX512BF16__)
template <> struct Step<bfloat16> {  // products of two pairs, exact, added in float
  typedef bfloat16 Row;
  static constexpr int N = 2;
  static inline __m512i weight(const bfloat16* p) { return load_as<__m512i>(p); }
  static inline __m512i row(const bfloat16* p) { return _mm512_set1_epi32(load_as<int32_t>(p)); }
  static inline __m512i vector(const bfloat16* p) { return load_as<__m512i>(p); }
  static inline vfloat add(vfloat sum, __m512i x, __m512i w) {
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
  }
};
#endif

// Whether rows of `in` elements can be read where they lie.
template <class T> constexpr bool is_row(long in, long padded) {
  return std::is_same_v<T, typename Step<T>::Row> && in == padded;
}

// Rows as `Step` reads them: where they lie, or, converted and filled up with zeros, in `scratch`.
template <class T>
static const typename Step<T>::Row* as_row(const T* x, long in, long padded, typename Step<T>::Row* scratch) {
  if constexpr (std::is_same_v<T, typename Step<T>::Row>) {
    if (is_row<T>(in, padded)) return x;
    std::copy(x, x + in, scratch);
    std::fill(scratch + in, scratch + padded, T{});
  } else {
    for (long i = 0; i < in; i++) scratch[i] = load_one(x + i);
  }
  return scratch;
}

