// How the work of expert_mlp is cut: slots sorted by expert, groups of experts, tasks, stripes of columns; and room to do it in.
#pragma once
#include <sys/mman.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include <algorithm>
#include <memory>
#include <vector>

#include "words.h"

namespace seqzoo {

constexpr int HALF = PANEL / 2;  // hidden units per panel of the first product: their gates, then their ups
constexpr long CHUNK = 256;  // rows per task
constexpr long GROUP_BYTES = 4 << 20, STRIPE_BYTES = 512 << 10;  // between stages of a group; of packed weights
constexpr long FEW = 8;  // rows of an expert up to which its weights are read as they are and not packed

inline long most_threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

struct Sizes {
  long N, k, E, D, I;
};
struct Expert {
  long id, first, last;  // its rows
};
struct Task {
  int expert;
  long first, last, panel;
};

struct Rows {  // the slots, sorted by expert and inside an expert by token
  std::vector<int32_t> slot, token;
  std::vector<Expert> hit;
  std::vector<std::pair<int, int>> groups;  // from hit, to hit

  bool sort(const Sizes& s, const int64_t* chosen, long bytes_per_row) {
    const long M = s.N * s.k;
    std::vector<long> next(s.E + 1);
    for (long m = 0; m < M; m++) {
      if (chosen[m] < 0 || chosen[m] >= s.E) return false;
      next[chosen[m] + 1]++;
    }
    for (long e = 0; e < s.E; e++) {
      if (next[e + 1]) hit.push_back({e, next[e], next[e] + next[e + 1]});
      next[e + 1] += next[e];
    }
    slot.resize(M), token.resize(M);
    for (long m = 0; m < M; m++) {
      const long row = next[chosen[m]]++;
      slot[row] = (int32_t)m, token[row] = (int32_t)(m / s.k);
    }
    const int n = (int)hit.size();
    for (int from = 0, to; from < n; from = to) {
      for (to = from + 1; to < n && (hit[to].last - hit[from].first) * bytes_per_row <= GROUP_BYTES;) to++;
      groups.push_back({from, to});
    }
    return true;
  }
  long rows(std::pair<int, int> group) const { return hit[group.second - 1].last - hit[group.first].first; }
  long most_rows() const {
    long most = 0;
    for (auto group : groups) most = std::max(most, rows(group));
    return most;
  }
  std::vector<Task> tasks(std::pair<int, int> group, long panels) const {
    std::vector<Task> all;
    for (int e = group.first; e < group.second; e++)
      for (long first = hit[e].first; first < hit[e].last; first += CHUNK)
        for (long p = 0; p < panels; p++) all.push_back({e, first, std::min(first + CHUNK, hit[e].last), p});
    return all;
  }
};

inline long panels_of(long columns) { return (columns + PANEL - 1) / PANEL; }
inline int panel_width(long columns, long panel) { return (int)std::min<long>(PANEL, columns - panel * PANEL); }

// A thread's own room, kept from call to call, at the start of a cache line.
inline Word* room(long n) {
  constexpr long LINE = 64;
  static thread_local std::unique_ptr<Word[]> held;
  static thread_local long size = 0;
  if (n > size) held.reset(new Word[n + LINE / sizeof(Word)]), size = n;
  return (Word*)(((uintptr_t)held.get() + LINE - 1) / LINE * LINE);
}

// Fewer, larger pages for what is written once: the first touch of a small page costs more than filling it.
inline void large_pages(void* p, long bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = 2 << 20;
  const uintptr_t first = ((uintptr_t)p + PAGE - 1) / PAGE * PAGE, last = ((uintptr_t)p + bytes) / PAGE * PAGE;
  if (p && last > first) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

inline Vec sigmoid(Vec x) {
  const Vec lowest = broadcast(-88.0f);
  return 1.0f / (1.0f + exp(-(x < lowest ? lowest : x)));
}

// What sums over experts shares out: stripes of columns, and ranges of tokens where there are more threads than stripes.
struct Stripes {
  long stripes, ranges, panels, columns, tokens;
  Stripes(long columns, long depth_bytes, long tokens) : panels(panels_of(columns)), columns(columns), tokens(tokens) {
    const long threads = most_threads(), wanted = (panels * PANEL * depth_bytes + STRIPE_BYTES - 1) / STRIPE_BYTES;
    stripes = std::min(panels, std::max(threads, wanted));
    ranges = std::max(1L, std::min((threads + stripes - 1) / stripes, tokens));
  }
  long count() const { return stripes * ranges; }
  long most_panels() const { return (panels + stripes - 1) / stripes; }
};

}  // namespace seqzoo
