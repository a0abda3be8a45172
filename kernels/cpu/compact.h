// Weights held without loss in 12 bits an element (bfloat16) or 28 (float), or, of floats that come from a checkpoint of half as
// many bits, in 12 (of bfloat16) or 20 (of float16): of few rows, reading the weight is what a product takes.
//
// Of an element's bits, the 8 of its exponent say least: nearly all weights of a matrix have one of the same 15. Those are in
// a table, and an element says which in 4 bits; sign and mantissa stay as they are. An element with another exponent is
// rare: it stands in a list beside its panel, and as zero where it would have been. After DFloat11 (arXiv:2504.11651), whose
// codes are shorter, and of lengths that only a GPU decodes fast enough.
//
//     head    the table, exponents where a bfloat16 has them, twice, so that a place in it may be followed by any bit; in the
//             line after it, int64 each: how many rare elements a panel has room for; how many bits of lower halves are held
//     panels  PANEL rows of the weight, which are columns of the product, by steps of two elements along `in`; a step is
//                 2 x 64 bytes  in a word, of two vectors of columns, an element's sign and mantissa each: the first's where
//                               they are in a bfloat16, the other's with its bytes swapped
//                 64 bytes      in a word the places in the table of the elements of four vectors
//                 4 x 64 bytes  of floats, which are held like bfloat16: their lower halves, by vectors
//                 2 x 64 bytes  where 8 bits of these say it all, instead: in a word those of two vectors
//                 0             where all are zero
//             and after the steps the rare ones, the last followed by one that is `none`
#pragma once
#include "product.h"

constexpr int PANEL = 64, VECTORS = PANEL / 16;
constexpr int PAIR = 2;        // elements of a step
constexpr int DEPTH = 16;      // of which oneDNN's steps in a panel are a multiple (`Step`)
constexpr int EXPONENTS = 15;  // in the table, and after them that of zero

// How a weight is held: its dtype, and how many bits of lower halves: 0, 8 or 16.
template <class Element, int LOWER> struct Held {
  typedef Element T;
  static constexpr int lower = LOWER;
  static constexpr long step = (3 + VECTORS * LOWER / 16) * LINE;  // bytes
};

// An element by its bits as a float, NaN as it was.
static inline void put(float* to, uint32_t bits) { std::memcpy(to, &bits, sizeof bits); }
static inline void put(bfloat16* to, uint32_t bits) { to->bits = bits >> 16; }

// An element that stands in a list.
struct Rare {
  uint32_t place, bits;  // at * PANEL + column, in the panel; the element, as a float
  static constexpr uint32_t none = ~0u;
  long at() const { return place / PANEL; }
  int column() const { return place % PANEL; }
  float value() const { return load_as<float>(&bits); }
};

// Where things are in a weight [out_size, in].
template <class H> struct Compact {
  typedef typename H::T T;
  const uint8_t* head;
  long panels, steps, room;

  static constexpr long HEAD = 2 * LINE;
  static long steps_of(long in) {
    constexpr long together = DEPTH * Step<T>::N;
    return (in + together - 1) / together * (together / PAIR);
  }
  static long panels_of(long out_size) { return (out_size + PANEL - 1) / PANEL; }
  static long panel_bytes(long in, long room) { return steps_of(in) * H::step + room * sizeof(Rare); }

  Compact(const void* compact, long in, long out_size)
      : head((const uint8_t*)compact), panels(panels_of(out_size)), steps(steps_of(in)),
        room(load_as<int64_t>(head + LINE)) {}
  const uint8_t* panel(long index) const { return head + HEAD + index * (steps * H::step + room * sizeof(Rare)); }
  const Rare* rare(long index) const { return (const Rare*)(panel(index) + steps * H::step); }
};

// Where an element of a panel is when it is decoded, which is oneDNN's layout too (linear.cpp).
template <class T> static inline long in_panel(long at, long column) {
  constexpr long N = Step<T>::N;
  return (at / N * PANEL + column) * N + at % N;
}

static inline int lower_of(const void* compact) { return load_as<int64_t>((const uint8_t*)compact + LINE + 8); }

// Calls f with how a weight is held, as a null pointer; not at all if this dtype is not, here.
template <class F> static void by_held(int dtype, int lower, F f) {
#if defined(__AVX512BF16__)
  by_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<T, bfloat16>) f((Held<T, 0>*)nullptr);
    if constexpr (std::is_same_v<T, float>)
      lower == 16 ? f((Held<T, 16>*)nullptr) : lower == 8 ? f((Held<T, 8>*)nullptr) : f((Held<T, 0>*)nullptr);
  });
#endif
}

#if defined(__AVX512BF16__)
struct Decoder {
  __m512i table, kept = _mm512_set1_epi16((short)0x807f);  // kept: sign and mantissa
  explicit Decoder(const void* compact) : table(load_as<__m512i>(compact)) {}

  // The elements of vector V of a step, of 16 columns, in pairs along `in`; of floats their upper halves. V may be less by an
  // even number if `places` have been shifted by 4 bits for each.
  template <int V> __m512i vector(__m512i rest, __m512i places) const {
    __m512i exponents = _mm512_permutexvar_epi16(V ? _mm512_srli_epi16(places, 4 * V) : places, table);
    return _mm512_ternarylogic_epi32(V & 1 ? swapped(rest) : rest, kept, exponents, 0xea);  // (a & b) | c
  }
  // Vector v of floats, of which `upper` has the upper halves: the first of each pair, and the second. lowers: where the
  // LOWER bits of lower halves are, from an even vector on, of which v counts.
  template <int LOWER> static void floats(__m512i upper, const uint8_t* lowers, int v, __m512i& first, __m512i& second) {
    first = _mm512_slli_epi32(upper, 16);
    if constexpr (LOWER == 0) {
      second = _mm512_and_si512(upper, _mm512_set1_epi32(0xffff0000));
    } else {
      const __m512i lower = lower_halves<LOWER>(lowers, v);
      first = joined(first, lower);
      second = joined(upper, _mm512_srli_epi32(lower, 16));
    }
  }

 private:
  template <int LOWER> static __m512i lower_halves(const uint8_t* from, int v) {
    if constexpr (LOWER == 16) return load_as<__m512i>(from + v * LINE);
    __m512i two = load_as<__m512i>(from + v / 2 * LINE);
    return v & 1 ? _mm512_and_si512(two, _mm512_set1_epi16((short)0xff00)) : _mm512_slli_epi16(two, 8);
  }
  static __m512i joined(__m512i upper, __m512i lower) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(0xffff0000), upper, lower, 0xca);  // a ? b : c
  }
  static __m512i swapped(__m512i words) {
#if defined(__AVX512VBMI2__)
    return _mm512_shldi_epi16(words, words, 8);
#else
    return _mm512_or_si512(_mm512_slli_epi16(words, 8), _mm512_srli_epi16(words, 8));
#endif
  }
};
#endif
