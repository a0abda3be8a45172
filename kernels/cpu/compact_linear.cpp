// linear_compact: the product with a weight in the form of compact.h.
//
// Up to MOST_ROWS rows are multiplied while a panel is decoded, in registers. Of more, the first ones decode it and keep it in
// the core's own cache for the others; meanwhile the next panel is brought near, evenly. What a thread does is counted in
// groups of rows of a panel, so that threads have as much to do whatever the sizes are.
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

#include "calls.h"
#include "compact.h"

#if defined(__AVX512BF16__)
constexpr int MOST_ROWS = 6;  // of a group: with all of a panel's columns, as many sums as registers hold
constexpr long AHEAD = 4096;  // bytes
// Bytes of a panel that are kept at once: what the second level of caches holds beside the rest; of so few rows that writing
// takes as long as multiplying, what the first one does.
constexpr long KEPT_MANY = 256 << 10, KEPT_FEW = 24 << 10;
constexpr int FEW_ROWS = 10;
constexpr int MANY_ROWS = 200, PARTS = 2;  // from how many rows on threads take parts as they come, and how many each

typedef Step<bfloat16> S;
enum Use { READ, KEEP, KEPT };  // a panel: decoded; decoded and kept; kept before

// Some steps of a panel: of all its columns (C vectors of 4), or of one `half`.
struct Steps { const uint8_t* compact; bfloat16* kept; long count; int half; };
// What is brought near meanwhile: some lines a step.
struct Ahead { const uint8_t* from; long stride; };

