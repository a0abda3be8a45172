// linear_compact: the product with a weight in the form of compact.h.
//
// Up to MOST_ROWS rows are multiplied while a panel is decoded, in registers. Of more, the first ones decode it and keep it in
// the core's own cache for the others; meanwhile the next panel is brought near, evenly. What a thread does is counted in
// groups of rows of a panel, so that threads have as much to do whatever the sizes are.
//
// Of a gated product, panels of gate and of up come in turns: what is made of the first is kept, as it would be written, until
// the other's is there, and the activation of both is all that is written.
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

#include "activation.h"
#include "calls.h"
#include "compact.h"

#if defined(__AVX512BF16__)
constexpr int MOST_ROWS = 6;  // of a group: with all of a panel's columns, as many sums as registers hold
constexpr long AHEAD = 4096;  // bytes
// Bytes of a panel that are kept at once: what the second level of caches holds beside the rest; of so few rows that writing
// takes as long as multiplying, what the first one does.
constexpr long KEPT_MANY = 512 << 10, KEPT_FEW = 24 << 10;
constexpr int FEW_ROWS = 10;
constexpr int MANY_ROWS = 200, PARTS = 2;  // from how many rows on threads take parts as they come, and how many each
template <class T> constexpr int FORMS = sizeof(T) / 2;  // vectors of a product that a vector of a step makes

enum Use { READ, KEEP, KEPT };  // a panel: decoded; decoded and kept; kept before

// Some steps of a panel: of all its columns (C vectors of 4), or of one `half`.
template <class T> struct Steps { const uint8_t* compact; T* kept; long count; int half; };
// What is brought near meanwhile: some lines a step.
struct Ahead { const uint8_t* from; long stride; };

// Vectors of a step.
template <class H, int C>
static inline void decode(const Decoder& decoder, const uint8_t* step, int half, __m512i (&w)[FORMS<typename H::T>][C]) {
  const uint8_t* rest = step + (C < VECTORS ? half * LINE : 0);
  __m512i two = load_as<__m512i>(rest), places = load_as<__m512i>(step + 2 * LINE);
  if constexpr (C < VECTORS) places = _mm512_srl_epi16(places, _mm_cvtsi32_si128(4 * C * half));
  w[0][0] = decoder.vector<0>(two, places);
  w[0][1] = decoder.vector<1>(two, places);
  if constexpr (C == VECTORS) {
    two = load_as<__m512i>(rest + LINE);
    w[0][2] = decoder.vector<2>(two, places);
    w[0][3] = decoder.vector<3>(two, places);
  }
  if constexpr (FORMS<typename H::T> == 2)
    for (int c = 0; c < C; c++) {
      const uint8_t* lowers = step + (3 + (C < VECTORS ? half * C * H::lower / 16 : 0)) * LINE;
      decoder.floats<H::lower>(w[0][c], lowers, c, w[0][c], w[1][c]);
    }
}

