// OVQ attention on a CPU, fp32, forward and backward. Definition: reference.py; the options here are those of cpp.py's `takes`.
//
// A task is one key head of one document, chunk by chunk. For backward only each token's slot is kept: the memory is written again
// from those, and then undone chunk by chunk from the rows it had before, C at most, since a chunk touches no more.
#include <algorithm>
#include <cmath>
#include <vector>

#include "gemm.h"

using namespace seqzoo;

extern "C" struct Call {  // the fields of cpp.py's Call, in order
  int64_t documents, T, S, H, G, K, V, chunk, slots, schedule, horizon, shared, log_count, threads;
  const int64_t* table;               // [documents, 7] the fields of layout.py's Document
  const float *q, *kv;                // [B, T, H, K] times scale; [B, S, G, K + V]
  const float *past, *past_counts;    // [B, G, N, K + V], [B, G, N], or null
  float *memory, *counts;             // the same after the call, or null; may be the past's own where nothing is merged
  float *o, *logsum;                  // [B, T, H, V]; [B, T, H] or null
  int32_t* slot;                      // [B, T, G] or null
  const float* d_o;
  float *d_q, *d_kv;
};

namespace {

constexpr float NEVER = -1e30f;  // a logit of weight 0
constexpr int FEW = 8;           // queries up to which the mean keys are read where they lie

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

struct Head {
  const Call& a;
  const int64_t row, begin, end, pending, merged, pieces, writes;
  const int K, V, C, most, Np, Cp, r, g;  // C tokens of a chunk, or all if they do not fill one; most slots are ever in use
  const int64_t W, ld;                    // floats of a token, and of a row of weights: slots, then tokens
  const bool last;  // its memory is the row's after the call
  const bool few;   // no transposed keys
  std::vector<float> own_memory, own_counts, DkT, X, XkT, Q, P, O, bias;
  std::vector<int> slot, added;
  float *D, *n;

  Head(const Call& a, const int64_t* d, int g, bool backward)
      : a(a), row(d[0]), begin(d[1]), end(d[2]), pending(d[3]), merged(d[4]), pieces(d[5]), writes(d[6]), K(a.K), V(a.V),
        C(std::min(a.chunk, pending + end - begin)), most(used(merged + writes * C)), Np(padded(most)), Cp(padded(C)), r(a.H / a.G),
        g(g), W(K + V), ld(Np + Cp), last(a.memory && end == a.T), few(!backward && writes == 0 && r * (end - begin) <= FEW),
        X(C * W), Q(rows() * K), P(std::max(rows(), writes ? C : 0) * ld), O(rows() * V), bias(Np), slot(C), added(most) {
    const int64_t at = row * a.G + g;
    if (last) {
      D = a.memory + at * a.slots * W, n = a.counts + at * a.slots;
      if (!merged) std::fill(D, D + a.slots * W, 0.0f), std::fill(n, n + a.slots, 0.0f);
    } else {
      own_memory.resize(most * W), own_counts.resize(most);
      D = own_memory.data(), n = own_counts.data();
      if (merged) {
        const int M = used(merged);
        memcpy(D, a.past + at * a.slots * W, sizeof(float) * M * W);
        memcpy(n, a.past_counts + at * a.slots, sizeof(float) * M);
      }
    }
    if (few) return;
    XkT.resize(K * Cp);
    if (pieces > 1 || merged || writes) DkT.resize((int64_t)K * Np);
    if (merged) transpose(used(merged), K, D, W, DkT.data(), Np);
  }

  int rows() const { return r * (int)std::min<int64_t>(C, end - begin); }
  int64_t time(int64_t c) const { return merged + c * C; }             // tokens merged before chunk c
  int64_t first(int64_t c) const { return begin - pending + c * C; }   // its first token in the call; below 0 where that was pending
  int length(int64_t c) const { return (int)std::min<int64_t>(C, end - first(c)); }
  int offset(int64_t c) const { return c ? 0 : (int)pending; }         // tokens before the first new one
  int64_t token(int64_t c, int j) const { return (row * a.S + a.S - a.T + first(c) + j) * a.G + g; }
  int64_t query(int64_t c, int h, int j) const { return (row * a.T + first(c) + j) * a.H + g * r + h; }