// M rows, from `at` along `in` on, times these steps, added to `sums` if they are `begun`. L: lines ahead.
template <int M, int C, int L, Use USE>
static void tile(const bfloat16* const* x, long at, const Decoder& decoder, Steps steps, Ahead ahead, bool begun, vfloat (*sums)[C]) {
  const uint8_t* compact = steps.compact;
  bfloat16* kept = steps.kept;
  const bfloat16* row[M];
  vfloat s[M][C];
  for (int m = 0; m < M; m++) {
    row[m] = x[m] + at;
    for (int c = 0; c < C; c++) s[m][c] = vfloat{};
  }
  if (steps.count < 1) __builtin_unreachable();  // GCC would else keep zeros on the stack for it
  for (long i = 0; i < steps.count; i++, ahead.from += ahead.stride) {
    for (int l = 0; l < L; l++) __builtin_prefetch(ahead.from + l * LINE, 0, 2);
    __m512i w[C];
    if constexpr (USE == KEPT) {
      for (int c = 0; c < C; c++) w[c] = load_as<__m512i>(kept + c * W * PAIR);
    } else {
      const uint8_t* rest = compact + (C < VECTORS ? steps.half * LINE : 0);
      __m512i two = load_as<__m512i>(rest), places = load_as<__m512i>(compact + 2 * LINE);
      if constexpr (C < VECTORS) places = _mm512_srl_epi16(places, _mm_cvtsi32_si128(4 * C * steps.half));
      w[0] = decoder.vector<0>(two, places);
      w[1] = decoder.vector<1>(two, places);
      if constexpr (C == VECTORS) {
        two = load_as<__m512i>(rest + LINE);
        w[2] = decoder.vector<2>(two, places);
        w[3] = decoder.vector<3>(two, places);
      }
      compact += STEP;
    }
    if constexpr (USE == KEEP)
      for (int c = 0; c < C; c++) _mm512_storeu_si512(kept + c * W * PAIR, w[c]);
    if constexpr (USE != READ) kept += PANEL * PAIR;
    for (int m = 0; m < M; m++) {
      auto a = S::row(row[m] + i * PAIR);
      for (int c = 0; c < C; c++) s[m][c] = S::add(s[m][c], a, w[c]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++) {
      if (begun) s[m][c] += sums[m][c];
      sums[m][c] = s[m][c];
    }
}

template <int C, int L, Use USE, int... M> static auto tile_of(long rows, std::integer_sequence<int, M...>) {
  static constexpr decltype(&tile<1, C, L, USE>) table[] = {&tile<M + 1, C, L, USE>...};
  return table[rows - 1];
}
template <int C, int L, Use USE> static auto tile_of(long rows) {
  return tile_of<C, L, USE>(rows, std::make_integer_sequence<int, MOST_ROWS>());
}
template <Use USE> static auto tile_of(long rows, int lines) {
  return lines > 1 ? tile_of<VECTORS, 2, USE>(rows) : lines ? tile_of<VECTORS, 1, USE>(rows) : tile_of<VECTORS, 0, USE>(rows);
}

// A product, as its threads see it.
struct Product {
  Compact weight;
  Decoder decoder;
  const bfloat16* const* x;
  const bfloat16* bias;  // or null
  void* out;             // of floats where it `widens` what has been rounded
  long out_size;
  bool widens;
  long slabs;

  static long groups(long rows) { return (rows + MOST_ROWS - 1) / MOST_ROWS; }
  // In how many parts a panel is kept, one after the other.
  static long slabs_of(const Compact& weight, long rows) {
    long most = rows <= FEW_ROWS ? KEPT_FEW : KEPT_MANY;
    return (weight.steps * PANEL * PAIR * (long)sizeof(bfloat16) + most - 1) / most;
  }

  // At most MOST_ROWS rows, times C vectors of a panel from `first` on.
  template <int C> void few(long rows, long panel, int first) const {
    vfloat sums[MOST_ROWS][C];
    const uint8_t* compact = weight.panel(panel);
    auto multiply = tile_of<C, STEP / LINE, READ>(rows);
    multiply(x, 0, decoder, {compact, nullptr, weight.steps, first / C}, {compact + AHEAD, STEP}, false, sums);
    for (const Rare* rare = weight.rare(panel); rare->place != Rare::none; rare++) {
      int column = rare->column() - first * W;
      if (column < 0 || column >= C * W) continue;
      for (long m = 0; m < rows; m++) sums[m][column / W][column % W] += load_one(x[m] + rare->at()) * rare->value();
    }
    finish<C>(sums, 0, rows, panel * PANEL + first * W);
  }

  // Rows first..last times a panel; next: the one that follows, or null; partial: [rows, VECTORS], if there are
  // several slabs.
  void many(long first, long last, long panel, const uint8_t* next, bfloat16* kept, vfloat* partial) const {
    long count = groups(last - first);
    long share = (STEP + count - 1) / count;  // of a step of the next panel, in one of each group's
    int lines = next ? (share + LINE - 1) / LINE : 0;
    if (next) bring(next + weight.steps * STEP, LINE);
    for (long slab = 0; slab < slabs; slab++) {
      long begin = weight.steps * slab / slabs, end = weight.steps * (slab + 1) / slabs;
      for (long group = 0; group < count; group++) {
        long row = first + (last - first) * group / count, rows = first + (last - first) * (group + 1) / count - row;
        vfloat own[MOST_ROWS][VECTORS], (*sums)[VECTORS] = own;
        if (slabs > 1) sums = (vfloat(*)[VECTORS])(partial + row * VECTORS);
        auto multiply = group ? tile_of<KEPT>(rows, lines) : tile_of<KEEP>(rows, lines);
        Steps steps = {weight.panel(panel) + begin * STEP, kept, end - begin, 0};
        Ahead ahead = {next + begin * STEP + group * (end - begin) * share, share};
        if (slab + 1 == slabs) bring_out(row, rows, panel * PANEL);
        multiply(x + row, begin * PAIR, decoder, steps, ahead, slab > 0, sums);
        if (!group) put_rare(panel, begin * PAIR, end * PAIR, kept, x + row, rows, sums);
        if (slab + 1 == slabs) finish<VECTORS>(sums, row, rows, panel * PANEL);
      }
    }
  }

  // What is rare among elements begin..end along `in` of a panel: put where they are kept, and added to sums of rows that were
  // made without.
  void put_rare(long panel, long begin, long end, bfloat16* kept, const bfloat16* const* row, long rows, vfloat (*sums)[VECTORS]) const {
    for (const Rare* rare = weight.rare(panel); rare->place != Rare::none; rare++) {
      long at = rare->at(), column = rare->column();
      if (at < begin || at >= end) continue;
      for (long m = 0; m < rows; m++) sums[m][column / W][column % W] += load_one(row[m] + at) * rare->value();
      store_one(kept + in_panel(at - begin, column), rare->value());
    }
  }

  // Where those go that `finish` writes: memory that no cache may hold.
  void bring_out(long row, long rows, long column) const {
    long size = widens ? sizeof(float) : sizeof(bfloat16);
    for (long m = row; m < row + rows; m++) bring<true>((char*)out + (m * out_size + column) * size, PANEL * size);
  }
  // The sums of rows `row`.. and columns `column`.., finished.
  template <int C> void finish(const vfloat (*sums)[C], long row, long rows, long column) const {
    if (widens || column + C * W > out_size) return finish_others<C>(sums, row, rows, column);
    for (long m = 0; m < rows; m++)
      for (int c = 0; c < C; c++) {
        vfloat value = bias ? sums[m][c] + load(bias + column + c * W) : sums[m][c];
        store((bfloat16*)out + (row + m) * out_size + column + c * W, value);
      }
  }
  template <int C> void finish_others(const vfloat (*sums)[C], long row, long rows, long column) const {
    long count = std::min<long>(C * W, out_size - column);
    for (long m = 0; m < rows; m++) {
      long at = (row + m) * out_size + column, i = 0;
      for (; i + W <= count; i += W) put(at + i, bias ? sums[m][i / W] + load(bias + column + i) : sums[m][i / W]);
      for (; i < count; i++) put(at + i, bias ? sums[m][i / W][i % W] + load_one(bias + column + i) : sums[m][i / W][i % W]);
    }
  }
  template <class V> void put(long at, V value) const {
    if (widens) store((float*)out + at, rounded<bfloat16>(value));
    else store((bfloat16*)out + at, value);
  }
};

// A thread's own memory for what it keeps of a panel.
static bfloat16* scratch() {
  struct Free { void operator()(void* memory) const { std::free(memory); } };
  static thread_local std::unique_ptr<void, Free> memory(std::aligned_alloc(4096, KEPT_MANY + 4096));
  return (bfloat16*)memory.get();
}

static void product(const bfloat16* x, const Compact& weight, const bfloat16* bias, void* out, long rows, long in, long out_size,
                    bool widens, int threads) {
  long groups = Product::groups(rows), padded = weight.steps * PAIR;
  int parts = rows < MANY_ROWS ? threads : threads * PARTS;
#pragma omp parallel num_threads(threads) if (in * out_size > SERIAL)
  {
    std::vector<bfloat16> filled(is_row<bfloat16>(in, padded) ? 0 : rows * padded);
    std::vector<const bfloat16*> given(rows);
    for (long j = 0; j < rows; j++) given[j] = as_row(x + j * in, in, padded, filled.data() + j * padded);
    long slabs = Product::slabs_of(weight, rows);
    Product product = {weight, Decoder(weight.head), given.data(), bias, out, out_size, widens, slabs};
    std::unique_ptr<vfloat[]> partial(groups > 1 && slabs > 1 ? new vfloat[rows * VECTORS] : nullptr);
#pragma omp for schedule(dynamic) nowait
    for (int part = 0; part < parts; part++) {
      if (groups == 1) {  // by halves of panels
        long end = 2 * weight.panels * (part + 1) / parts;
        for (long half = 2 * weight.panels * part / parts; half < end;) {
          bool whole = half % 2 == 0 && half + 1 < end;
          if (whole) product.few<VECTORS>(rows, half / 2, 0);
          else product.few<VECTORS / 2>(rows, half / 2, half % 2 * VECTORS / 2);
          half += whole ? 2 : 1;
        }
      } else {
        long total = weight.panels * groups, end = total * (part + 1) / parts;
        for (long unit = total * part / parts; unit < end;) {
          long panel = unit / groups, group = unit % groups, stop = std::min(groups, group + end - unit);
          unit += stop - group;
          const uint8_t* next = unit < end ? weight.panel(panel + 1) : nullptr;
          product.many(rows * group / groups, rows * stop / groups, panel, next, scratch(), partial.get());
        }
      }
    }
  }
}
#endif

// x: [rows, in]; bias: [out_size] or null; out: [rows, out_size], of floats where it `widens` what has been rounded.
// Contiguous, of bfloat16 (1).
extern "C" void linear_compact(int dtype, const void* x, const void* compact, const void* bias, void* out, long rows, long in,
                               long out_size, int widens, int threads) {
#if defined(__AVX512BF16__)
  Compact weight(compact, in, out_size);
  if (rows) product((const bfloat16*)x, weight, (const bfloat16*)bias, out, rows, in, out_size, widens, threads);
#endif
}
CALLABLE(linear_compact)
