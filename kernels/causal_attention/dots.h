// Forward, few columns: dot products over keys and values where they lie.
#pragma once
#include "columns.h"

namespace seqzoo {

struct Dots {  // a thread's buffers: queries, keys and values in fp32, scores
  float *q, *k, *v, *s;
  Panel* panel;
  Dots(const Sizes& z, Scratch room) {
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
  low = a.sinks ? low : std::max(low, p.lowest), high = std::min(high, std::max(p.highest, (long)a.sinks));
  for (long t = low / KEYS; t * KEYS < high; t = next_tile(a, t, p.lowest)) {
    const long j0 = first_key(a, t, low, p.lowest), n = std::min((t + 1) * KEYS, high) - j0;
    const Extent* tile = extent ? extent + t : nullptr;
    if (n <= 0 || (j0 >= a.sinks && tile && (tile->low > p.document.high || tile->high < p.document.low))) continue;
    const auto [k, k_row] = wide_rows(row_of<T>(a.k, a.k_step, b, g, j0), a.k_step[2], n, a.K, w.k);
    const auto [v, v_row] = wide_rows(row_of<T>(a.v, a.v_step, b, g, j0), a.v_step[2], n, a.V, w.v);
    const bool whole = p.sees_all(a, j0, j0 + n, tile);
    for (long c = 0; c < z.columns; c++) {
      float* s = w.s + c * KEYS;
      scores_of(w.q + c * z.KP, k, k_row, n, z.KP, s);
      const long end = padded(n);
      for (long i = n; i < end; i++) s[i] = -INFINITY;
      if (!whole)
        for (long i = std::max(0L, a.sinks - j0); i < n; i++) {
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

}  // namespace seqzoo
