// Forward: how the work is shared out, and the parts of shared-out keys put together.
#pragma once
#include "dots.h"
#include "panels.h"

namespace seqzoo {

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
  const long seen = a.window ? std::min(a.window + a.sinks, a.S) : a.S;
  const long work = a.B * a.G * z.columns * seen * (a.K + a.V);
  x.threads = std::clamp(std::min(work / SMALL, x.tasks), 1L, (long)a.threads);
  return x;
}

template <typename T> long thread_room(const Call& a, const Plan& x) {
  return x.few ? Dots(sizes<T>(a), {nullptr}).end : Tiles<T>(a, {nullptr}, x.panels).end;
}
inline long part_room(const Sizes& z, const Call& a, bool few) {  // top and sum, then o
  return 2 * PANEL + (few ? FEW * z.VP : PANEL * a.V);
}

template <typename T> long forward_room(const Call& a) {
  const Plan x = plan<T>(a);
  const long kept = x.few || x.parts > 1 ? x.tasks * part_room(sizes<T>(a), a, x.few) : 0;
  return extent_room(a) + x.threads * thread_room<T>(a, x) + kept;
}

// Parts of one key head's keys put together, in their order, into p's top and sum and o [V, PANEL].
inline void join(const Call& a, const Sizes& z, const Plan& x, Panel& p, const float* part, float* o) {
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
      Dots w(z, room);
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

}  // namespace seqzoo
