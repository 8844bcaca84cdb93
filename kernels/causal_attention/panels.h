// Forward, many columns: panels over tiles of keys, with the softmax of a tile.
#pragma once
#include "columns.h"

namespace seqzoo {

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

inline void hide(const Call& a, const Panel& p, const int64_t* key_document, long from, long to, float* s) {
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
  const long lowest = w.panel[0].lowest;
  low = a.sinks ? low : std::max(low, lowest), high = std::min(high, std::max(w.panel[panels - 1].highest, (long)a.sinks));
  for (long t = low / KEYS; t * KEYS < high; t = next_tile(a, t, lowest)) {
    const long j0 = first_key(a, t, low, lowest) & ~1L, j1 = std::min((t + 1) * KEYS, high);
    const Extent* tile = extent ? extent + t : nullptr;
    bool packed = false;
    for (int i = 0; i < panels; i++) {
      Panel& p = w.panel[i];
      const auto [from, to] = p.part(a, j0, j1, tile);
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

}  // namespace seqzoo