// M rows, from `at` along `in` on, times these steps, added to `sums` if they are `begun`. L: lines ahead.
template <class H, int M, int C, int L, Use USE, class T = typename H::T>
static void tile(const T* const* x, long at, const Decoder& decoder, Steps<T> steps, Ahead ahead, bool begun, vfloat (*sums)[C]) {
  constexpr long N = LINE / sizeof(T), AT_ONCE = USE == KEPT ? 1 : FORMS<T>;  // what is kept may be read in smaller steps
  const uint8_t* compact = steps.compact;
  T* kept = steps.kept;
  const T* row[M];
  vfloat s[M][C];
  for (int m = 0; m < M; m++) {
    row[m] = x[m] + at;
    for (int c = 0; c < C; c++) s[m][c] = vfloat{};
  }
  const long count = steps.count * FORMS<T> / AT_ONCE;
  if (count < 1) __builtin_unreachable();  // GCC would else keep zeros on the stack for it
  for (long i = 0; i < count; i++, ahead.from += ahead.stride) {
    for (int l = 0; l < L; l++) __builtin_prefetch(ahead.from + l * LINE, 0, 2);
    __m512i w[FORMS<T>][C];
    if constexpr (USE == KEPT) {
      for (int c = 0; c < C; c++) w[0][c] = load_as<__m512i>(kept + c * N);
    } else {
      decode<H, C>(decoder, compact, steps.half, w);
      compact += H::step;
    }
    if constexpr (USE == KEEP)
      for (int f = 0; f < FORMS<T>; f++)
        for (int c = 0; c < C; c++) _mm512_storeu_si512(kept + (f * C + c) * N, w[f][c]);
    if constexpr (USE != READ) kept += AT_ONCE * C * N;
    for (int m = 0; m < M; m++)
      for (int f = 0; f < AT_ONCE; f++) {
        auto a = Step<T>::row(row[m] + i * (PAIR * AT_ONCE / FORMS<T>) + f);
        for (int c = 0; c < C; c++) s[m][c] = Step<T>::add(s[m][c], a, (decltype(a))w[f][c]);
      }
  }
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++) {
      if (begun) s[m][c] += sums[m][c];
      sums[m][c] = s[m][c];
    }
}

template <class H, int C, int L, Use USE, int... M> static auto tile_of(long rows, std::integer_sequence<int, M...>) {
  static constexpr decltype(&tile<H, 1, C, L, USE>) table[] = {&tile<H, M + 1, C, L, USE>...};
  return table[rows - 1];
}
template <class H, int C, int L, Use USE> static auto tile_of(long rows) {
  return tile_of<H, C, L, USE>(rows, std::make_integer_sequence<int, MOST_ROWS>());
}
template <class H, Use USE> static auto tile_of(long rows, int lines) {
  return lines > 2   ? tile_of<H, VECTORS, 4, USE>(rows)
         : lines > 1 ? tile_of<H, VECTORS, 2, USE>(rows)
         : lines     ? tile_of<H, VECTORS, 1, USE>(rows)
                     : tile_of<H, VECTORS, 0, USE>(rows);
}

