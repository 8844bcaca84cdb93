// expert_mlp on a CPU, fp32 and bf16: y_n = sum_j weight_nj down_e [ silu(gate_e x_n) * (up_e x_n) ], e = chosen_nj.
//
// A row is one slot of one token; rows are sorted by expert. Experts are taken in groups small enough that what stands between the
// stages stays in cache. Inside a group every stage shares its work out so that no two threads write the same place: the first by
// expert, rows and columns, the sums over experts by columns and tokens, the weights' gradients by expert and columns. Each sum
// has one order whatever the number of threads, so results are the same bits on every run.
//
// N tokens   k slots   E experts   D width   I width inside an expert   M = N k rows
#include "rows.h"

namespace {
using namespace seqzoo;

// out [N, columns] += a [rows, K] B_e for one stripe, expert after expert. `pack(e, panel, to)` packs B_e's columns; `direct(e, panel,
// a, n, buffer)` multiplies n rows by B_e as it stands, for experts with few rows (null where B_e does not allow that).
template <typename T, typename Pack, typename Direct>
void add_stripe(const Stripes& s, long task, const Rows& rows, std::pair<int, int> group, const T* a, long K, float* out, Pack pack,
                Direct direct) {
  const long stripe = task % s.stripes, range = task / s.stripes;
  const long p0 = stripe * s.panels / s.stripes, p1 = (stripe + 1) * s.panels / s.stripes;
  const long t0 = range * s.tokens / s.ranges, t1 = (range + 1) * s.tokens / s.ranges;
  const long depth = words<T>(K), base = rows.hit[group.first].first;
  Word* packed = room(s.most_panels() * depth * PANEL);
  alignas(64) float buffer[WIDE_ROWS][PANEL];
  for (int e = group.first; e < group.second; e++) {
    const Expert& expert = rows.hit[e];
    const int32_t* token = rows.token.data();
    const long first = std::lower_bound(token + expert.first, token + expert.last, t0) - token;
    const long last = std::lower_bound(token + first, token + expert.last, t1) - token;
    if (first == last) continue;
    const bool few = !std::is_null_pointer_v<Direct> && expert.last - expert.first <= FEW;
    for (long p = p0; !few && p < p1; p++) pack(expert, p, packed + (p - p0) * depth * PANEL);
    for (long row = first; row < last;) {
      const int n = share(last - row, few ? DOT_ROWS : WIDE_ROWS);
      const void* from[WIDE_ROWS];
      for (int i = 0; i < n; i++) from[i] = a + (row + i - base) * K;
      for (long p = p0; p < p1; p++) {
        const int width = panel_width(s.columns, p);
        float* into[WIDE_ROWS];
        for (int i = 0; i < n; i++) into[i] = out + token[row + i] * s.columns + p * PANEL;
        if (width == PANEL && !few) {
          tile_of<T>(n, depth, from, 1, packed + (p - p0) * depth * PANEL, into, true);
          continue;
        }
        float* aside[WIDE_ROWS];
        for (int i = 0; i < n; i++) aside[i] = buffer[i];
        if constexpr (!std::is_null_pointer_v<Direct>)
          if (few) direct(expert, p, from, n, buffer);
        if (!few) tile_of<T>(n, depth, from, 1, packed + (p - p0) * depth * PANEL, aside, false);
        for (int i = 0; i < n; i++)
          for (int j = 0; j < width; j++) into[i][j] += buffer[i][j];
      }
      row += n;
    }
  }
}

// buffer [n, at to at+cols-1] = a W^T, rows of W as they stand.
template <typename T> void direct_rows(long K, const void* const* a, int n, const T* w, int cols, float (*buffer)[PANEL], int at) {
  for (int j = 0; j < cols; j += DOT_COLS) {
    const void* row[DOT_COLS];
    for (int q = 0; q < DOT_COLS; q++) row[q] = w + std::min(j + q, cols - 1) * K;
    const long depth = words<T>(K);
    if (n == 1) dots<T, 1>(depth, a, row, buffer, at + j);
    else if (n == 2) dots<T, 2>(depth, a, row, buffer, at + j);
    else if (n == 3) dots<T, 3>(depth, a, row, buffer, at + j);
    else dots<T, 4>(depth, a, row, buffer, at + j);
  }
}

// hidden [rows of the group, I] = weight silu(g) u, and g | u kept in `gates` [M, 2I] where a backward pass will want them.
template <typename T>
void hidden_task(const Sizes& s, const Rows& rows, const Task& task, long base, const T* x, const float* weight, const T* gate_up, T* gates,
                 T* hidden) {
  const Expert& expert = rows.hit[task.expert];
  const T* w = gate_up + expert.id * 2 * s.I * s.D;
  const long j0 = task.panel * HALF, depth = words<T>(s.D);
  const int cols = (int)std::min<long>(HALF, s.I - j0);
  const bool few = expert.last - expert.first <= FEW;
  Word* packed = room(depth * PANEL);
  if (!few) {
    pack_rows(packed, w + j0 * s.D, s.D, cols, s.D);
    pack_rows(packed + HALF, w + (s.I + j0) * s.D, s.D, cols, s.D);
  }
  alignas(64) float buffer[WIDE_ROWS][PANEL] = {}, made[HALF];
  float* into[WIDE_ROWS];
  for (int i = 0; i < WIDE_ROWS; i++) into[i] = buffer[i];
  for (long row = task.first; row < task.last;) {
    const int n = share(task.last - row, few ? DOT_ROWS : WIDE_ROWS);
    const void* from[WIDE_ROWS];
    for (int i = 0; i < n; i++) from[i] = x + rows.token[row + i] * s.D;
    if (few) {
      direct_rows(s.D, from, n, w + j0 * s.D, cols, buffer, 0);
      direct_rows(s.D, from, n, w + (s.I + j0) * s.D, cols, buffer, HALF);
    } else {
      tile_of<T>(n, depth, from, 1, packed, into, false);
    }
    for (int i = 0; i < n; i++, row++) {
      const float scale = weight[rows.slot[row]];
      for (int j = 0; j < HALF; j += LANES) {
        const Vec g = load(buffer[i] + j), u = load(buffer[i] + HALF + j);
        store(made + j, g * sigmoid(g) * u * scale);
      }
      store_row(hidden + (row - base) * s.I + j0, made, cols);
      if (gates) {
        store_row(gates + row * 2 * s.I + j0, buffer[i], cols);
        store_row(gates + row * 2 * s.I + s.I + j0, buffer[i] + HALF, cols);
      }
    }
  }
}

template <typename T>
int forward(const Sizes& s, const T* x, const int64_t* chosen, const float* weight, const T* gate_up, const T* down, T* gates, float* y) {
  Rows rows;
  if (!rows.sort(s, chosen, s.I * (long)sizeof(T))) return 1;
  std::unique_ptr<T[]> hidden(new T[rows.most_rows() * s.I]);
  if (gates) large_pages(gates, s.N * s.k * 2 * s.I * (long)sizeof(T));
  const Stripes stripes(s.D, words<T>(s.I) * 4, s.N);
  const auto pack = [&](const Expert& e, long p, Word* to) {
    pack_rows(to, down + e.id * s.D * s.I + p * PANEL * s.I, s.I, panel_width(s.D, p), s.I);
  };
  const auto direct = [&](const Expert& e, long p, const void* const* a, int n, float (*buffer)[PANEL]) {
    direct_rows(s.I, a, n, down + e.id * s.D * s.I + p * PANEL * s.I, panel_width(s.D, p), buffer, 0);
  };
  for (auto group : rows.groups) {
    const long base = rows.hit[group.first].first;
    const auto tasks = rows.tasks(group, (s.I + HALF - 1) / HALF);
#pragma omp parallel
    {
#pragma omp for schedule(dynamic)
      for (size_t t = 0; t < tasks.size(); t++) hidden_task(s, rows, tasks[t], base, x, weight, gate_up, gates, hidden.get());
#pragma omp for schedule(dynamic)
      for (long t = 0; t < stripes.count(); t++) add_stripe(stripes, t, rows, group, hidden.get(), s.I, y, pack, direct);
    }
  }
  return 0;
}

// What the stages of the backward pass hand on, for the rows of one group. Pairs: the same numbers, as pack_columns lays them out,
// each expert's from its own first pair on (in fp32 they are the rows themselves).
template <typename T> struct Between {
  std::unique_ptr<T[]> gates, hidden;  // [rows, 2I] gradient of g | u, [rows, I] weight silu(g) u
  std::unique_ptr<Word[]> gate_pairs, hidden_pairs;
  static constexpr bool PAIRED = PER_WORD<T> == 2;
  Between(const Sizes& s, long rows, long experts) : gates(new T[rows * 2 * s.I]), hidden(new T[rows * s.I]) {
    if (PAIRED) gate_pairs.reset(new Word[(rows + experts) / 2 * 2 * s.I]), hidden_pairs.reset(new Word[(rows + experts) / 2 * s.I]);
  }
};

long first_pair(const Rows& rows, std::pair<int, int> group, int e) {  // every expert before it may have left half a pair open
  return (rows.hit[e].first - rows.hit[group.first].first + (e - group.first)) / 2;
}

template <typename T>
void gates_task(const Sizes& s, const Rows& rows, std::pair<int, int> group, const Task& task, const T* dy, const float* weight,
                const T* down, const T* gates, const Between<T>& between, float* dweight) {
  const Expert& expert = rows.hit[task.expert];
  const T* w = down + expert.id * s.D * s.I;
  const long depth = words<T>(s.D), base = rows.hit[group.first].first;
  Word* packed = room(depth * PANEL);
  alignas(64) float buffer[WIDE_ROWS][PANEL], g[PANEL] = {}, u[PANEL] = {}, dg[PANEL], du[PANEL], made[PANEL];
  float* into[WIDE_ROWS];
  for (int i = 0; i < WIDE_ROWS; i++) into[i] = buffer[i];
  for (long j0 = 0; j0 < s.I; j0 += PANEL) {
    const int cols = (int)std::min<long>(PANEL, s.I - j0);
    if (cols < PANEL) memset(packed, 0, depth * PANEL * sizeof(Word)), memset(g, 0, sizeof g), memset(u, 0, sizeof u);
    pack_columns<T>(packed, PANEL, [&](long d) { return w + d * s.I + j0; }, cols, s.D);
    for (long row = task.first; row < task.last;) {
      const int n = share(task.last - row, WIDE_ROWS);
      const void* from[WIDE_ROWS];
      for (int i = 0; i < n; i++) from[i] = dy + rows.token[row + i] * s.D;
      tile_of<T>(n, depth, from, 1, packed, into, false);
      for (int i = 0; i < n; i++, row++) {
        const long slot = rows.slot[row];
        load_row(g, gates + row * 2 * s.I + j0, cols);
        load_row(u, gates + row * 2 * s.I + s.I + j0, cols);
        Vec agreement{};
        for (int j = 0; j < PANEL; j += LANES) {
          const Vec gj = load(g + j), uj = load(u + j), back = load(buffer[i] + j), turned = back * weight[slot];
          const Vec open = sigmoid(gj), silu = gj * open;
          agreement += back * silu * uj;
          store(made + j, silu * uj * weight[slot]);
          store(dg + j, turned * uj * (open + silu * (1.0f - open)));
          store(du + j, turned * silu);
        }
        dweight[slot] = total(agreement) + (j0 ? dweight[slot] : 0.0f);
        T* to = between.gates.get() + (row - base) * 2 * s.I + j0;
        store_row(to, dg, cols), store_row(to + s.I, du, cols);
        store_row(between.hidden.get() + (row - base) * s.I + j0, made, cols);
      }
    }
  }
  if constexpr (Between<T>::PAIRED) {
    const long pair = first_pair(rows, group, task.expert) + (task.first - expert.first) / 2, n = task.last - task.first;
    const T *from_gates = between.gates.get() + (task.first - base) * 2 * s.I, *from_hidden = between.hidden.get() + (task.first - base) * s.I;
    pack_columns<T>(between.gate_pairs.get() + pair * 2 * s.I, 2 * s.I, [&](long m) { return from_gates + m * 2 * s.I; }, 2 * s.I, n);
    pack_columns<T>(between.hidden_pairs.get() + pair * s.I, s.I, [&](long m) { return from_hidden + m * s.I; }, s.I, n);
  }
}

// sums [columns, PANEL] += a^T B over K words, a [K, columns] words, B packed.
template <typename T> void outer(const Word* a, int columns, long K, const Word* packed, float* sums, bool add) {
  for (int j = 0; j < columns;) {
    const int n = share(columns - j, WIDE_ROWS);
    const void* from[WIDE_ROWS];
    float* into[WIDE_ROWS];
    for (int i = 0; i < n; i++) from[i] = a + j + i, into[i] = sums + (j + i) * PANEL;
    tile_of<T>(n, K, from, columns, packed, into, add);
    j += n;
  }
}

// One panel of columns of an expert's dgate_up [2I, D], and the same rows of its ddown [D, I].
template <typename T>
void weights_task(const Sizes& s, const Rows& rows, std::pair<int, int> group, int e, long panel, const T* x, const T* dy,
                  const Between<T>& between, T* dgate_up, T* ddown) {
  const Expert& expert = rows.hit[e];
  const long d0 = panel * PANEL, base = rows.hit[group.first].first;
  const int cols = panel_width(s.D, panel);
  Word* packed = room(CHUNK * PANEL + 3 * s.I * PANEL);
  float *sums = (float*)(packed + CHUNK * PANEL), *turned = sums + 2 * s.I * PANEL;
  for (long first = expert.first; first < expert.last; first += CHUNK) {
    const long n = std::min(CHUNK, expert.last - first), depth = words<T>(n);
    const Word *gates, *hidden;
    if constexpr (Between<T>::PAIRED) {
      const long pair = first_pair(rows, group, e) + (first - expert.first) / 2;
      gates = between.gate_pairs.get() + pair * 2 * s.I, hidden = between.hidden_pairs.get() + pair * s.I;
    } else {
      gates = (const Word*)(between.gates.get() + (first - base) * 2 * s.I), hidden = (const Word*)(between.hidden.get() + (first - base) * s.I);
    }
    const auto gather = [&](const T* of) {
      pack_columns<T>(packed, PANEL, [&](long m) { return of + rows.token[first + m] * s.D + d0; }, cols, n);
    };
    gather(x);
    outer<T>(gates, (int)(2 * s.I), depth, packed, sums, first > expert.first);
    gather(dy);
    outer<T>(hidden, (int)s.I, depth, packed, turned, first > expert.first);
  }
  for (long j = 0; j < 2 * s.I; j++) store_row(dgate_up + (expert.id * 2 * s.I + j) * s.D + d0, sums + j * PANEL, cols);
  transpose((int)s.I, cols, turned, PANEL, sums, (int)s.I);
  store_row(ddown + (expert.id * s.D + d0) * s.I, sums, (int)(cols * s.I));
}

template <typename T>
int backward(const Sizes& s, const T* x, const int64_t* chosen, const float* weight, const T* gate_up, const T* down, const T* gates,
             const T* dy, float* dx, float* dweight, T* dgate_up, T* ddown) {
  Rows rows;
  if (!rows.sort(s, chosen, 3 * s.I * (long)sizeof(T))) return 1;
  long most_experts = 0;
  for (auto group : rows.groups) most_experts = std::max<long>(most_experts, group.second - group.first);
  const Between<T> between(s, rows.most_rows(), most_experts);
  const Stripes stripes(s.D, words<T>(2 * s.I) * 4, s.N);
  const auto pack = [&](const Expert& e, long p, Word* to) {
    const T* w = gate_up + e.id * 2 * s.I * s.D + p * PANEL;
    pack_columns<T>(to, PANEL, [&](long j) { return w + j * s.D; }, panel_width(s.D, p), 2 * s.I);
  };
  const long panels = panels_of(s.D);
  if (dgate_up) {
    large_pages(dgate_up, s.E * 2 * s.I * s.D * (long)sizeof(T)), large_pages(ddown, s.E * s.I * s.D * (long)sizeof(T));
    std::vector<bool> hit(s.E);
    for (auto& e : rows.hit) hit[e.id] = true;
#pragma omp parallel for schedule(dynamic)
    for (long e = 0; e < s.E; e++)
      if (!hit[e]) {
        memset(dgate_up + e * 2 * s.I * s.D, 0, 2 * s.I * s.D * sizeof(T));
        memset(ddown + e * s.I * s.D, 0, s.I * s.D * sizeof(T));
      }
  }
  for (auto group : rows.groups) {
    const auto tasks = rows.tasks(group, 1);
    const long weights = dgate_up ? (group.second - group.first) * panels : 0;
#pragma omp parallel
    {
#pragma omp for schedule(dynamic)
      for (size_t t = 0; t < tasks.size(); t++) gates_task(s, rows, group, tasks[t], dy, weight, down, gates, between, dweight);
#pragma omp for schedule(dynamic) nowait
      for (long t = 0; t < (dx ? stripes.count() : 0); t++)
        add_stripe(stripes, t, rows, group, between.gates.get(), 2 * s.I, dx, pack, nullptr);
#pragma omp for schedule(dynamic)
      for (long t = 0; t < weights; t++)
        weights_task(s, rows, group, group.first + (int)(t / panels), t % panels, x, dy, between, dgate_up, ddown);
    }
  }
  return 0;
}
}  // namespace

// 0, or 1: an expert that does not exist. gates, dx, and the pair dgate_up and ddown may be null: not wanted. y and dx come as zeros.
#define EXPERT_MLP(NAME, T)                                                                                                            \
  extern "C" int expert_mlp_forward_##NAME(const long* sizes, const void* x, const int64_t* chosen, const float* weight,               \
                                           const void* gate_up, const void* down, void* gates, float* y) {                             \
    const Sizes s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};                                                                   \
    return forward(s, (const T*)x, chosen, weight, (const T*)gate_up, (const T*)down, (T*)gates, y);                                   \
  }                                                                                                                                    \
  extern "C" int expert_mlp_backward_##NAME(const long* sizes, const void* x, const int64_t* chosen, const float* weight,              \
                                            const void* gate_up, const void* down, const void* gates, const void* dy, float* dx,       \
                                            float* dweight, void* dgate_up, void* ddown) {                                             \
    const Sizes s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};                                                                   \
    return backward(s, (const T*)x, chosen, weight, (const T*)gate_up, (const T*)down, (const T*)gates, (const T*)dy, dx, dweight,     \
                    (T*)dgate_up, (T*)ddown);                                                                                          \
  }
EXPERT_MLP(f32, float)
EXPERT_MLP(bf16, bf16)
