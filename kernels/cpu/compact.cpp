// Weights in the form of compact.h: made, laid out as oneDNN wants them, looked up in.
#include <algorithm>
#include <functional>
#include <vector>

#include "calls.h"
#include "compact.h"

template <class T> static inline uint32_t bits_of(T x) {  // as a float
  float wide = load_one(&x);
  return load_as<uint32_t>(&wide);
}
static inline int exponent_of(uint32_t bits) { return bits >> 23 & 255; }

// Finds the commonest exponents of a weight [out_size, in] of rows `stride` elements apart; places: [257], an exponent's in
// the table, or more than EXPONENTS where it has none, and then how many bits of lower halves say it all. Returns the bytes
// that the weight takes; 0: it is not held so here.
extern "C" long compact_bytes(int dtype, const void* weight, long in, long out_size, long stride, uint8_t* places, int threads) {
  long bytes = 0, panels = (out_size + PANEL - 1) / PANEL;
  std::vector<std::vector<long>> counts(panels, std::vector<long>(256));
  uint32_t lower = 0;
  by_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel for num_threads(threads) reduction(| : lower)
    for (long panel = 0; panel < panels; panel++)
      for (long row = panel * PANEL; row < std::min(out_size, (panel + 1) * PANEL); row++)
        for (long i = 0; i < in; i++) {
          uint32_t bits = bits_of(((const T*)weight)[row * stride + i]);
          counts[panel][exponent_of(bits)]++;
          lower |= bits & 0xffff;
        }
  });
  places[256] = lower & 0xff ? 16 : lower ? 8 : 0;
  by_held(dtype, places[256], [&](auto* how) {
    using Form = Compact<std::remove_pointer_t<decltype(how)>>;
    std::vector<long> total(256);
    for (auto& of_panel : counts) std::transform(total.begin(), total.end(), of_panel.begin(), total.begin(), std::plus<>());
    std::fill(places, places + 256, EXPONENTS + 1);
    places[0] = EXPONENTS;
    total[0] = -1;
    for (int place = 0; place < EXPONENTS; place++) {
      long commonest = std::max_element(total.begin(), total.end()) - total.begin();
      places[commonest] = place;
      total[commonest] = -1;
    }
    long most = 0;
    for (auto& of_panel : counts) {
      long rare = 0;
      for (int e = 0; e < 256; e++) rare += places[e] > EXPONENTS ? of_panel[e] : 0;
      most = std::max(most, rare);
    }
    constexpr long IN_LINE = LINE / sizeof(Rare);
    long room = (most + 1 + IN_LINE - 1) / IN_LINE * IN_LINE;
    bytes = Form::HEAD + panels * Form::panel_bytes(in, room);
  });
  return bytes;
}

// Into a step: elements `at`.. along `in` of `columns` rows of a weight, `stride` apart. Returns where the next rare one goes.
template <class H>
static Rare* encode(const typename H::T* weight, long stride, long columns, long in, long at, const uint8_t* places,
                    uint16_t* step, Rare* rare) {
  std::fill(step, step + H::step / 2, 0);
  std::fill(step + 64, step + 96, 0xffff);  // places: of zero
  for (long column = 0; column < columns; column++)
    for (long k = 0; k < std::min<long>(PAIR, in - at); k++) {
      uint32_t bits = bits_of(weight[column * stride + at + k]);
      if (places[exponent_of(bits)] > EXPONENTS) {
        *rare++ = {uint32_t((at + k) * PANEL + column), bits};
        bits = 0;
      }
      int vector = column / 16, word = column % 16 * PAIR + k;
      uint16_t rest = bits >> 16 & 0x807f, others = ~(15 << 4 * vector);
      step[vector / 2 * 32 + word] |= vector & 1 ? rest << 8 | rest >> 8 : rest;
      step[64 + word] = (step[64 + word] & others) | places[exponent_of(bits)] << 4 * vector;
      if (H::lower == 16) step[96 + vector * 32 + word] = bits;
      if (H::lower == 8) step[96 + vector / 2 * 32 + word] |= vector & 1 ? bits & 0xff00 : (bits & 0xff00) >> 8;
    }
  return rare;
}

// compact: as many bytes as `compact_bytes` said with these `places`.
extern "C" void compact_weight(int dtype, const void* weight, long in, long out_size, long stride, const uint8_t* places,
                               void* compact, long bytes, int threads) {
  by_held(dtype, places[256], [&](auto* how) {
    using H = std::remove_pointer_t<decltype(how)>;
    using T = typename H::T;
    uint16_t* table = (uint16_t*)compact;
    for (int e = 0; e < 256; e++)
      if (places[e] <= EXPONENTS) table[places[e]] = table[places[e] + 16] = e << 7;
    using Form = Compact<H>;
    int64_t room = ((bytes - Form::HEAD) / Form::panels_of(out_size) - Form::panel_bytes(in, 0)) / sizeof(Rare);
    int64_t said[] = {room, H::lower};
    std::memcpy((uint8_t*)compact + LINE, said, sizeof said);
    Form c(compact, in, out_size);
#pragma omp parallel for num_threads(threads)
    for (long panel = 0; panel < c.panels; panel++) {
      const T* rows = (const T*)weight + panel * PANEL * stride;
      long columns = std::min<long>(PANEL, out_size - panel * PANEL);
      Rare* rare = (Rare*)c.rare(panel);
      for (long s = 0; s < c.steps; s++)
        rare = encode<H>(rows, stride, columns, in, s * PAIR, places, (uint16_t*)(c.panel(panel) + s * H::step), rare);
      *rare = {Rare::none, 0};
    }
  });
}