// A product, as its threads see it.
template <class H> struct Product {
  typedef typename H::T T;
  Compact<H> weight;
  Decoder decoder;
  const T* const* x;
  const T* bias;  // or null
  T* out;
  long out_size;  // of a row of `out`
  long slabs;
  Gate<T> gate;  // or null
  T* gates;      // [rows, PANEL]: of a gated product, what the gate's panel gave

  static long groups(long rows) { return (rows + MOST_ROWS - 1) / MOST_ROWS; }
  // In how many parts a panel is kept, one after the other.
  static long slabs_of(const Compact<H>& weight, long rows) {
    long most = rows <= FEW_ROWS ? KEPT_FEW : KEPT_MANY;
    return (weight.steps * PANEL * PAIR * (long)sizeof(T) + most - 1) / most;
  }

  // At most MOST_ROWS rows, times C vectors of a panel from `first` on.
  template <int C> void few(long rows, long panel, int first) const {
    vfloat sums[MOST_ROWS][C];
    const uint8_t* compact = weight.panel(panel);
    auto multiply = tile_of<H, C, H::step / LINE, READ>(rows);
    multiply(x, 0, decoder, {compact, nullptr, weight.steps, first / C}, {compact + AHEAD, H::step}, false, sums);
    for (const Rare* rare = weight.rare(panel); rare->place != Rare::none; rare++) {
      int column = rare->column() - first * W;
      if (column < 0 || column >= C * W) continue;
      for (long m = 0; m < rows; m++) sums[m][column / W][column % W] += load_one(x[m] + rare->at()) * rare->value();
    }
    finish<C>(sums, 0, rows, panel, first);
  }

  // Rows first..last times a panel; next: the one that follows, or null; partial: [rows, VECTORS], if there are
  // several slabs.
  void many(long first, long last, long panel, const uint8_t* next, T* kept, vfloat* partial) const {
    long count = groups(last - first);
    long share = (H::step + count - 1) / count, part = (share + FORMS<T> - 1) / FORMS<T>;  // of the next panel's, in a step
    if (next) bring(next + weight.steps * H::step, LINE);
    for (long slab = 0; slab < slabs; slab++) {
      long begin = weight.steps * slab / slabs, end = weight.steps * (slab + 1) / slabs;
      for (long group = 0; group < count; group++) {
        long row = first + (last - first) * group / count, rows = first + (last - first) * (group + 1) / count - row;
        vfloat own[MOST_ROWS][VECTORS], (*sums)[VECTORS] = own;
        if (slabs > 1) sums = (vfloat(*)[VECTORS])(partial + row * VECTORS);
        Ahead ahead = {next + begin * H::step + group * (end - begin) * share, group ? part : share};
        int lines = next ? (ahead.stride + LINE - 1) / LINE : 0;
        auto multiply = group ? tile_of<Held<T, 0>, KEPT>(rows, lines) : tile_of<H, KEEP>(rows, lines);
        Steps<T> steps = {weight.panel(panel) + begin * H::step, kept, end - begin, 0};
        if (slab + 1 == slabs) bring_out(row, rows, panel);
        multiply(x + row, begin * PAIR, decoder, steps, ahead, slab > 0, sums);
        if (!group) put_rare(panel, begin * PAIR, end * PAIR, kept, x + row, rows, sums);
        if (slab + 1 == slabs) finish<VECTORS>(sums, row, rows, panel, 0);
      }
    }
  }

  // What is rare among elements begin..end along `in` of a panel: put where they are kept, and added to sums of rows that were
  // made without.
  void put_rare(long panel, long begin, long end, T* kept, const T* const* row, long rows, vfloat (*sums)[VECTORS]) const {
    for (const Rare* rare = weight.rare(panel); rare->place != Rare::none; rare++) {
      long at = rare->at(), column = rare->column();
      if (at < begin || at >= end) continue;
      for (long m = 0; m < rows; m++) sums[m][column / W][column % W] += load_one(row[m] + at) * rare->value();
      ::put(kept + in_panel<T>(at - begin, column), rare->bits);
    }
  }

  bool is_gate(long panel) const { return gate && panel % 2 == 0; }
  // Of what is written.
  long column(long panel) const { return (gate ? panel / 2 : panel) * PANEL; }

  // Where those go that `finish` writes: memory that no cache may hold.
  void bring_out(long row, long rows, long panel) const {
    for (long m = row; m < row + rows && !is_gate(panel); m++) bring<true>(out + m * out_size + column(panel), PANEL * sizeof(T));
  }
  // The sums of rows `row`.. and of C vectors of a panel from `first` on, finished.
  template <int C> void finish(const vfloat (*sums)[C], long row, long rows, long panel, int first) const {
    const long at = column(panel) + first * W;
    if (gate) return finish_gated<C>(sums, row, rows, panel, first);
    if (at + C * W > out_size) return finish_others<C>(sums, row, rows, at);
    for (long m = 0; m < rows; m++) finish_row<C>(sums[m], bias ? bias + at : nullptr, out + (row + m) * out_size + at);
  }
  template <int C> static void finish_row(const vfloat* sums, const T* bias, T* to) {
    for (int c = 0; c < C; c++) store(to + c * W, bias ? sums[c] + load(bias + c * W) : sums[c]);
  }
  template <int C> void finish_gated(const vfloat (*sums)[C], long row, long rows, long panel, int first) const {
    const long at = column(panel) + first * W;
    const T* b = bias ? bias + at + (is_gate(panel) ? 0 : out_size) : nullptr;
    for (long m = 0; m < rows; m++) {
      T up[C * W], *kept = gates + (row + m) * PANEL + first * W;
      finish_row<C>(sums[m], b, is_gate(panel) ? kept : up);
      if (!is_gate(panel)) gate(kept, up, out + (row + m) * out_size + at, C * W);
    }
  }
  template <int C> void finish_others(const vfloat (*sums)[C], long row, long rows, long column) const {
    long count = std::min<long>(C * W, out_size - column);
    for (long m = 0; m < rows; m++) {
      long at = (row + m) * out_size + column, i = 0;
      for (; i + W <= count; i += W) store(out + at + i, bias ? sums[m][i / W] + load(bias + column + i) : sums[m][i / W]);
      for (; i < count; i++) store(out + at + i, bias ? sums[m][i / W][i % W] + load_one(bias + column + i) : sums[m][i / W][i % W]);
    }
  }
};

