// Causal attention on a CPU: tiles with an online softmax, forward and backward.
//
// A column is one query of one head; the R = H / G heads that share a key head stand side by side, c = t R + r, so a panel of
// columns uses each key R times. Scores stand transposed, keys down and columns across: maxima and sums of the softmax run down,
// lane by lane, and keys and values are read as they lie in memory.
//
//     forward   S' = K Q'   P' = 2^(c S' - top)   O' += V' P'                            c = log2 e / sqrt K
//     backward  S' and P' again, dP' = V dO'   dS' = P' (dP' - delta)   dV += P' dO   dK += dS' Q   dQ' += K' dS'
//
// Source: Dao et al. 2022, arXiv 2205.14135, algorithms 1 and 4. A column's result depends on neither its batch nor the number of
// threads; sums over columns (dK, dV) depend on the number of threads only through how many partial sums there are.
#include <algorithm>
#include <cmath>

#include "words.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

using namespace seqzoo;

extern "C" struct Call {  // as in cpp.py
  int64_t B, H, G, T, S, K, V, window, threads;
  int64_t q_step[3], k_step[3], v_step[3], d_o_step[3];  // elements between batches, heads, tokens
  const void *q, *k, *v;
  const int64_t *query_document, *key_document;  // [B, T] and [B, S], or null
  void* o;                                       // [B, T, H, V]
  float* logsum;                                 // [B, G, T R], log2 of the sum of 2^(c s); or null
  const void* d_o;
  void *dq, *dk, *dv;  // [B, T, H, K], [B, S, G, K], [B, S, G, V]
  float* room;         // scratch, as many floats as causal_attention_room says
};

namespace {

constexpr int KEYS = 96;        // keys in a tile: a multiple of WIDE_ROWS, and of 2 for pairs
constexpr int PANELS = 4;       // panels that share a tile, at most
constexpr int BACK_PANELS = 2;  // panels of the backward pass, whose columns are summed over in one product
constexpr int FEW = 8;          // columns up to which dot products beat panels
constexpr long PART = 512;      // keys of a part where few queries share their keys out
constexpr long SMALL = 1 << 20;  // multiply-adds that are worth a thread: some 20 microseconds, waking one costs 5 or far more

struct Sizes {
  long R, columns, KW, VW, KP, VP;  // columns per key head; words per row of K and V; widths in whole vectors
  float c;
};
template <typename T> Sizes sizes(const Call& a) {
  const long R = a.H / a.G;
  return {R, a.T * R, words<T>(a.K), words<T>(a.V), padded(a.K), padded(a.V), 1.44269504088896341f / std::sqrt((float)a.K)};
}

struct Scratch {  // cuts pieces of whole cache lines off a buffer; without one it only counts
  float* base;
  long used = 0;
  template <typename X = float> X* take(long floats) {
    X* piece = base ? (X*)(base + used) : nullptr;
    used += (floats + 15) / 16 * 16;
    return piece;
  }
};

int thread() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Numbers of the smallest and largest document in every tile of keys, so that tiles of other documents are passed over.
struct Extent {
  int32_t low, high;
};
long key_tiles(const Call& a) { return (a.S + KEYS - 1) / KEYS; }
void extents(const Call& a, Extent* to) {
  for (long b = 0; b < a.B; b++)
    for (long j0 = 0; j0 < a.S; j0 += KEYS) {
      const int64_t* d = a.key_document + b * a.S;
      int64_t low = d[j0], high = d[j0];
      for (long j = j0 + 1; j < std::min(j0 + KEYS, (long)a.S); j++) low = std::min(low, d[j]), high = std::max(high, d[j]);
      *to++ = {(int32_t)low, (int32_t)high};
    }
}

// Up to PANEL columns of one key head: where they stand and what they may see.
struct Panel {
  long first, cols, vectors;
  long lowest, highest;  // keys [lowest, highest) that any column sees
  long own_low, own_high;  // the columns' own positions among the keys, first and last
  Extent document;
  alignas(64) int32_t position[PANEL], of[PANEL], token[PANEL], head[PANEL];  // head: among those of the key head
  alignas(64) float top[PANEL], sum[PANEL];

