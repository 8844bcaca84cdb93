// Linear attention on a CPU, forward and backward. Definition and letters: reference.py.
//
// One task is one key head of one sequence, with all R = H / G query heads that read its memory: their rows stand under each
// other in every product, so what concerns keys, values, decays and the memory is done once for them. A task goes through
// time in chunks of at most CHUNK tokens, and a chunk never crosses the start of a document: there the memory is simply
// cleared, so documents cannot touch each other and each gets the bits it would get alone. Within a chunk, with a = exp(g),
//
//     E_i  = a_0 .. a_i                      what is left of the memory at token i
//     W_ij = a_{j+1} .. a_i                  of key j
//     P_ij = sum_c q_ic W_ijc k_jc           for j <= i
//     O    = [P | E Q] [V ; S]
//     S'   = E_last S + (W_last K)^T V
//
// W k_j is kept up to date from token to token by multiplying with a: no sums of g, no differences of them, no exponent that
// is positive; 0 is as good a decay as any other. A chunk is short since P is what grows with it, and since a group's rows
// are many even so. Backward goes through the chunks in reverse. Forward keeps the memory at every SEGMENT tokens, from
// there backward computes those at the chunks between again; it holds memories and their gradients transposed, [V, K].
#include <vector>

#include "gemm.h"
#if defined(__SSE__)
#include <immintrin.h>
#endif

using namespace seqzoo;

namespace {

constexpr int CHUNK = 16;    // tokens, whole vectors of any machine
constexpr int SEGMENT = 64;  // tokens, whole chunks
constexpr int AT_ONCE = LANES == CHUNK ? 8 : 4;  // queries that share a pass over W
constexpr int64_t SHARE_FROM = 1 << 18;  // multiplications from which on steps are worth a second thread

}  // namespace

// The fields of cpp.py's Call, in order.
struct Call {
  int64_t B, T, H, G, K, V, threads;
  int64_t is_bf16;                          // q, k, v, o and their gradients; else fp32
  int64_t decays;                           // log decays per token and key head: 0, 1 or K
  int64_t q_step[3], k_step[3], v_step[3];  // elements from one sequence, token, head to the next; a head's own are adjacent
  const char *q, *k, *v;
  const float* g;                           // [B, T, G, decays] or null
  const uint8_t* starts;                    // [B, T] or null
  float* state;                             // [B, G, K, V] before the first token, written over by that after the last
  int64_t has_state;                        // 0: zeros came in, do not read them
  char* o;                                  // [B, T, H, V]
  float* kept;                              // [segments, G, V, K] memory at the start of each segment, or null
  const char* d_o;                          // [B, T, H, V], as o
  float* d_state;                           // [B, G, K, V] gradient of the last memory, written over by that of the first
  char *dq, *dk, *dv;                       // as q, k, v, without gaps
  float* dg;                                // as g
};

namespace {

bool is_fresh(const Call& a, int64_t b, int64_t t) {
  return (a.starts && a.starts[b * a.T + t]) || (t == 0 && !a.has_state);
}

int within(int64_t tokens) { return tokens < CHUNK ? tokens : CHUNK; }

// While it lives, its thread takes denormals for 0. What fades and gets nothing new (relu gives many keys of 0) passes through
// them on its way to nothing, and each would cost as much as a hundred other products.
struct NoDenormals {
#if defined(__SSE__)
  const unsigned before = _mm_getcsr();
  NoDenormals() { _mm_setcsr(before | 0x8040); }
  ~NoDenormals() { _mm_setcsr(before); }
#endif
};

void times(float* x, const float* by, int width) {
  for (int i = 0; i < width; i += LANES) store(x + i, load(x + i) * load(by + i));
}

void add_product(float* to, const float* x, const float* y, int width) {
  for (int i = 0; i < width; i += LANES) store(to + i, load(to + i) + load(x + i) * load(y + i));
}

// c tokens from t on of a key head of a sequence.
struct Chunk {
  int64_t b, t, g;
  int c;
  bool fresh;  // the memory before it is empty
};

enum Task { STEPS, FORWARD, BACKWARD };

// One task's buffers. Rows of K or V floats are padded with zeros to whole vectors, KP or VP.
struct Work {
  const Call& a;
  const int K, V, KP, VP, R, READ;
  const bool fades;
  const NoDenormals none;
  float *q, *k, *v, *S, *decay, *E, *W, *reads, *out;           // S [K, VP] follows v [CHUNK, VP]: one operand
  float *d_o, *vT, *d_scores, *dq, *dk, *dv, *dvT, *dS, *ST;    // of backward only
  float *keys, *d_log, *total, *left;
  VecInt lane;