// to: [panels, steps of `Step<T>::N` elements, PANEL, N], padded with zeros. halves: in how many the panels come in turns: 1, or
// 2 of a gated product, whose second follows the first in `to`.
extern "C" void expand_compact(int dtype, const void* compact, void* to, long in, long out_size, long halves, int threads) {
#if defined(__AVX512BF16__)
  by_held(dtype, lower_of(compact), [&](auto* how) {
    using H = std::remove_pointer_t<decltype(how)>;
    using T = typename H::T;
    Compact<H> c(compact, in, out_size);
    Decoder decoder(compact);
#pragma omp parallel for num_threads(threads)
    for (long panel = 0; panel < c.panels; panel++) {
      const uint8_t* from = c.panel(panel);
      T* out = (T*)to + (panel % halves * (c.panels / halves) + panel / halves) * c.steps * PAIR * PANEL;
      for (long s = 0; s < c.steps; s++, from += H::step) {
        __m512i first = load_as<__m512i>(from), last = load_as<__m512i>(from + LINE), places = load_as<__m512i>(from + 2 * LINE);
        __m512i vectors[VECTORS] = {decoder.vector<0>(first, places), decoder.vector<1>(first, places),
                                    decoder.vector<2>(last, places), decoder.vector<3>(last, places)};
        T* step = out + s * PAIR * PANEL;
        for (int v = 0; v < VECTORS; v++) {
          if constexpr (sizeof(T) == 2) {
            _mm512_storeu_si512(step + v * PAIR * W, vectors[v]);
          } else {
            __m512i first, second;
            decoder.floats<H::lower>(vectors[v], from + 3 * LINE, v, first, second);
            _mm512_storeu_si512(step + v * W, first);
            _mm512_storeu_si512(step + PANEL + v * W, second);
          }
        }
      }
      for (const Rare* rare = c.rare(panel); rare->place != Rare::none; rare++)
        put(out + in_panel<T>(rare->at(), rare->column()), rare->bits);
    }
  });
#endif
}

// Elements of 16 bits that lie 16 steps ahead.
template <class H> constexpr long AHEAD = 16 * H::step / 2;

// Rows of a weight [rows, in]: token_ids [count], less `start`; out: [count, in]; zeros for a row that is not there.
extern "C" void embedding_compact(int dtype, const int64_t* token_ids, const void* compact, void* out, long count, long in,
                                  long rows, long start, int threads) {
  by_held(dtype, lower_of(compact), [&](auto* how) {
    using H = std::remove_pointer_t<decltype(how)>;
    using T = typename H::T;
    Compact<H> c(compact, in, rows);
    const uint16_t* table = (const uint16_t*)c.head;
#pragma omp parallel for num_threads(threads) if (count * in > SERIAL)
    for (long t = 0; t < count; t++) {
      long row = token_ids[t] - start, panel = row / PANEL, column = row % PANEL, vector = column / 16;
      T* to = (T*)out + t * in;
      if (row < 0 || row >= rows) {
        std::fill(to, to + in, T{});
        continue;
      }
      const uint8_t* from = c.panel(panel);
      for (long i = 0; i < in; i++) {
        const uint16_t* step = (const uint16_t*)(from + i / PAIR * H::step) + column % 16 * PAIR + i % PAIR;
        const uint16_t *rest = step + vector / 2 * 32, *place = step + 64;
        if (i % PAIR == 0) bring(rest + AHEAD<H>, 1), bring(place + AHEAD<H>, 1);
        const uint16_t upper = vector & 1 ? *rest << 8 | *rest >> 8 : *rest;
        uint32_t bits = uint32_t((upper & 0x807f) | table[*place >> 4 * vector & 15]) << 16;
        if constexpr (H::lower) {
          const uint16_t* lower = step + 96 + vector * H::lower / 16 * 32;
          if (i % PAIR == 0) bring(lower + AHEAD<H>, 1);
          bits |= H::lower == 16 ? *lower : vector & 1 ? *lower & 0xff00 : (*lower & 0xff) << 8;
        }
        put(to + i, bits);
      }
      for (const Rare* rare = c.rare(panel); rare->place != Rare::none; rare++)
        if (rare->column() == column) put(to + rare->at(), rare->bits);
    }
  });
}
CALLABLE(compact_weight)
CALLABLE(expand_compact)
CALLABLE(embedding_compact)