  void place(const Call& a, const Sizes& z, long b, long at, bool documents) {
    first = at, cols = std::min((long)PANEL, z.columns - at), vectors = (cols + LANES - 1) / LANES;
    own_low = a.S - a.T + first / z.R, own_high = a.S - a.T + (first + cols - 1) / z.R;
    lowest = a.window ? std::max(0L, own_low - (long)a.window + 1) : 0, highest = own_high + 1;
    document = {0x7fffffff, -2};
    long t = first / z.R, r = first % z.R;
    for (long i = 0; i < PANEL; i++) {  // those beyond the last column stand where it stands
      if (i && i < cols && ++r == z.R) r = 0, t++;
      position[i] = (int32_t)(a.S - a.T + t), token[i] = (int32_t)t, head[i] = (int32_t)r;
      if (!documents) continue;
      const int64_t d = a.query_document[b * a.T + t];
      of[i] = d < 0 ? -2 : (int32_t)d;  // -1 is the number of keys that nobody sees
      document = {std::min(document.low, of[i]), std::max(document.high, of[i])};
    }
  }
  // The part [from, to) of keys [j0, j1) to look at, `from` even as seen from j0; empty if nothing is seen.
  std::pair<long, long> part(long j0, long j1, const Extent* tile) const {
    if (tile && (tile->low > document.high || tile->high < document.low)) return {0, 0};
    const long from = std::max(j0, lowest), to = std::min(j1, highest);
    return {from - ((from - j0) & 1), to};
  }
  bool sees_all(const Call& a, long from, long to, const Extent* tile) const {
    if (to - 1 > own_low || (a.window && from <= own_high - a.window)) return false;
    return !tile || (tile->low == tile->high && document.low == document.high && tile->low == document.low);
  }
  VecInt seen(const Call& a, const int64_t* key_document, long key, int j) const {  // lanes that see that key
    const VecInt at = load_words(position + j * LANES), here = (int32_t)key + VecInt{};
    VecInt yes = at >= here;
    if (a.window) yes &= at - (int32_t)a.window < here;
    if (key_document) yes &= load_words(of + j * LANES) == (int32_t)key_document[key] + VecInt{};
    return yes;
  }
};

template <typename T> const T* row_of(const void* x, const int64_t* step, long b, long h, long t) {
  return (const T*)x + b * step[0] + h * step[1] + t * step[2];
}
template <typename T> const T* column(const Sizes& z, const Panel& p, long c, const void* x, const int64_t* step, long b, long g) {
  return row_of<T>(x, step, b, g * z.R + p.head[c], p.token[c]);
}

template <typename T> void copy_row(Word* to, const T* from, long width) {  // an odd width is completed with a zero
  if (width % PER_WORD<T>) to[width / PER_WORD<T>] = 0;
  memcpy(to, from, width * sizeof(T));
}

// to [words, PANEL] = the panel's columns, transposed; columns beyond the last are zero.
template <typename T>
void transposed(const Sizes& z, const Panel& p, const void* x, const int64_t* step, long b, long g, long width, Word* to) {
  const long n = words<T>(width);
  for (long c0 = 0; c0 < p.vectors * LANES; c0 += LANES)
    for (long k0 = 0; k0 < n; k0 += LANES) {
      VecInt r[LANES] = {};
      const long left = std::min(width - k0 * PER_WORD<T>, (long)LANES * PER_WORD<T>);
      for (long c = c0; c < std::min(c0 + LANES, p.cols); c++)
        memcpy(&r[c - c0], column<T>(z, p, c, x, step, b, g) + k0 * PER_WORD<T>, left * sizeof(T));
      transpose_square(r);
      for (long k = 0; k < LANES && k0 + k < n; k++) store_words(to + (k0 + k) * PANEL + c0, r[k]);
    }
}

// to [words of n rows, width]: rows from(0), from(1).. with words that run down, one float or a pair of rows.
template <typename T, typename From> void stacked(Word* to, long to_row, long n, long width, From from) {
  for (long i = 0; i < n; i += PER_WORD<T>, to += to_row) {
    if constexpr (std::is_same_v<T, float>) {
      memcpy(to, from(i), width * sizeof(float));
    } else {
      const bf16 *low = from(i), *high = i + 1 < n ? from(i + 1) : nullptr;
      long j = 0;
      if (high)
        for (; j + LANES <= width; j += LANES)
          store_words(to + j, (VecInt)((VecBits)widen(low + j) >> 16 | (VecBits)widen(high + j)));
      for (; j < width; j++) to[j] = (Word)(low[j] | (high ? (uint32_t)high[j] << 16 : 0u));
    }
  }
}

// to [B, T, H, width] at the panel's columns = factor * x [width, PANEL] transposed.
template <typename T>
void untransposed(const Call& a, const Sizes& z, const Panel& p, const float* x, const float* factor, void* to, long b, long g, long width) {
  const int64_t step[3] = {a.T * a.H * width, width, a.H * width};
  for (long c0 = 0; c0 < p.cols; c0 += LANES)
    for (long v0 = 0; v0 < width; v0 += LANES) {
      VecInt r[LANES] = {};
      for (long v = v0; v < std::min(v0 + LANES, width); v++) r[v - v0] = (VecInt)(load(x + v * PANEL + c0) * load(factor + c0));
      transpose_square(r);
      for (long c = c0; c < std::min(c0 + LANES, p.cols); c++) {
        T* row = (T*)column<T>(z, p, c, to, step, b, g) + v0;
        if (width - v0 >= LANES) narrow(row, (Vec)r[c - c0]);
        else store_row(row, (const float*)&r[c - c0], (int)(width - v0));
      }
    }
}

// ---- forward: the softmax of a panel over part of a tile ----

// Scores s [n, PANEL] of keys from `from` on become weights (for bf16 pairs of keys, in `w`); top, sum and o go along.
template <typename T, int NV>
void soften(Panel& p, float c, float* s, long n, Word* w, float* o, long V, bool first) {
  Vec top[NV], sum[NV], base[NV];
  VecInt grew{};
  for (int j = 0; j < NV; j++) top[j] = load(p.top + j * LANES);
  for (long i = 0; i < n; i++)
    for (int j = 0; j < NV; j++) top[j] = larger(load(s + i * PANEL + j * LANES), top[j]);
  Vec shrink[NV];
  for (int j = 0; j < NV; j++) {
    const Vec old = load(p.top + j * LANES), safe = top[j] == -INFINITY ? Vec{} : top[j];  // nothing seen yet: no -inf - -inf
    grew |= top[j] > old;
    base[j] = safe * c, shrink[j] = exp2((old - safe) * c);
    sum[j] = load(p.sum + j * LANES) * shrink[j];
    store(p.top + j * LANES, top[j]);
  }
  int any = 0;
  for (int i = 0; i < LANES; i++) any |= grew[i];
  if (any && !first)
    for (long v = 0; v < V; v++)
      for (int j = 0; j < NV; j++) store(o + v * PANEL + j * LANES, load(o + v * PANEL + j * LANES) * shrink[j]);
  for (long i = 0; i < n; i += PER_WORD<T>)
    for (int j = 0; j < NV; j++) {
      float* at = s + i * PANEL + j * LANES;
      const Vec x = exp2(load(at) * c - base[j]);
      sum[j] += x;
      if constexpr (std::is_same_v<T, float>) {
        store(at, x);
      } else {
        const Vec y = i + 1 < n ? exp2(load(at + PANEL) * c - base[j]) : Vec{};
        sum[j] += y;
        store_words(w + i / 2 * PANEL + j * LANES, pairs(x, y));
      }
    }
  for (int j = 0; j < NV; j++) store(p.sum + j * LANES, sum[j]);
}

void hide(const Call& a, const Panel& p, const int64_t* key_document, long from, long to, float* s) {
  for (long key = from; key < to; key++, s += PANEL)
    for (int j = 0; j < p.vectors; j++)
      store(s + j * LANES, p.seen(a, key_document, key, j) ? load(s + j * LANES) : broadcast(-INFINITY));
}

template <typename T> struct Tiles {  // a thread's buffers of the forward pass
  Word *k, *v, *w, *q[PANELS];
  float *s, *o[PANELS];
  Panel* panel;

  Tiles(const Call& a, Scratch room, int panels) {
    const Sizes z = sizes<T>(a);
    k = room.take<Word>(KEYS * z.KW), v = room.take<Word>(KEYS / PER_WORD<T> * a.V), s = room.take(KEYS * PANEL);
    w = PER_WORD<T> > 1 ? room.take<Word>(KEYS / 2 * PANEL) : (Word*)s;
    panel = room.take<Panel>(panels * sizeof(Panel) / sizeof(float));
    for (int i = 0; i < panels; i++) q[i] = room.take<Word>(z.KW * PANEL), o[i] = room.take(a.V * PANEL);
    end = room.used;
  }
  long end;
};

// Panels of columns from `at` on, over keys [low, high): leaves o unnormalised, top and sum in each panel.
template <typename T>
void look(const Call& a, const Sizes& z, Tiles<T>& w, int panels, long b, long g, long at, long low, long high, const Extent* extent) {
  const int64_t* key_document = a.key_document ? a.key_document + b * a.S : nullptr;
  bool fresh[PANELS];
  for (int i = 0; i < panels; i++) {
    Panel& p = w.panel[i];
    p.place(a, z, b, at + i * PANEL, key_document);
    transposed<T>(z, p, a.q, a.q_step, b, g, a.K, w.q[i]);
    for (int c = 0; c < PANEL; c++) p.top[c] = -INFINITY, p.sum[c] = 0;
    fresh[i] = true;
  }
  low = std::max(low, w.panel[0].lowest), high = std::min(high, w.panel[panels - 1].highest);
  for (long t = low / KEYS; t * KEYS < high; t++) {
    const long j0 = std::max(t * KEYS, low & ~1L), j1 = std::min((t + 1) * KEYS, high);
    const Extent* tile = extent ? extent + t : nullptr;
    bool packed = false;
    for (int i = 0; i < panels; i++) {
      Panel& p = w.panel[i];
      const auto [from, to] = p.part(j0, j1, tile);
      if (from >= to) continue;
      if (!packed) {
        for (long j = j0; j < j1; j++) copy_row<T>(w.k + (j - j0) * z.KW, row_of<T>(a.k, a.k_step, b, g, j), a.K);
        stacked<T>(w.v, a.V, j1 - j0, a.V, [&](long j) { return row_of<T>(a.v, a.v_step, b, g, j0 + j); });
        packed = true;
      }
      const long n = to - from;
      product<T>(n, p.vectors, z.KW, {w.k + (from - j0) * z.KW, z.KW, 1}, w.q[i], PANEL, w.s, PANEL, false);
      if (!p.sees_all(a, from, to, tile)) hide(a, p, key_document, from, to, w.s);
      using Soften = decltype(&soften<T, 1>);
      static constexpr Soften SOFTEN[] = {soften<T, 1>, soften<T, 2>, soften<T, WIDE == 4 ? 3 : 1>, soften<T, WIDE>};
      SOFTEN[p.vectors == WIDE ? 3 : p.vectors - 1](p, z.c, w.s, n, w.w, w.o[i], a.V, fresh[i]);
      product<T>(a.V, p.vectors, words<T>(n), {w.v + (from - j0) / PER_WORD<T> * a.V, 1, a.V}, w.w, PANEL, w.o[i], PANEL, !fresh[i]);
      fresh[i] = false;
    }
  }
  for (int i = 0; i < panels; i++)
    if (fresh[i]) memset(w.o[i], 0, a.V * PANEL * sizeof(float));
}

// The panel's outputs and logarithms of sums, from o [V, PANEL].
template <typename T> void finish(const Call& a, const Sizes& z, Panel& p, long b, long g, const float* o) {
  alignas(64) float factor[PANEL];
  for (long c = 0; c < PANEL; c++) factor[c] = p.sum[c] == 0 ? 0 : 1 / p.sum[c];
  untransposed<T>(a, z, p, o, factor, a.o, b, g, a.V);
  if (!a.logsum) return;
  for (long c = 0; c < p.cols; c++)
    a.logsum[(b * a.G + g) * z.columns + p.first + c] = p.sum[c] == 0 ? INFINITY : p.top[c] * z.c + std::log2(p.sum[c]);
}

// ---- forward: few columns ----

struct Dots {  // a thread's buffers: queries, keys and values in fp32, scores
  float *q, *k, *v, *s;
  Panel* panel;
  Dots(const Call& a, const Sizes& z, Scratch room) {
    q = room.take(FEW * z.KP), k = room.take(KEYS * z.KP), v = room.take(KEYS * z.VP), s = room.take(FEW * KEYS);
    panel = room.take<Panel>(sizeof(Panel) / sizeof(float)), end = room.used;
  }
  long end;
};

// Rows of a tile in fp32 and whole vectors: where they lie if they are so already, else copied.
template <typename T> std::pair<const float*, long> wide_rows(const T* from, long step, long n, long width, float* to) {
  const long row = padded(width);
  if constexpr (std::is_same_v<T, float>)
    if (width == row) return {from, step};
  for (long i = 0; i < n; i++, from += step) {
    long j = 0;
    for (; j + LANES <= width; j += LANES) store(to + i * row + j, widen(from + j));
    if (j < width) memset(to + i * row + j, 0, LANES * sizeof(float)), load_row(to + i * row + j, from + j, (int)(width - j));
  }
  return {to, row};
}

inline void scores_of(const float* q, const float* k, long k_row, long n, long width, float* s) {
  for (long i = 0; i < n; i += LANES) {
    Vec r[LANES];
    const long some = std::min((long)LANES, n - i);
    for (long l = 0; l < LANES; l++) {
      const float* row = k + (i + std::min(l, some - 1)) * k_row;
      Vec x = load(q) * load(row);
      for (long d = LANES; d < width; d += LANES) x += load(q + d) * load(row + d);
      r[l] = x;
    }
    store(s + i, totals(r));
  }
}

template <int NV> inline void weigh(const float* w, const float* v, long v_row, long n, float shrink, float* o) {
  Vec sum[NV];
  for (int j = 0; j < NV; j++) sum[j] = load(o + j * LANES) * shrink;
  for (long i = 0; i < n; i++)
    for (int j = 0; j < NV; j++) sum[j] += w[i] * load(v + i * v_row + j * LANES);
  for (int j = 0; j < NV; j++) store(o + j * LANES, sum[j]);
}

// All columns of a key head over keys [low, high), into o [columns, VP], top and sum.
template <typename T>
void look_few(const Call& a, const Sizes& z, Dots& w, long b, long g, long low, long high, const Extent* extent, float* o, float* top,
              float* sum) {
  const int64_t* key_document = a.key_document ? a.key_document + b * a.S : nullptr;
  Panel& p = *w.panel;
  p.place(a, z, b, 0, key_document);
  memset(o, 0, z.columns * z.VP * sizeof(float));
  for (long c = 0; c < z.columns; c++) {
    top[c] = -INFINITY, sum[c] = 0;
    memset(w.q + c * z.KP, 0, z.KP * sizeof(float)), load_row(w.q + c * z.KP, column<T>(z, p, c, a.q, a.q_step, b, g), (int)a.K);
  }
  low = std::max(low, p.lowest), high = std::min(high, p.highest);
  for (long t = low / KEYS; t * KEYS < high; t++) {
    const long j0 = std::max(t * KEYS, low), n = std::min((t + 1) * KEYS, high) - j0;
    const Extent* tile = extent ? extent + t : nullptr;
    if (tile && (tile->low > p.document.high || tile->high < p.document.low)) continue;
    const auto [k, k_row] = wide_rows(row_of<T>(a.k, a.k_step, b, g, j0), a.k_step[2], n, a.K, w.k);
    const auto [v, v_row] = wide_rows(row_of<T>(a.v, a.v_step, b, g, j0), a.v_step[2], n, a.V, w.v);
    const bool whole = p.sees_all(a, j0, j0 + n, tile);
    for (long c = 0; c < z.columns; c++) {
      float* s = w.s + c * KEYS;
      scores_of(w.q + c * z.KP, k, k_row, n, z.KP, s);
      const long end = padded(n);
      for (long i = n; i < end; i++) s[i] = -INFINITY;
      if (!whole)
        for (long i = 0; i < n; i++) {
          const long back = p.position[c] - (j0 + i);
          if (back < 0 || (a.window && back >= a.window) || (key_document && key_document[j0 + i] != p.of[c])) s[i] = -INFINITY;
        }
      Vec most = broadcast(top[c]), total{};
      for (long i = 0; i < end; i += LANES) most = larger(load(s + i), most);
      float now = most[0];
      for (int i = 1; i < LANES; i++) now = most[i] > now ? most[i] : now;
      if (now == -INFINITY) continue;
      for (long i = 0; i < end; i += LANES) {
        const Vec x = exp2((load(s + i) - now) * z.c);
        total += x, store(s + i, x);
      }
      Vec shrinks = exp2(broadcast((top[c] - now) * z.c));
      const float shrink = shrinks[0];
      float added = 0;
      for (int i = 0; i < LANES; i++) added += total[i];
      sum[c] = sum[c] * shrink + added, top[c] = now;
      long d = 0;
      for (; d + WIDE * LANES <= z.VP; d += WIDE * LANES) weigh<WIDE>(s, v + d, v_row, n, shrink, o + c * z.VP + d);
      for (; d < z.VP; d += LANES) weigh<1>(s, v + d, v_row, n, shrink, o + c * z.VP + d);
    }
  }
}

// ---- forward: how the work is shared out ----

struct Plan {
  bool few;          // dot products instead of panels
  long parts, keys;  // the keys of a single panel, cut up
  int panels;        // that share a tile
  long blocks, threads, tasks;
};
template <typename T> Plan plan(const Call& a) {
  const Sizes z = sizes<T>(a);
  Plan x{};
  x.few = z.columns <= FEW;
  x.parts = z.columns <= PANEL ? (a.S + PART - 1) / PART : 1;
  x.keys = ((a.S + x.parts - 1) / x.parts + KEYS - 1) / KEYS * KEYS;  // tiles are not cut
  x.parts = (a.S + x.keys - 1) / x.keys;
  const long panels = (z.columns + PANEL - 1) / PANEL;
  x.panels = (int)std::clamp(panels * a.B * a.G / (4 * a.threads), 1L, (long)PANELS);
  x.blocks = (panels + x.panels - 1) / x.panels;
  x.tasks = a.B * a.G * x.blocks * x.parts;
  const long seen = a.window ? std::min(a.window, a.S) : a.S;
  const long work = a.B * a.G * z.columns * seen * (a.K + a.V);
  x.threads = std::clamp(std::min(work / SMALL, x.tasks), 1L, (long)a.threads);
  return x;
}

template <typename T> long thread_room(const Call& a, const Plan& x) {
  return x.few ? Dots(a, sizes<T>(a), {nullptr}).end : Tiles<T>(a, {nullptr}, x.panels).end;
}
long part_room(const Sizes& z, const Call& a, bool few) {  // top and sum, then o
  return 2 * PANEL + (few ? FEW * z.VP : PANEL * a.V);
}
long extent_room(const Call& a) { return a.key_document ? (a.B * key_tiles(a) * 2 + 15) / 16 * 16 : 0; }

template <typename T> long forward_room(const Call& a) {
  const Plan x = plan<T>(a);
  const long kept = x.few || x.parts > 1 ? x.tasks * part_room(sizes<T>(a), a, x.few) : 0;
  return extent_room(a) + x.threads * thread_room<T>(a, x) + kept;
}

// Parts of one key head's keys put together, in their order, into p's top and sum and o [V, PANEL].
void join(const Call& a, const Sizes& z, const Plan& x, Panel& p, const float* part, float* o) {
  const long step = part_room(z, a, x.few);
  for (long c = 0; c < p.cols; c++) {
    float top = -INFINITY, sum = 0;
    for (long i = 0; i < x.parts; i++) top = std::max(top, part[i * step + c]);
    for (long v = 0; v < a.V; v++) o[v * PANEL + c] = 0;
    for (long i = 0; i < x.parts && top > -INFINITY; i++) {
      const float* from = part + i * step;
      const float factor = exp2(broadcast((from[c] - top) * z.c))[0];
      sum += from[PANEL + c] * factor;
      const float* value = from + 2 * PANEL + (x.few ? c * z.VP : c);
      for (long v = 0; v < a.V; v++) o[v * PANEL + c] += value[x.few ? v : v * PANEL] * factor;
    }
    p.top[c] = top, p.sum[c] = sum;
  }
  for (long c = p.cols; c < PANEL; c++) p.sum[c] = 0;  // their o is whatever it is: it goes nowhere
}

template <typename T> void forward(const Call& a) {
  const Sizes z = sizes<T>(a);
  const Plan x = plan<T>(a);
  Extent* extent = a.key_document ? (Extent*)a.room : nullptr;
  if (extent) extents(a, extent);
  float* threads = a.room + extent_room(a);
  const long one = thread_room<T>(a, x), kept = part_room(z, a, x.few);
  float* parts = threads + x.threads * one;
  const bool joined = x.few || x.parts > 1;
#pragma omp parallel for schedule(dynamic, 1) num_threads(x.threads)
  for (long task = 0; task < x.tasks; task++) {
    const long heads = a.B * a.G, bg = joined ? task / x.parts : task % heads, b = bg / a.G, g = bg % a.G;
    const Extent* own = extent ? extent + b * key_tiles(a) : nullptr;
    Scratch room{threads + thread() * one};
    const long low = joined ? task % x.parts * x.keys : 0, high = joined ? std::min(low + x.keys, (long)a.S) : a.S;
    float* part = parts + task * kept;
    if (x.few) {
      Dots w(a, z, room);
      look_few<T>(a, z, w, b, g, low, high, own, part + 2 * PANEL, part, part + PANEL);
      continue;
    }
    Tiles<T> w(a, room, x.panels);
    const long block = x.blocks - 1 - task / heads;  // the longest first
    const long at = joined ? 0 : block * x.panels * PANEL, panels = std::min((long)x.panels, (z.columns - at + PANEL - 1) / PANEL);
    look<T>(a, z, w, (int)panels, b, g, at, low, high, own);
    if (!joined) {
      for (int i = 0; i < panels; i++) finish<T>(a, z, w.panel[i], b, g, w.o[i]);
      continue;
    }
    memcpy(part, w.panel->top, sizeof w.panel->top), memcpy(part + PANEL, w.panel->sum, sizeof w.panel->sum);
    memcpy(part + 2 * PANEL, w.o[0], PANEL * a.V * sizeof(float));
  }
  if (!joined) return;
  for (long bg = 0; bg < a.B * a.G; bg++) {
    Panel p;
    p.place(a, z, bg / a.G, 0, false);
    float* o = threads;  // the threads are done with theirs
    join(a, z, x, p, parts + bg * x.parts * kept, o);
    finish<T>(a, z, p, bg / a.G, bg % a.G, o);
  }
}

// ---- backward ----

constexpr int COLS = BACK_PANELS * PANEL;

template <typename T> struct BackTiles {  // a thread's buffers; `_down` runs down the summed axis in words
  Word *k, *v, *k_down, *q[BACK_PANELS], *d_o[BACK_PANELS], *q_down, *d_o_down, *p, *ds, *ds_down;
  float *s, *dp, *dq[BACK_PANELS], *logsum, *delta;
  Panel* panel;
  long end;

  BackTiles(const Call& a, Scratch room) {
    const Sizes z = sizes<T>(a);
    constexpr long N = PER_WORD<T>;
    k = room.take<Word>(KEYS * z.KW), v = room.take<Word>(KEYS * z.VW);
    k_down = N > 1 ? room.take<Word>(KEYS / N * a.K) : k;
    q_down = room.take<Word>(COLS / N * z.KP), d_o_down = room.take<Word>(COLS / N * z.VP);
    s = room.take(KEYS * COLS), dp = room.take(KEYS * PANEL);
    p = N > 1 ? room.take<Word>(KEYS * COLS / N) : (Word*)s, ds = room.take<Word>(KEYS * COLS / N);
    ds_down = N > 1 ? room.take<Word>(KEYS / N * PANEL) : nullptr;
    logsum = room.take(COLS), delta = room.take(COLS);
    panel = room.take<Panel>(BACK_PANELS * sizeof(Panel) / sizeof(float));
    for (int i = 0; i < BACK_PANELS; i++)
      q[i] = room.take<Word>(z.KW * PANEL), d_o[i] = room.take<Word>(z.VW * PANEL), dq[i] = room.take(a.K * PANEL);
    end = room.used;
  }
};

// Rows of all columns of a block with words that run down; rows beyond the last column are zero.
template <typename T>
void columns_down(const Sizes& z, const Panel* p, const void* x, const int64_t* step, long b, long g, long n, long width, Word* to) {
  const long row = padded(width);
  memset(to, 0, COLS / PER_WORD<T> * row * sizeof(Word));
  stacked<T>(to, row, n, width, [&](long c) { return column<T>(z, p[c / PANEL], c % PANEL, x, step, b, g); });
}

template <typename T> float product_sum(const T* x, const T* y, long width) {
  Vec sum{};
  long j = 0;
  for (; j + LANES <= width; j += LANES) sum += widen(x + j) * widen(y + j);
  float rest = 0;
  for (; j < width; j++) {
    float a, b;
    load_row(&a, x + j, 1), load_row(&b, y + j, 1);
    rest += a * b;
  }
  for (int i = 0; i < LANES; i++) rest += sum[i];
  return rest;
}

// Scores s and dp [n, PANEL] become p and ds as words along the columns, and ds down the keys. s and p have rows of COLS columns.
template <typename T, int NV>
void differ(const Call& a, const Panel& p, float c, const float* logsum, const float* delta, const int64_t* key_document, bool whole,
            long from, long n, float* s, const float* dp, Word* weights, Word* ds, Word* ds_down) {
  constexpr int N = PER_WORD<T>;
  Vec sum[NV], d[NV];
  for (int j = 0; j < NV; j++) sum[j] = load(logsum + j * LANES), d[j] = load(delta + j * LANES);
  for (long i = 0; i < n; i += N) {
    Vec x[N][NV], y[N][NV];
    for (int l = 0; l < N; l++)
      for (int j = 0; j < NV; j++) {
        x[l][j] = y[l][j] = Vec{};
        if (i + l >= n) continue;
        const Vec weight = exp2(load(s + (i + l) * COLS + j * LANES) * c - sum[j]);
        x[l][j] = whole ? weight : p.seen(a, key_document, from + i + l, j) ? weight : Vec{};
        y[l][j] = x[l][j] * (load(dp + (i + l) * PANEL + j * LANES) - d[j]);
      }
    for (int j = 0; j < NV; j++)
      if constexpr (N == 1) {
        store((float*)weights + i * COLS + j * LANES, x[0][j]), store((float*)ds + i * COLS + j * LANES, y[0][j]);
      } else {
        for (int l = 0; l < N && i + l < n; l++) {
          narrow((bf16*)(weights + (i + l) * (COLS / 2)) + j * LANES, x[l][j]);
          narrow((bf16*)(ds + (i + l) * (COLS / 2)) + j * LANES, y[l][j]);
        }
        store_words(ds_down + i / 2 * PANEL + j * LANES, pairs(y[0][j], y[1][j]));
      }
  }
}

// One block of columns over all keys it sees: writes its dQ, adds to dk [S, KP] and dv [S, VP].
template <typename T>
void differentiate(const Call& a, const Sizes& z, BackTiles<T>& w, long b, long g, long at, const Extent* extent, float* dk, float* dv) {
  constexpr int N = PER_WORD<T>;
  const int64_t* key_document = a.key_document ? a.key_document + b * a.S : nullptr;
  const long cols = std::min((long)COLS, z.columns - at), panels = (cols + PANEL - 1) / PANEL;
  const int64_t o_step[3] = {a.T * a.H * a.V, a.V, a.H * a.V};
  long used = 0;
  for (long i = 0; i < panels; i++) {
    Panel& p = w.panel[i];
    p.place(a, z, b, at + i * PANEL, key_document);
    transposed<T>(z, p, a.q, a.q_step, b, g, a.K, w.q[i]), transposed<T>(z, p, a.d_o, a.d_o_step, b, g, a.V, w.d_o[i]);
    memset(w.dq[i], 0, a.K * PANEL * sizeof(float));
    used += p.vectors * LANES;
    for (long c = 0; c < PANEL; c++) {
      const bool real = c < p.cols;  // the weights of the others are 2^-inf
      const T *o = column<T>(z, p, c, a.o, o_step, b, g), *d_o = column<T>(z, p, c, a.d_o, a.d_o_step, b, g);
      w.logsum[i * PANEL + c] = real ? a.logsum[(b * a.G + g) * z.columns + p.first + c] : INFINITY;
      w.delta[i * PANEL + c] = real ? product_sum(o, d_o, a.V) : 0;
    }
  }
  columns_down<T>(z, w.panel, a.q, a.q_step, b, g, cols, a.K, w.q_down);
  columns_down<T>(z, w.panel, a.d_o, a.d_o_step, b, g, cols, a.V, w.d_o_down);
  const long low = w.panel[0].lowest, high = w.panel[panels - 1].highest;
  for (long t = low / KEYS; t * KEYS < high; t++) {
    const long j0 = std::max(t * KEYS, low & ~1L), j1 = std::min((t + 1) * KEYS, high), n = j1 - j0;
    const Extent* tile = extent ? extent + t : nullptr;
    bool packed = false;
    for (long i = 0; i < panels; i++) {
      Panel& p = w.panel[i];
      const long aside = i * PANEL;  // where the panel's columns stand among the block's
      float* s = w.s + aside;
      const auto [from, to] = p.part(j0, j1, tile);
      const long skip = std::max(0L, from - j0), some = std::max(0L, to - from);
      if (some && !packed) {
        for (long j = j0; j < j1; j++) {
          copy_row<T>(w.k + (j - j0) * z.KW, row_of<T>(a.k, a.k_step, b, g, j), a.K);
          copy_row<T>(w.v + (j - j0) * z.VW, row_of<T>(a.v, a.v_step, b, g, j), a.V);
        }
        if constexpr (N > 1) stacked<T>(w.k_down, a.K, n, a.K, [&](long j) { return row_of<T>(a.k, a.k_step, b, g, j0 + j); });
        for (long before = 0; before < i; before++)  // those panels saw nothing here
          for (long j = 0; j < n; j++) {
            memset(w.p + (j * COLS + before * PANEL) / N, 0, PANEL / N * sizeof(Word));
            memset(w.ds + (j * COLS + before * PANEL) / N, 0, PANEL / N * sizeof(Word));
          }
        packed = true;
      }
      if (!packed) continue;
      for (long j = 0; j < n; j++)
        if (j < skip || j >= skip + some) {
          memset(w.p + (j * COLS + aside) / N, 0, PANEL / N * sizeof(Word));
          memset(w.ds + (j * COLS + aside) / N, 0, PANEL / N * sizeof(Word));
        }
      if (!some) continue;
      product<T>(some, p.vectors, z.KW, {w.k + skip * z.KW, z.KW, 1}, w.q[i], PANEL, s + skip * COLS, COLS, false);
      product<T>(some, p.vectors, z.VW, {w.v + skip * z.VW, z.VW, 1}, w.d_o[i], PANEL, w.dp, PANEL, false);
      Word *weights = w.p + (skip * COLS + aside) / N, *ds = w.ds + (skip * COLS + aside) / N;
      using Differ = decltype(&differ<T, 1>);
      static constexpr Differ DIFFER[] = {differ<T, 1>, differ<T, 2>, differ<T, WIDE == 4 ? 3 : 1>, differ<T, WIDE>};
      DIFFER[p.vectors == WIDE ? 3 : p.vectors - 1](a, p, z.c, w.logsum + aside, w.delta + aside, key_document,
                                                    p.sees_all(a, from, to, tile), from, some, s + skip * COLS, w.dp, weights, ds,
                                                    w.ds_down);
      if constexpr (N == 1) product<T>(a.K, p.vectors, some, {w.k + skip * z.KW, 1, z.KW}, ds, COLS, w.dq[i], PANEL, true);
      else product<T>(a.K, p.vectors, words<T>(some), {w.k_down + skip / 2 * a.K, 1, a.K}, w.ds_down, PANEL, w.dq[i], PANEL, true);
    }
    if (!packed) continue;
    product<T>(n, z.VP / LANES, used / N, {w.p, COLS / N, 1}, w.d_o_down, z.VP, dv + j0 * z.VP, z.VP, true);
    product<T>(n, z.KP / LANES, used / N, {w.ds, COLS / N, 1}, w.q_down, z.KP, dk + j0 * z.KP, z.KP, true);
  }
  alignas(64) float factor[PANEL];
  for (float& x : factor) x = 1 / std::sqrt((float)a.K);
  for (long i = 0; i < panels; i++)
    untransposed<T>(a, z, w.panel[i], w.dq[i], factor, a.dq, b, g, a.K);
}

struct BackPlan {
  long blocks, shares, tasks, threads;  // the blocks of a key head are dealt out to so many tasks with sums of their own
};
template <typename T> BackPlan back_plan(const Call& a) {
  const Sizes z = sizes<T>(a);
  const long heads = a.B * a.G, blocks = (z.columns + COLS - 1) / COLS, threads = a.threads;
  long shares = 1;  // as few as keep three quarters of the threads busy
  while (shares < blocks && 4 * heads * shares < 3 * threads * ((heads * shares + threads - 1) / threads)) shares++;
  const long seen = a.window ? std::min(a.window, a.S) : a.S, work = heads * z.columns * seen * (a.K + a.V);
  return {blocks, shares, heads * shares, std::clamp(work / SMALL, 1L, std::min(threads, heads * shares))};
}
template <typename T> long backward_room(const Call& a) {
  const Sizes z = sizes<T>(a);
  const BackPlan x = back_plan<T>(a);
  return extent_room(a) + x.threads * BackTiles<T>(a, {nullptr}).end + x.tasks * a.S * (z.KP + z.VP);
}

template <typename T> void gather(const float* from, long step, long shares, long width, float factor, T* to) {
  alignas(64) float sums[LANES];
  for (long d = 0; d < width; d += LANES) {
    Vec sum = load(from + d);
    for (long i = 1; i < shares; i++) sum += load(from + i * step + d);
    sum = sum * factor;
    if (width - d >= LANES) narrow(to + d, sum);
    else store(sums, sum), store_row(to + d, sums, (int)(width - d));
  }
}

template <typename T> void backward(const Call& a) {
  const Sizes z = sizes<T>(a);
  const BackPlan x = back_plan<T>(a);
  Extent* extent = a.key_document ? (Extent*)a.room : nullptr;
  if (extent) extents(a, extent);
  float* threads = a.room + extent_room(a);
  const long one = BackTiles<T>(a, {nullptr}).end, kept = a.S * (z.KP + z.VP), heads = a.B * a.G;
  float* sums = threads + x.threads * one;
#pragma omp parallel num_threads(x.threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (long task = 0; task < x.tasks; task++) {
      const long bg = task / x.shares, share = task % x.shares, b = bg / a.G;
      float *dk = sums + task * kept, *dv = dk + a.S * z.KP;
      memset(dk, 0, kept * sizeof(float));
      BackTiles<T> w(a, {threads + thread() * one});
      for (long round = 0; round * x.shares < x.blocks; round++) {
        const long block = round * x.shares + (round % 2 ? x.shares - 1 - share : share);  // to and fro: equal shares of the triangle
        if (block >= x.blocks) continue;
        differentiate<T>(a, z, w, b, bg % a.G, block * COLS, extent ? extent + b * key_tiles(a) : nullptr, dk, dv);
      }
    }
#pragma omp for schedule(static)
    for (long row = 0; row < heads * a.S; row++) {
      const long bg = row / a.S, j = row % a.S, out = (bg / a.G * a.S + j) * a.G + bg % a.G;
      const float* dk = sums + bg * x.shares * kept;
      gather<T>(dk + j * z.KP, kept, x.shares, a.K, 1 / std::sqrt((float)a.K), (T*)a.dk + out * a.K);
      gather<T>(dk + a.S * z.KP + j * z.VP, kept, x.shares, a.V, 1, (T*)a.dv + out * a.V);
    }
  }
}

}  // namespace

extern "C" {
int64_t causal_attention_room_f32(const Call* a) { return forward_room<float>(*a); }
int64_t causal_attention_room_bf16(const Call* a) { return forward_room<bf16>(*a); }
void causal_attention_f32(const Call* a) { forward<float>(*a); }
void causal_attention_bf16(const Call* a) { forward<bf16>(*a); }
int64_t causal_attention_backward_room_f32(const Call* a) { return backward_room<float>(*a); }
int64_t causal_attention_backward_room_bf16(const Call* a) { return backward_room<bf16>(*a); }
void causal_attention_backward_f32(const Call* a) { backward<float>(*a); }
void causal_attention_backward_bf16(const Call* a) { backward<bf16>(*a); }
}