  Work(const Call& call, Task task)
      : a(call), K(call.K), V(call.V), KP(padded(K)), VP(padded(V)), R(call.H / call.G), READ(CHUNK + KP), fades(call.decays) {
    struct Piece { float** at; int size; };
    const int tokens = task == STEPS ? 1 : CHUNK, rows = tokens * R;
    std::vector<Piece> pieces{{&q, rows * KP}, {&k, tokens * KP}, {&v, tokens * VP}, {&S, task == FORWARD ? K * VP : 0}};
    pieces.insert(pieces.end(), {{&decay, tokens * KP}, {&out, rows * VP}});
    if (task != STEPS) pieces.insert(pieces.end(), {{&E, KP}, {&W, K * CHUNK}, {&reads, rows * READ}});
    if (task == BACKWARD) {
      pieces.insert(pieces.end(), {{&d_o, rows * VP}, {&vT, V * CHUNK}, {&d_scores, rows * CHUNK}, {&dq, rows * KP}});
      pieces.insert(pieces.end(), {{&dk, CHUNK * KP}, {&dv, CHUNK * VP}, {&dvT, V * CHUNK}, {&dS, V * KP}});
      pieces.insert(pieces.end(), {{&ST, SEGMENT / CHUNK * V * KP}, {&keys, CHUNK * KP}, {&d_log, CHUNK * KP}});
      pieces.insert(pieces.end(), {{&total, KP}, {&left, KP}});
    }
    size_t whole = LANES;
    for (const Piece& p : pieces) whole += padded(p.size);
    static thread_local std::vector<float> memory;  // kept from call to call: fresh pages cost as much as a short sequence
    memory.assign(whole, 0.0f);
    float* next = memory.data();
    while ((uintptr_t)next % sizeof(Vec)) next++;
    for (const Piece& p : pieces) *p.at = next, next += padded(p.size);
    for (int i = 0; i < tokens * KP; i++) decay[i] = 1;
    for (int i = 0; i < LANES; i++) lane[i] = i;
  }

  void get_row(float* to, const char* from, int64_t at, int n, int width) const {
    if (a.is_bf16) load_row(to, (const bf16*)from + at, n);
    else load_row(to, (const float*)from + at, n);
    for (int i = n; i < width; i++) to[i] = 0;
  }
  void put_row(char* to, int64_t at, const float* from, int n) const {
    if (a.is_bf16) store_row((bf16*)to + at, from, n);
    else store_row((float*)to + at, from, n);
  }
  int64_t at(const int64_t* step, int64_t b, int64_t t, int64_t h) const { return b * step[0] + t * step[1] + h * step[2]; }
  int64_t token(const Chunk& n, int i) const { return (n.b * a.T + n.t + i) * a.G + n.g; }

  // Keys, values and decays. That of a document's first token is there, but finds nothing to fade.
  void get_keys(const Chunk& n) {
    for (int i = 0; i < n.c; i++) {
      get_row(k + i * KP, a.k, at(a.k_step, n.b, n.t + i, n.g), K, KP);
      get_row(v + i * VP, a.v, at(a.v_step, n.b, n.t + i, n.g), V, VP);
      if (!fades) continue;
      float* to = decay + i * KP;
      const float* from = a.g + token(n, i) * a.decays;
      for (int x = 0; x < KP; x++) to[x] = x < K ? from[a.decays == K ? x : 0] : 0.0f;
      for (int x = 0; x < KP; x += LANES) store(to + x, exp(load(to + x)));
    }
  }

  void get_queries(const Chunk& n) {
    for (int i = 0; i < n.c; i++)
      for (int r = 0; r < R; r++) get_row(q + (i * R + r) * KP, a.q, at(a.q_step, n.b, n.t + i, n.g * R + r), K, KP);
  }

