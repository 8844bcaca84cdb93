// Backward: blocks of columns over tiles of keys, dK and dV summed by task.
#pragma once
#include "columns.h"

namespace seqzoo {

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
  const long lowest = w.panel[0].lowest, low = a.sinks ? 0 : lowest, high = std::max(w.panel[panels - 1].highest, (long)a.sinks);
  for (long t = low / KEYS; t * KEYS < high; t = next_tile(a, t, lowest)) {
    const long j0 = first_key(a, t, low, lowest) & ~1L, j1 = std::min((t + 1) * KEYS, high), n = j1 - j0;
    const Extent* tile = extent ? extent + t : nullptr;
    bool packed = false;
    for (long i = 0; i < panels; i++) {
      Panel& p = w.panel[i];
      const long aside = i * PANEL;  // where the panel's columns stand among the block's
      float* s = w.s + aside;
      const auto [from, to] = p.part(a, j0, j1, tile);
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
  const long seen = a.window ? std::min(a.window + a.sinks, a.S) : a.S, work = heads * z.columns * seen * (a.K + a.V);
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

}  // namespace seqzoo
