// What both passes share: the call, panels of columns and what they may see, rows and columns brought into words.
#pragma once
#include <algorithm>
#include <cmath>

#include "words.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace seqzoo {

struct Call {  // as in cpp.py
  int64_t B, H, G, T, S, K, V, window, sinks, threads;
  int64_t q_step[3], k_step[3], v_step[3], d_o_step[3];  // elements between batches, heads, tokens
  const void *q, *k, *v;
  const int64_t *query_document, *key_document;  // [B, T] and [B, S], or null
  void* o;                                       // [B, T, H, V]
  float* logsum;                                 // [B, G, T R], log2 of the sum of 2^(c s); or null
  const void* d_o;
  void *dq, *dk, *dv;  // [B, T, H, K], [B, S, G, K], [B, S, G, V]
  float* room;         // scratch, as many floats as causal_attention_room says
};

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

inline int thread() {
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
inline long key_tiles(const Call& a) { return (a.S + KEYS - 1) / KEYS; }
inline void extents(const Call& a, Extent* to) {
  for (long b = 0; b < a.B; b++)
    for (long j0 = 0; j0 < a.S; j0 += KEYS) {
      const int64_t* d = a.key_document + b * a.S;
      int64_t low = d[j0], high = d[j0];
      for (long j = j0 + 1; j < std::min(j0 + KEYS, (long)a.S); j++) low = std::min(low, d[j]), high = std::max(high, d[j]);
      *to++ = {(int32_t)low, (int32_t)high};
    }
}

inline long extent_room(const Call& a) { return a.key_document ? (a.B * key_tiles(a) * 2 + 15) / 16 * 16 : 0; }

// The tile to look at after tile t: behind the sinks' tiles comes the one where some window begins.
inline long next_tile(const Call& a, long t, long lowest) { return (t + 1) * KEYS < a.sinks ? t + 1 : std::max(t + 1, lowest / KEYS); }
// The first key to look at in tile t.
inline long first_key(const Call& a, long t, long low, long lowest) {
  return std::max(t * KEYS, t * KEYS < a.sinks ? low : std::max(low, lowest));
}

// Up to PANEL columns of one key head: where they stand and what they may see.
struct Panel {
  long first, cols, vectors;
  long lowest, highest;  // keys [lowest, highest) that any column sees, beside the sinks
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
  std::pair<long, long> part(const Call& a, long j0, long j1, const Extent* tile) const {
    const bool other = tile && (tile->low > document.high || tile->high < document.low);
    long from = std::max(j0, lowest), to = other ? from : std::min(j1, highest);
    if (j0 < a.sinks) to = std::max(from < to ? to : j0, std::min(j1, (long)a.sinks)), from = j0;
    if (from >= to) return {0, 0};
    return {from - ((from - j0) & 1), to};
  }
  bool sees_all(const Call& a, long from, long to, const Extent* tile) const {
    if (to <= a.sinks) return true;
    if (to - 1 > own_low || (a.window && from <= own_high - a.window)) return false;
    return !tile || (tile->low == tile->high && document.low == document.high && tile->low == document.low);
  }
  VecInt seen(const Call& a, const int64_t* key_document, long key, int j) const {  // lanes that see that key
    if (key < a.sinks) return VecInt{} - 1;
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
void untransposed(const Call& a, const Sizes& z, const Panel& p, const float* x, const float* factor, void* to, long b, long g,
                  long width) {
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

}  // namespace seqzoo