  // Token i: W is brought up to it, and N of its queries are answered from it; `first` of them bring it.
  template <int N> void ask_rows(int i, int first) {
    constexpr int VECTORS = CHUNK / LANES;
    const float *rows = q + (i * R + first) * KP, *fade = decay + i * KP, *key = k + i * KP;
    Vec sums[N][VECTORS] = {};
    for (int x = 0; x < K; x++) {
      for (int j = 0; j < VECTORS; j++) {
        float* w = W + x * CHUNK + j * LANES;
        Vec now = load(w);
        if (first == 0) store(w, now = lane + j * LANES == i ? broadcast(key[x]) : fade[x] * now);
        for (int r = 0; r < N; r++) sums[r][j] += rows[r * KP + x] * now;
      }
    }
    for (int r = 0; r < N; r++)
      for (int j = 0; j < VECTORS; j++) store(reads + (i * R + first + r) * READ + j * LANES, sums[r][j]);
  }
  template <int N> void ask_some(int n, int i, int first) {
    if (n >= N) return ask_rows<N>(i, first);
    if constexpr (N > 1) ask_some<N - 1>(n, i, first);
  }

  // From one token to the next, reads = [P | E Q]; in the end W [K, CHUNK] is W_last K transposed, and E is E_last.
  void ask(const Chunk& n) {
    memset(W, 0, K * CHUNK * sizeof(float));
    for (int x = 0; x < KP; x += LANES) store(E + x, broadcast(1.0f));
    for (int i = 0; i < n.c; i++) {
      for (int r = 0; r < R; r += AT_ONCE) ask_some<AT_ONCE>(R - r, i, r);
      times(E, decay + i * KP, KP);
      for (int r = i * R; r < i * R + R; r++)
        for (int x = 0; x < KP; x += LANES) store(reads + r * READ + CHUNK + x, load(q + r * KP + x) * load(E + x));
    }
  }

  // o of a chunk; S becomes the memory after it.
  void forward(const Chunk& n) {
    get_keys(n);
    memset(v + n.c * VP, 0, (CHUNK - n.c) * VP * sizeof(float));
    get_queries(n);
    ask(n);
    gemm(n.c * R, VP, n.fresh ? CHUNK : CHUNK + K, reads, READ, 1, v, VP, out, VP);
    for (int i = 0; i < n.c; i++)
      for (int r = 0; r < R; r++) put_row(a.o, (token(n, i) * R + r) * V, out + (i * R + r) * VP, V);
    for (int x = 0; x < K && fades && !n.fresh; x++)
      for (int j = 0; j < VP; j += LANES) store(S + x * VP + j, E[x] * load(S + x * VP + j));
    gemm(K, VP, n.c, W, CHUNK, 1, v, VP, S, VP, n.fresh ? Into::SET : Into::ADD);
  }

  // next = the transposed memory after a chunk whose memory was `now`.
  void advance(const Chunk& n, const float* now, float* next) {
    get_keys(n);
    for (int x = 0; x < KP; x += LANES) store(E + x, broadcast(1.0f));
    for (int i = n.c - 1; i >= 0; i--) {
      times(k + i * KP, E, KP);
      times(E, decay + i * KP, KP);
    }
    for (int i = 0; i < V && !n.fresh; i++)
      for (int x = 0; x < KP; x += LANES) store(next + i * KP + x, load(now + i * KP + x) * load(E + x));
    gemm(V, KP, n.c, v, 1, VP, k, KP, next, KP, n.fresh ? Into::SET : Into::ADD);
  }

  // Gradients of a chunk whose transposed memory is `now`; dS, the gradient of the memory after it, becomes that of `now`.
  void backward(const Chunk& n, const float* now) {
    get_keys(n);
    get_queries(n);
    for (int i = 0; i < n.c; i++)
      for (int r = 0; r < R; r++) get_row(d_o + (i * R + r) * VP, a.d_o, (token(n, i) * R + r) * V, V, VP);
    ask(n);
    of_scores(n.c);
    of_queries(n, now);
    of_keys(n, now);
    of_values(n);
    if (n.fresh) return (void)memset(dS, 0, V * KP * sizeof(float));
    for (int i = 0; i < V && fades; i++) times(dS + i * KP, E, KP);
    gemm(V, KP, n.c * R, d_o, 1, VP, reads + CHUNK, READ, dS, KP, Into::ADD);
  }