  int used(int64_t t) const {
    if (t == 0) return 0;
    const int64_t N = a.slots, grown = a.schedule == 0 ? t * N / (t + N) : a.schedule == 1 ? t : t * N / a.horizon;
    return (int)std::max<int64_t>(1, std::min(N, grown));
  }

  void load_chunk(int64_t c) {
    const int L = length(c);
    for (int j = 0; j < L; j++) memcpy(&X[j * W], a.kv + token(c, j) * W, sizeof(float) * W);
    if (few) return;
    if (L < Cp) std::fill(XkT.begin(), XkT.end(), 0.0f);
    transpose(L, K, X.data(), W, XkT.data(), Cp);
  }

  void load_queries(int64_t c) {
    const int o = offset(c), fresh = length(c) - o;
    for (int h = 0; h < r; h++)
      for (int i = 0; i < fresh; i++) memcpy(&Q[(h * fresh + i) * K], a.q + query(c, h, o + i) * K, sizeof(float) * K);
  }

  // Logits of the new tokens' queries, those of what they do not see NEVER.
  void logits(int64_t c) {
    const int M = used(time(c)), Mp = padded(M), L = length(c), o = offset(c), fresh = L - o, R = r * fresh;
    for (int m = 0; m < Mp; m++) bias[m] = m >= M ? NEVER : a.log_count ? std::log(n[m]) : 0.0f;
    if (few) {
      for (int i = 0; i < R; i++) {
        gemv(M, K, D, W, &Q[i * K], &P[i * ld]);
        std::fill(&P[i * ld + M], &P[i * ld + Mp], 0.0f);
        gemv(L, K, X.data(), W, &Q[i * K], &P[i * ld + Mp]);
      }
    } else {
      if (M) gemm(R, Mp, K, Q.data(), K, 1, DkT.data(), Np, P.data(), ld);
      gemm(R, Cp, K, Q.data(), K, 1, XkT.data(), Cp, &P[Mp], ld);
    }
    for (int i = 0; i < R; i++) {
      float* p = &P[i * ld];
      for (int m = 0; m < Mp; m += LANES) store(p + m, load(p + m) + load(&bias[m]));
      std::fill(p + Mp + o + i % fresh + 1, p + Mp + Cp, NEVER);
    }
  }

  void read(int64_t c) {
    const int M = used(time(c)), Mp = padded(M), L = length(c), o = offset(c), fresh = L - o, R = r * fresh, all = Mp + Cp;
    load_queries(c);
    logits(c);
    std::vector<float> share(R);
    for (int i = 0; i < R; i++) {
      float* p = &P[i * ld];
      Vec most = load(p);
      for (int m = LANES; m < all; m += LANES) most = larger(most, load(p + m));
      float top = most[0];
      for (int l = 1; l < LANES; l++) top = std::max(top, most[l]);
      Vec total{};
      for (int m = 0; m < all; m += LANES) {
        const Vec e = exp(load(p + m) - top);
        total += e;
        store(p + m, e);
      }
      share[i] = 1.0f / sum(total);
      if (a.logsum) a.logsum[query(c, i / fresh, o + i % fresh)] = top - std::log(share[i]);
    }
    gemm(R, V, M, P.data(), ld, 1, D + K, W, O.data(), V);
    gemm(R, V, L, &P[Mp], ld, 1, &X[K], W, O.data(), V, Into::ADD);
    for (int i = 0; i < R; i++) {
      float* to = a.o + query(c, i / fresh, o + i % fresh) * V;
      for (int k = 0; k < V; k++) to[k] = O[i * V + k] * share[i];
    }
  }

