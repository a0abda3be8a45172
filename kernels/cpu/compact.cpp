// Weights in the form of compact.h: made, laid out as oneDNN wants them, looked up in.
#include <algorithm>
#include <functional>
#include <vector>

#include "calls.h"
#include "compact.h"

static inline int exponent_of(bfloat16 x) { return x.bits >> 7 & 255; }

// Finds the commonest exponents of a weight [out_size, in] of rows `stride` elements apart; places: [256], an exponent's in
// the table, or more than EXPONENTS where it has none. Returns the bytes that the weight takes; 0: it is not held so here.
extern "C" long compact_bytes(const bfloat16* weight, long in, long out_size, long stride, uint8_t* places, int threads) {
#if defined(__AVX512BF16__)
  long panels = Compact::panels_of(out_size);
  std::vector<std::vector<long>> counts(panels, std::vector<long>(256));
#pragma omp parallel for num_threads(threads)
  for (long panel = 0; panel < panels; panel++)
    for (long row = panel * PANEL; row < std::min(out_size, (panel + 1) * PANEL); row++)
      for (long i = 0; i < in; i++) counts[panel][exponent_of(weight[row * stride + i])]++;
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
  return Compact::HEAD + panels * Compact::panel_bytes(in, room);
#else
  return 0;
#endif
}

// Into a step: elements `at`.. along `in` of `columns` rows of a weight, `stride` apart. Returns where the next rare one goes.
static Rare* encode(const bfloat16* weight, long stride, long columns, long in, long at, const uint8_t* places, uint16_t* step,
                    Rare* rare) {
  std::fill(step, step + 64, 0);
  std::fill(step + 64, step + 96, 0xffff);  // places: of zero
  for (long column = 0; column < columns; column++)
    for (long k = 0; k < std::min<long>(PAIR, in - at); k++) {
      bfloat16 element = weight[column * stride + at + k];
      if (places[exponent_of(element)] > EXPONENTS) {
        *rare++ = {uint32_t((at + k) * PANEL + column), uint32_t(element.bits) << 16};
        element.bits = 0;
      }
      int vector = column / 16, word = column % 16 * PAIR + k;
      uint16_t rest = element.bits & 0x807f, others = ~(15 << 4 * vector);
      step[vector / 2 * 32 + word] |= vector & 1 ? rest << 8 | rest >> 8 : rest;
      step[64 + word] = (step[64 + word] & others) | places[exponent_of(element)] << 4 * vector;
    }
  return rare;
}

// compact: as many bytes as `compact_bytes` said with these `places`.
extern "C" void compact_weight(const bfloat16* weight, long in, long out_size, long stride, const uint8_t* places, void* compact,
                               long bytes, int threads) {
  uint16_t* table = (uint16_t*)compact;
  for (int e = 0; e < 256; e++)
    if (places[e] <= EXPONENTS) table[places[e]] = table[places[e] + 16] = e << 7;
  int64_t room = ((bytes - Compact::HEAD) / Compact::panels_of(out_size) - Compact::panel_bytes(in, 0)) / sizeof(Rare);
  std::memcpy((uint8_t*)compact + LINE, &room, sizeof room);
  Compact c(compact, in, out_size);
#pragma omp parallel for num_threads(threads)
  for (long panel = 0; panel < c.panels; panel++) {
    const bfloat16* rows = weight + panel * PANEL * stride;
    long columns = std::min<long>(PANEL, out_size - panel * PANEL);
    Rare* rare = (Rare*)c.rare(panel);
    for (long s = 0; s < c.steps; s++)
      rare = encode(rows, stride, columns, in, s * PAIR, places, (uint16_t*)(c.panel(panel) + s * STEP), rare);
    *rare = {Rare::none, 0};
  }
}

// to: [panels, steps, PANEL, PAIR], padded with zeros.
extern "C" void expand_compact(const void* compact, bfloat16* to, long in, long out_size, int threads) {
#if defined(__AVX512BF16__)
  Compact c(compact, in, out_size);
  Decoder decoder(compact);
#pragma omp parallel for num_threads(threads)
  for (long panel = 0; panel < c.panels; panel++) {
    const uint8_t* from = c.panel(panel);
    bfloat16* out = to + panel * c.steps * PANEL * PAIR;
    for (long s = 0; s < c.steps; s++, from += STEP) {
      __m512i first = load_as<__m512i>(from), last = load_as<__m512i>(from + LINE), places = load_as<__m512i>(from + 2 * LINE);
      bfloat16* step = out + s * PANEL * PAIR;
      _mm512_storeu_si512(step, decoder.vector<0>(first, places));
      _mm512_storeu_si512(step + 32, decoder.vector<1>(first, places));
      _mm512_storeu_si512(step + 64, decoder.vector<2>(last, places));
      _mm512_storeu_si512(step + 96, decoder.vector<3>(last, places));
    }
    for (const Rare* rare = c.rare(panel); rare->place != Rare::none; rare++)
      store_one(out + in_panel(rare->at(), rare->column()), rare->value());
  }
#endif
}

// Rows of a weight [rows, in]: token_ids [count], less `start`; out: [count, in]; zeros for a row that is not there.
extern "C" void embedding_compact(const int64_t* token_ids, const void* compact, bfloat16* out, long count, long in, long rows,
                                  long start, int threads) {
  Compact c(compact, in, rows);
  const uint16_t* table = (const uint16_t*)c.head;
#pragma omp parallel for num_threads(threads) if (count * in > SERIAL)
  for (long t = 0; t < count; t++) {
    long row = token_ids[t] - start, panel = row / PANEL, column = row % PANEL;
    bfloat16* to = out + t * in;
    if (row < 0 || row >= rows) {
      std::fill(to, to + in, bfloat16{});
      continue;
    }
    long vector = column / 16;
    for (long i = 0; i < in; i++) {
      const uint16_t* step = (const uint16_t*)(c.panel(panel) + i / PAIR * STEP);
      long word = column % 16 * PAIR + i % PAIR;
      uint16_t rest = step[vector / 2 * 32 + word];
      if (vector & 1) rest = rest << 8 | rest >> 8;
      to[i].bits = (rest & 0x807f) | table[step[64 + word] >> 4 * vector & 15];
    }
    for (const Rare* rare = c.rare(panel); rare->place != Rare::none; rare++)
      if (rare->column() == column) store_one(to + rare->at(), rare->value());
  }
}
CALLABLE(compact_weight)
CALLABLE(expand_compact)
CALLABLE(embedding_compact)