  void of_scores(int c) {
    transpose(c, V, v, VP, vT, CHUNK);
    gemm(c * R, padded(c), V, d_o, VP, 1, vT, CHUNK, d_scores, CHUNK);
    for (int i = 0; i < c; i++)
      for (int r = i * R; r < i * R + R; r++)
        for (int j = i + 1; j < CHUNK; j++) d_scores[r * CHUNK + j] = 0;
  }

  // Also keys = W_last K, and into d_log what each query has to say on the sum of g up to it.
  void of_queries(const Chunk& n, const float* now) {
    const int c = n.c;
    if (n.fresh) memset(dq, 0, c * R * KP * sizeof(float));
    else gemm(c * R, KP, V, d_o, VP, 1, now, KP, dq, KP);
    memset(d_log, 0, c * KP * sizeof(float));
    for (int x = 0; x < KP; x += LANES) store(left + x, broadcast(1.0f));
    for (int i = 0; i < c; i++) {
      times(left, decay + i * KP, KP);
      for (int j = 0; j < i && fades; j++) times(keys + j * KP, decay + i * KP, KP);
      for (int r = i * R; r < i * R + R && fades; r++) times(dq + r * KP, left, KP);
      memcpy(keys + i * KP, k + i * KP, KP * sizeof(float));
      gemm(R, KP, i + 1, d_scores + i * R * CHUNK, CHUNK, 1, keys, KP, dq + i * R * KP, KP, Into::ADD);
      for (int r = 0; r < R; r++) {
        const float* row = dq + (i * R + r) * KP;
        put_row(a.dq, (token(n, i) * R + r) * K, row, K);
        if (fades) add_product(d_log + i * KP, q + (i * R + r) * KP, row, KP);
      }
    }
  }

  // Also of g, from the last token to the first: queries gain by what stands in the sum up to them, keys lose by it.
  void of_keys(const Chunk& n, const float* now) {
    const int c = n.c;
    gemm(c, KP, V, v, VP, 1, dS, KP, dk, KP);
    memset(total, 0, KP * sizeof(float));
    for (int i = 0; i < V && fades && !n.fresh; i++) add_product(total, dS + i * KP, now + i * KP, KP);
    times(total, E, KP);
    for (int i = 0; i < c && fades; i++) add_product(total, keys + i * KP, dk + i * KP, KP);
    for (int i = c - 1; i >= 0; i--) {
      gemm(i + 1, KP, R, d_scores + i * R * CHUNK, 1, CHUNK, q + i * R * KP, KP, dk, KP, Into::ADD);
      put_row(a.dk, token(n, i) * K, dk + i * KP, K);
      if (!fades) continue;
      for (int j = 0; j < i; j++) times(dk + j * KP, decay + i * KP, KP);
      for (int x = 0; x < KP; x += LANES)
        store(total + x, load(total + x) + (load(d_log + i * KP + x) - load(k + i * KP + x) * load(dk + i * KP + x)));
      float* dg = a.dg + token(n, i) * a.decays;
      for (int x = 0; x < a.decays; x++) dg[x] = 0;
      for (int x = 0; x < K && !(n.fresh && i == 0); x++) dg[a.decays == K ? x : 0] += total[x];
    }
  }

  void of_values(const Chunk& n) {
    gemm(n.c, VP, n.c * R, reads, 1, READ, d_o, VP, dv, VP);
    gemm(V, CHUNK, K, dS, KP, 1, W, CHUNK, dvT, CHUNK);
    for (int i = 0; i < n.c; i++) {
      for (int x = 0; x < V; x++) dv[i * VP + x] += dvT[x * CHUNK + i];
      put_row(a.dv, token(n, i) * V, dv + i * VP, V);
    }
  }

  // One token after another, no chunk.
  void step(int64_t b, int64_t g) {
    float* S = a.state + (b * a.G + g) * K * V;
    for (int64_t t = 0; t < a.T; t++) {
      const Chunk n{b, t, g, 1, is_fresh(a, b, t)};
      if (n.fresh) memset(S, 0, (int64_t)K * V * sizeof(float));
      get_keys(n);
      get_queries(n);
      for (int x = 0; x < K; x++)
        for (int j = 0; j < V; j++) S[x * V + j] = decay[x] * S[x * V + j] + k[x] * v[j];
      gemm(R, V, K, q, KP, 1, S, V, out, VP);
      for (int r = 0; r < R; r++) put_row(a.o, (token(n, 0) * R + r) * V, out + r * VP, V);
    }
  }
};

// The segments of all sequences: where each begins, and how many came before each sequence.
struct Cuts {
  std::vector<std::vector<int64_t>> at;
  std::vector<int64_t> before{0};