  void assign(int64_t c) {
    const int64_t t = time(c);
    const int M = used(t), fresh = used(t + C) - M, Mp = padded(M);
    if (!M) return assign_first(fresh);
    gemm(C, Mp, K, X.data(), W, 1, DkT.data(), Np, P.data(), ld);
    std::vector<float> likeness(C);
    std::vector<int> order(C);
    for (int i = 0; i < C; i++) {
      float* p = &P[i * ld];
      std::fill(p + M, p + Mp, NEVER);
      Vec most = load(p);
      for (int m = LANES; m < Mp; m += LANES) most = larger(most, load(p + m));
      likeness[i] = most[0];
      for (int l = 1; l < LANES; l++) likeness[i] = std::max(likeness[i], most[l]);
      slot[i] = std::min<int>(std::find(p, p + M, likeness[i]) - p, M - 1);
      order[i] = i;
    }
    std::stable_sort(order.begin(), order.end(), [&](int i, int j) { return likeness[i] < likeness[j]; });
    for (int i = 0; i < fresh; i++) slot[order[i]] = M + i;
  }

  void assign_first(int fresh) {
    gemm(C, Cp, K, X.data(), W, 1, XkT.data(), Cp, P.data(), ld);
    std::vector<int> chosen{0};
    std::vector<float> covered(&P[0], &P[C]);
    covered[0] = INFINITY;
    if (a.shared) {
      for (int i = 1; i < C; i++) chosen.push_back(i);
      std::stable_sort(chosen.begin() + 1, chosen.end(), [&](int i, int j) { return covered[i] < covered[j]; });
      chosen.resize(fresh);
      std::fill(slot.begin(), slot.end(), 0);
    } else {
      while ((int)chosen.size() < fresh) {
        const int pick = std::min_element(covered.begin(), covered.end()) - covered.begin();
        for (int i = 0; i < C; i++) covered[i] = std::max(covered[i], P[pick * ld + i]);
        covered[pick] = INFINITY;
        chosen.push_back(pick);
      }
      for (int i = 0; i < C; i++) {
        const float* p = &P[i * ld];
        slot[i] = std::max_element(chosen.begin(), chosen.end(), [p](int x, int y) { return p[x] < p[y]; }) - chosen.begin();
      }
    }
    for (int s = 0; s < fresh; s++) slot[chosen[s]] = s;
  }

  void show_key(int m) {
    for (int k = 0; k < K; k++) DkT[(int64_t)k * Np + m] = D[(int64_t)m * W + k];
  }

  // The chunk into its slots. Where `undo` [C, W] and `undo_counts` [C] are given they get what each token's slot was.
  void write(int64_t c, float* undo = nullptr, float* undo_counts = nullptr) {
    const int64_t t = time(c);
    for (int m = used(t); m < used(t + C); m++) n[m] = 0, memset(D + (int64_t)m * W, 0, sizeof(float) * W);
    for (int i = 0; i < C; i++) {
      added[slot[i]]++;
      if (undo) memcpy(undo + (int64_t)i * W, D + (int64_t)slot[i] * W, sizeof(float) * W), undo_counts[i] = n[slot[i]];
    }
    for (int i = 0; i < C; i++) {
      const int m = slot[i];
      if (!added[m]) continue;
      const float keep = n[m] / (n[m] + added[m]);
      n[m] += added[m], added[m] = 0;
      for (int k = 0; k < W; k++) D[(int64_t)m * W + k] *= keep;
    }
    for (int i = 0; i < C; i++) {
      const float step = 1.0f / n[slot[i]];
      for (int k = 0; k < W; k++) D[(int64_t)slot[i] * W + k] += step * X[i * W + k];
    }
    for (int i = 0; i < C; i++) show_key(slot[i]);
  }

  void forward() {
    for (int64_t c = 0; c < pieces; c++) {
      load_chunk(c);
      read(c);
      if (c >= writes) continue;
      assign(c);
      write(c);
      for (int i = 0; a.slot && i < C; i++) a.slot[token(c, i)] = slot[i];
    }
  }

  void load_slots(int64_t c) {
    for (int i = 0; i < C; i++) slot[i] = a.slot[token(c, i)];
  }

