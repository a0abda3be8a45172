// Vectors of floats in GCC's and Clang's vector extensions, which become the machine's widest: AVX512, AVX2, NEON.
// Elements in memory are float, bfloat16 or float16; all arithmetic is in float.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vfloat __attribute__((vector_size(4 * W)));
typedef int32_t vint __attribute__((vector_size(4 * W)));
typedef uint32_t vuint __attribute__((vector_size(4 * W)));
typedef uint16_t vushort __attribute__((vector_size(2 * W)));

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };
typedef _Float16 vhalf __attribute__((vector_size(2 * W)));

template <class V> static inline V load_as(const void* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
static inline vfloat splat(float x) { return x - vfloat{}; }

static inline vfloat load(const float* p) { return load_as<vfloat>(p); }
// W numbers of 16 bits.
static inline vuint widened(const void* p) {
#if defined(__AVX512F__)  // of the other form GCC makes halves
  return (vuint)_mm512_cvtepu16_epi32(load_as<__m256i>(p));
#else
  return __builtin_convertvector(load_as<vushort>(p), vuint);
#endif
}
static inline vfloat load(const bfloat16* p) { return (vfloat)(widened(p) << 16); }
static inline vfloat load(const float16* p) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_cvtph_ps(load_as<__m256i>(p));
#else
  return __builtin_convertvector(load_as<vhalf>(p), vfloat);
#endif
}

static inline void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof v); }
// To nearest even; NaN stays NaN.
static inline void store(bfloat16* p, vfloat v) {
#if defined(__AVX512BF16__)
  __m256bh out = _mm512_cvtneps_pbh((__m512)v);
#else
  vuint bits = (vuint)v;
  vuint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  vuint nan = (vuint)(v != v);
  vushort out = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), vushort);
#endif
  std::memcpy(p, &out, sizeof out);
}
static inline void store(float16* p, vfloat v) {
#if defined(__AVX512F__)
  __m256i out = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  vhalf out = __builtin_convertvector(v, vhalf);
#endif
  std::memcpy(p, &out, sizeof out);
}

// One element, for what is left of a row.
static inline float load_one(const float* p) { return *p; }
static inline float load_one(const bfloat16* p) {
  uint32_t bits = uint32_t(p->bits) << 16; float x; std::memcpy(&x, &bits, 4); return x;
}
static inline float load_one(const float16* p) { _Float16 x; std::memcpy(&x, p, 2); return float(x); }
static inline void store_one(float* p, float x) { *p = x; }
static inline void store_one(bfloat16* p, float x) {
  uint32_t bits; std::memcpy(&bits, &x, 4);
  p->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline void store_one(float16* p, float x) { _Float16 y = _Float16(x); std::memcpy(p, &y, 2); }

// x as it comes back from memory.
template <class T> static inline float rounded(float x) { T t; store_one(&t, x); return load_one(&t); }
template <class T> static inline vfloat rounded(vfloat x) { T t[W]; store(t, x); return load(t); }
template <> inline float rounded<float>(float x) { return x; }
template <> inline vfloat rounded<float>(vfloat x) { return x; }
#if defined(__AVX512BF16__)
template <> inline vfloat rounded<bfloat16>(vfloat x) {
  return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)), 16);
}
#endif

// The same by what is asked for, so that a row's vectors and its last elements are one piece of code (`each`).
template <class T> static inline vfloat load(const T* p, vfloat) { return load(p); }
template <class T> static inline float load(const T* p, float) { return load_one(p); }
template <class T> static inline void store(T* p, float x) { store_one(p, x); }

static inline vfloat max(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}
static inline float greatest(vfloat v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float x = v[0];
  for (int i = 1; i < W; i++) x = v[i] > x ? v[i] : x;
  return x;
#endif
}
static inline float sum(vfloat v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s = 0;
  for (int i = 0; i < W; i++) s += v[i];
  return s;
#endif
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vint{__VA_ARGS__})
#endif
template <int HALF, int... I> static inline void swap_halves(vfloat* square, std::integer_sequence<int, I...>) {
  for (int i = 0; i < W; i++)
    if (!(i & HALF)) {
      const vfloat a = square[i], b = square[i + HALF];
      square[i] = SHUFFLE(a, b, (I & HALF ? W + I - HALF : I)...);
      square[i + HALF] = SHUFFLE(a, b, (I & HALF ? W + I : I + HALF)...);
    }
  if constexpr (HALF > 1) swap_halves<HALF / 2>(square, std::integer_sequence<int, I...>());
}
// W rows of W, as columns: by blocks of half the size, in place.
static inline void transpose(vfloat* square) { swap_halves<W / 2>(square, std::make_integer_sequence<int, W>()); }