  explicit Cuts(const Call& a) : at(a.B) {
    for (int64_t b = 0; b < a.B; b++) {
      for (int64_t t = 0; t < a.T; t++)
        if (at[b].empty() || t - at[b].back() == SEGMENT || (a.starts && a.starts[b * a.T + t])) at[b].push_back(t);
      before.push_back(before.back() + at[b].size());
      at[b].push_back(a.T);
    }
  }
};

}  // namespace

extern "C" {

// How many segments `forward` will keep a memory of.
int64_t linear_attention_segments(const Call* call) { return Cuts(*call).before.back(); }

void linear_attention_forward(const Call* call) {
  const Call& a = *call;
  const Cuts cuts(a);
#pragma omp parallel num_threads(a.threads)
  {
    Work w(a, FORWARD);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < a.B * a.G; task++) {
      const int64_t b = task / a.G, g = task % a.G, size = a.K * a.V;
      if (a.has_state)
        for (int x = 0; x < w.K; x++) memcpy(w.S + x * w.VP, a.state + task * size + x * w.V, w.V * sizeof(float));
      const auto& at = cuts.at[b];
      for (size_t n = 0; n + 1 < at.size(); n++) {
        const bool fresh = is_fresh(a, b, at[n]);
        if (a.kept && !fresh) transpose(w.K, w.V, w.S, w.VP, a.kept + ((cuts.before[b] + n) * a.G + g) * size, w.K);
        for (int64_t t = at[n]; t < at[n + 1]; t += CHUNK)
          w.forward({b, t, g, within(at[n + 1] - t), fresh && t == at[n]});
      }
      for (int x = 0; x < w.K; x++) memcpy(a.state + task * size + x * w.V, w.S + x * w.VP, w.V * sizeof(float));
    }
  }
}

void linear_attention_backward(const Call* call) {
  const Call& a = *call;
  const Cuts cuts(a);
#pragma omp parallel num_threads(a.threads)
  {
    Work w(a, BACKWARD);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < a.B * a.G; task++) {
      const int64_t b = task / a.G, g = task % a.G, size = a.K * a.V, whole = (int64_t)w.V * w.KP;
      transpose(w.K, w.V, a.d_state + task * size, w.V, w.dS, w.KP);
      const auto& at = cuts.at[b];
      for (size_t n = at.size() - 1; n-- > 0;) {
        const bool fresh = is_fresh(a, b, at[n]);
        const float* kept = a.kept + ((cuts.before[b] + n) * a.G + g) * size;
        for (int i = 0; i < w.V && !fresh; i++) memcpy(w.ST + i * w.KP, kept + i * w.K, w.K * sizeof(float));
        const int chunks = (at[n + 1] - at[n] + CHUNK - 1) / CHUNK;
        for (int m = 0; m + 1 < chunks; m++)
          w.advance({b, at[n] + m * CHUNK, g, CHUNK, fresh && m == 0}, w.ST + m * whole, w.ST + (m + 1) * whole);
        for (int m = chunks - 1; m >= 0; m--) {
          const int64_t t = at[n] + m * CHUNK;
          w.backward({b, t, g, within(at[n + 1] - t), fresh && m == 0}, w.ST + m * whole);
        }
      }
      transpose(w.V, w.K, w.dS, w.KP, a.d_state + task * size, w.V);
    }
  }
}

// As forward, token by token: for a few tokens.
void linear_attention_steps(const Call* call) {
  const Call& a = *call;
  const int64_t tasks = a.B * a.G;
  const bool shared = a.threads > 1 && tasks * a.T * a.K * a.V > SHARE_FROM;
#pragma omp parallel num_threads(a.threads) if (shared)
  {
    Work w(a, STEPS);
#pragma omp for
    for (int64_t task = 0; task < tasks; task++) w.step(task / a.G, task % a.G);
  }
}
}