// A thread's own memory for what it keeps of a panel.
static void* scratch() {
  struct Free { void operator()(void* memory) const { std::free(memory); } };
  static thread_local std::unique_ptr<void, Free> memory(std::aligned_alloc(4096, KEPT_MANY + 4096));
  return memory.get();
}

template <class H, class T = typename H::T>
static void product(const T* x, const void* compact, const T* bias, T* out, long rows, long in, long size, Gate<T> gate,
                    int threads) {
  Compact<H> weight(compact, in, size);
  long groups = Product<H>::groups(rows), padded = weight.steps * PAIR, slabs = Product<H>::slabs_of(weight, rows);
  int parts = rows < MANY_ROWS ? threads : threads * PARTS;
  const long together = gate ? 2 : 1, count = weight.panels / together;  // panels that a thread takes one after the other
#pragma omp parallel num_threads(threads) if (in * size > SERIAL)
  {
    std::vector<T> filled(is_row<T>(in, padded) ? 0 : rows * padded);
    std::vector<const T*> given(rows);
    for (long j = 0; j < rows; j++) given[j] = as_row(x + j * in, in, padded, filled.data() + j * padded);
    std::unique_ptr<T[]> gates(gate ? new T[rows * PANEL] : nullptr);
    Product<H> product = {weight, Decoder(compact), given.data(), bias, out, size / together, slabs, gate, gates.get()};
    std::unique_ptr<vfloat[]> partial(groups > 1 && slabs > 1 ? new vfloat[rows * VECTORS] : nullptr);
#pragma omp for schedule(dynamic) nowait
    for (int part = 0; part < parts; part++) {
      if (groups == 1) {  // by halves of panels
        long end = 2 * count * (part + 1) / parts;
        for (long half = 2 * count * part / parts; half < end;) {
          bool whole = half % 2 == 0 && half + 1 < end;
          for (long panel = half / 2 * together; panel < (half / 2 + 1) * together; panel++)
            if (whole) product.template few<VECTORS>(rows, panel, 0);
            else product.template few<VECTORS / 2>(rows, panel, half % 2 * VECTORS / 2);
          half += whole ? 2 : 1;
        }
      } else {
        long total = count * groups, end = total * (part + 1) / parts;
        for (long unit = total * part / parts; unit < end;) {
          long index = unit / groups, group = unit % groups, stop = std::min(groups, group + end - unit);
          unit += stop - group;
          for (long panel = index * together; panel < (index + 1) * together; panel++) {
            bool goes_on = unit < end || panel + 1 < (index + 1) * together;
            const uint8_t* next = goes_on ? weight.panel(panel + 1) : nullptr;
            product.many(rows * group / groups, rows * stop / groups, panel, next, (T*)scratch(), partial.get());
          }
        }
      }
    }
  }
}
#endif

// x: [rows, in]; bias: [size] or null; out: [rows, size], or, gated by an activation of this `kind`, [rows, size / 2]; kind:
// -1 for none. Contiguous.
extern "C" void linear_compact(int dtype, int kind, const void* x, const void* compact, const void* bias, void* out, long rows,
                               long in, long size, int threads) {
#if defined(__AVX512BF16__)
  by_held(dtype, lower_of(compact), [&](auto* how) {
    using H = std::remove_pointer_t<decltype(how)>;
    using T = typename H::T;
    if (rows) product<H>((const T*)x, compact, (const T*)bias, (T*)out, rows, in, size, gate_of<T>(kind), threads);
  });
#endif
}
CALLABLE(linear_compact)