// Calls f for all of a row: f(i, vfloat{}) where it takes a vector from i on, then f(i, 0.0f) where one element.
template <class F> static inline void each(long n, F f) {
  long i = 0;
  for (; i + W <= n; i += W) f(i, vfloat{});
  for (; i < n; i++) f(i, 0.0f);
}
// The sum of what f, called so, returns.
template <class F> static inline float sum_of(long n, F f) {
  vfloat sums = {};
  float tail = 0;
  long i = 0;
  for (; i + W <= n; i += W) sums += f(i, vfloat{});
  for (; i < n; i++) tail += f(i, 0.0f);
  return sum(sums) + tail;
}

// e^x to about 2 units in the last place (Cephes' expf: x = n ln 2 + r, a polynomial in r); 0 far below -87, finite above
// 88.
static inline vfloat exp(vfloat x) {
  vfloat high = splat(88.3f);
#if defined(__AVX512F__)
  x = max(x, splat(-120.0f));
  x = (vfloat)_mm512_min_ps((__m512)x, (__m512)high);
  vfloat n = (vfloat)_mm512_roundscale_ps((__m512)(x * 1.44269504f), 8);
#else
  vfloat low = splat(-87.3f);
  vint tiny = x < low;
  x = max(x, low);
  x = x > high ? high : x;
  vfloat shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits hold the nearest integer
  vfloat n = shifted - 12582912.0f;
#endif
  vfloat r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vfloat p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
#if defined(__AVX512F__)
  return (vfloat)_mm512_scalef_ps((__m512)p, (__m512)n);  // p * 2^n
#else
  vint scaled = (vint)p + (((vint)shifted - 0x4B400000) << 23);
  return (vfloat)(scaled & ~tiny);
#endif
}

constexpr float LOG2_E = 1.44269504f;

// 2^x by a polynomial of least relative error over a unit of x: 7e-5 of the result where it is rounded to bfloat16, 1e-7
// else. 0 below -150; without AVX512 for x <= 0 alone, and what is below 2^-126 counts as that.
template <bool COARSE = false> static inline vfloat power_of_2(vfloat x) {
  vfloat p;
#if defined(__AVX512DQ__)
  const vfloat f = (vfloat)_mm512_reduce_ps((__m512)x, 9);  // x - floor(x)
  if constexpr (COARSE) {
    p = splat(7.802452e-2f);
    p = p * f + 2.2606717e-1f;
    p = p * f + 6.9583353e-1f;
    p = p * f + 9.9992522e-1f;
  } else {
    p = splat(2.1702226912e-4f);
    p = p * f + 1.2439693768e-3f;
    p = p * f + 9.6788406517e-3f;
    p = p * f + 5.548334197e-2f;
    p = p * f + 2.4022983633e-1f;
    p = p * f + 6.9314698383e-1f;
    p = p * f + 1.0f;
  }
  return (vfloat)_mm512_scalef_ps((__m512)p, (__m512)x);  // p * 2^floor(x)
#else
  x = max(x, splat(-126.0f));
  const vfloat shifted = x + 12582912.0f;  // 1.5 * 2^23: the sum's low bits hold the nearest integer
  const vfloat f = x - (shifted - 12582912.0f);
  if constexpr (COARSE) {
    p = splat(5.517166681e-2f);
    p = p * f + 2.426111351e-1f;
    p = p * f + 6.932609870e-1f;
    p = p * f + 9.999280728e-1f;
  } else {
    p = splat(1.534581179e-4f);
    p = p * f + 1.339993142e-3f;
    p = p * f + 9.618488960e-3f;
    p = p * f + 5.550328776e-2f;
    p = p * f + 2.402264689e-1f;
    p = p * f + 6.931472057e-1f;
    p = p * f + 1.0f;
  }
  return (vfloat)((vint)p + ((vint)shifted << 23));
#endif
}

// Calls f with a null pointer of the element type that `dtype` (0 float, 1 bfloat16, 2 float16) names.
template <class F> static inline void by_dtype(int dtype, F f) {
  if (dtype == 0) f((float*)nullptr);
  else if (dtype == 1) f((bfloat16*)nullptr);
  else f((float16*)nullptr);
}

constexpr long LINE = 64;  // bytes, of a cache

// Brings memory near, to be read or written. The asm stands for an effect: GCC takes a function that does no more than prefetch
// for one without any, and drops its calls.
template <bool WRITE = false> static inline void bring(const void* memory, long num_bytes) {
  for (long i = 0; i < num_bytes; i += LINE) __builtin_prefetch((const char*)memory + i, WRITE, 2);
  asm volatile("");
}

// Work below which a second thread costs more than it brings, in elements.
constexpr long SERIAL = 1 << 15;