  void backward() {
    std::vector<float> undo(writes * C * W), undo_counts(writes * C), dD(own_memory.size()), dP(P.size()), d_o(O.size()), dQ(Q.size()),
        dX(X.size());
    for (int64_t c = 0; c < writes; c++) {
      load_chunk(c);
      load_slots(c);
      write(c, &undo[c * C * W], &undo_counts[c * C]);
    }
    for (int64_t c = pieces - 1; c >= 0; c--) {
      load_chunk(c);
      std::fill(dX.begin(), dX.end(), 0.0f);
      if (c < writes) {
        load_slots(c);
        unwrite(&undo[c * C * W], &undo_counts[c * C], dD.data(), dX.data());
      }
      unread(c, dD.data(), dP.data(), d_o.data(), dQ.data(), dX.data());
    }
  }

  // Gradients through a write, dD from that of the memory after to that before; and the memory as it was.
  void unwrite(const float* undo, const float* undo_counts, float* dD, float* dX) {
    for (int i = 0; i < C; i++) {
      const float step = 1.0f / n[slot[i]];
      for (int k = 0; k < W; k++) dX[i * W + k] = step * dD[(int64_t)slot[i] * W + k];
    }
    for (int i = 0; i < C; i++) {
      const int64_t m = slot[i];
      if (added[m]) continue;
      added[m] = 1;
      const float keep = undo_counts[i] / n[m];
      for (int k = 0; k < W; k++) dD[m * W + k] *= keep;
      memcpy(D + m * W, undo + (int64_t)i * W, sizeof(float) * W);
      n[m] = undo_counts[i];
      show_key(m);
    }
    for (int i = 0; i < C; i++) added[slot[i]] = 0;
  }

  void unread(int64_t c, float* dD, float* dP, float* d_o, float* dQ, float* dX) {
    const int M = used(time(c)), Mp = padded(M), L = length(c), R = r * L;
    load_queries(c);
    logits(c);
    for (int i = 0; i < R; i++) memcpy(d_o + i * V, a.d_o + query(c, i / L, i % L) * V, sizeof(float) * V);
    gemm_nt(R, M, V, d_o, V, 1, D + K, W, dP, ld);
    gemm_nt(R, L, V, d_o, V, 1, &X[K], W, dP + Mp, ld);
    for (int i = 0; i < R; i++) {
      const int64_t at = query(c, i / L, i % L);
      const float logsum = a.logsum[at], mean = dot(d_o + i * V, a.o + at * V, V);
      float *p = &P[i * ld], *d = dP + i * ld;
      for (int m = 0; m < Mp + Cp; m += LANES) {
        const Vec weight = exp(load(p + m) - logsum);
        store(p + m, weight);
        store(d + m, weight * (load(d + m) - mean));
      }
    }
    gemm(R, K, M, dP, ld, 1, D, W, dQ, K);
    gemm(R, K, L, dP + Mp, ld, 1, X.data(), W, dQ, K, Into::ADD);
    gemm(M, K, R, dP, 1, ld, Q.data(), K, dD, W, Into::ADD);
    gemm(M, V, R, P.data(), 1, ld, d_o, V, dD + K, W, Into::ADD);
    gemm(L, K, R, dP + Mp, 1, ld, Q.data(), K, dX, W, Into::ADD);
    gemm(L, V, R, &P[Mp], 1, ld, d_o, V, dX + K, W, Into::ADD);
    for (int i = 0; i < R; i++) memcpy(a.d_q + query(c, i / L, i % L) * K, dQ + i * K, sizeof(float) * K);
    for (int j = 0; j < L; j++) memcpy(a.d_kv + token(c, j) * W, dX + j * W, sizeof(float) * W);
  }
};

}  // namespace

extern "C" void ovq_attention_forward(const Call* a) {
#pragma omp parallel for schedule(dynamic) num_threads(a->threads)
  for (int64_t i = 0; i < a->documents * a->G; i++) Head(*a, a->table + i / a->G * 7, i % a->G, false).forward();
}

extern "C" void ovq_attention_backward(const Call* a) {
#pragma omp parallel for schedule(dynamic) num_threads(a->threads)
  for (int64_t i = 0; i < a->documents * a->G; i++) Head(*a, a->table + i / a->G * 7, i % a->G, true).backward();
}
