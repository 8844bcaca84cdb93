// The gated delta rule on a CPU, forward and backward. Definition and letters: reference.py; algebra: chunked.py.
//
// One task is one value head of one sequence. It goes through time in chunks of at most CHUNK tokens, and a chunk never
// crosses the start of a document: there the memory is simply cleared, so documents cannot touch each other and each gets
// the bits it would get alone. All that a chunk needs stays in the core's own cache. Within a chunk, G the running sum of g,
//
//     e_i = exp(G_i)   f_i = exp(G_last - G_i)   D_ij = exp(G_i - G_j) for j <= i, else 0
//     L   = (K K^T * D) below the diagonal       P = Q K^T * D
//     X   = K S                                  what the memory holds at each key
//     E   = (I + L diag(beta))^-1 (V - e X)      the error that each token finds
//     Z   = beta E                               what it writes
//     O   = e (Q S) + P Z                        S' = e_last S + K^T (f Z)
//
// Backward takes the chunks in reverse, from the memory that forward kept at the start of each, and recomputes the rest.
#include <cmath>
#include <vector>

#include "gemm.h"

using namespace seqzoo;

namespace {

constexpr int CHUNK = 64;               // tokens; fewer would be faster by a tenth, but backward keeps a memory per chunk
constexpr int READING = 32;             // the same where nothing is kept
constexpr int LOWER_ROWS = 12;          // of a triangular product at a time; what lies right of them is skipped
constexpr int64_t SHARE_FROM = 1 << 18;  // multiplications from which on steps are worth a second thread

}  // namespace

// The fields of cpp.py's Call, in order.
struct Call {
  int64_t B, T, H, HV, K, V, threads;
  int64_t qk_bf16, v_bf16;            // dtype of q, k and their gradients; of v, o and theirs; else fp32
  int64_t q_step[3], k_step[3], v_step[3];  // elements from one sequence, token, head to the next; a head's own are adjacent
  const char *q, *k, *v;
  const float *g, *beta;              // [B, T, HV]
  const uint8_t* starts;              // [B, T] or null
  float* state;                       // [B, HV, K, V] before the first token, written over by that after the last
  int64_t has_state;                  // 0: zeros came in, do not read them
  char* o;                            // [B, T, HV, V]
  float* kept;                        // [chunks, HV, K, V] memory at the start of each chunk, or null
  const char* d_o;                    // [B, T, HV, V], as o
  float* d_state;                     // [B, HV, K, V] gradient of the last memory, written over by that of the first
  char *dq, *dk, *dv;                 // as q, k, v, without gaps
  float *dg, *dbeta;                  // [B, T, HV]
};

namespace {

void get_row(float* to, const char* from, int64_t at, int n, int width, bool is_bf16) {
  if (is_bf16) load_row(to, (const bf16*)from + at, n);
  else load_row(to, (const float*)from + at, n);
  for (int i = n; i < width; i++) to[i] = 0;
}

void put_row(char* to, int64_t at, const float* from, int n, bool is_bf16) {
  if (is_bf16) store_row((bf16*)to + at, from, n);
  else store_row((float*)to + at, from, n);
}

void scaled_row(float* to, const float* from, float by, int width) {
  for (int i = 0; i < width; i += LANES) store(to + i, by * load(from + i));
}

// The first tokens of a sequence's chunks, and T.
void cut(const uint8_t* starts, int64_t T, int length, std::vector<int64_t>& at) {
  at.clear();
  for (int64_t t = 0; t < T; t++)
    if (at.empty() || t - at.back() == length || (starts && starts[t])) at.push_back(t);
  at.push_back(T);
}

// X (+)= A B with A lower triangular (zeros above), [c, c] with CHUNK between rows.
void lower_times(int c, int N, const float* A, const float* B, int b_row, float* X, int x_row, Into into) {
  for (int i = 0; i < c; i += LOWER_ROWS) {
    const int rows = c - i < LOWER_ROWS ? c - i : LOWER_ROWS;
    gemm(rows, N, i + rows, A + i * CHUNK, CHUNK, 1, B, b_row, X + i * x_row, x_row, into);
  }
}

// X (+)= A^T B, likewise.
void lower_transposed_times(int c, int N, const float* A, const float* B, int b_row, float* X, int x_row, Into into) {
  for (int i = 0; i < c; i += LOWER_ROWS) {
    const int rows = c - i < LOWER_ROWS ? c - i : LOWER_ROWS;
    gemm(rows, N, c - i, A + i * CHUNK + i, 1, CHUNK, B + i * b_row, b_row, X + i * x_row, x_row, into);
  }
}

// The lower part of A B^T, given B^T [K, CHUNK]; what is above the diagonal is left to the caller.
void lower_of(int c, int K, const float* A, int a_row, const float* BT, float* X) {
  constexpr int ROWS = 2 * LOWER_ROWS;
  for (int i = 0; i < c; i += ROWS) {
    const int rows = c - i < ROWS ? c - i : ROWS;
    gemm(rows, padded(i + rows), K, A + i * a_row, a_row, 1, BT, CHUNK, X + i * CHUNK, CHUNK);
  }
}

// MR rows, from row i, of (I + L diag(beta)) Z = Z0 in place with the rows before them done; or of L^T, the rows after.
template <int MR, int NV>
void solve_rows(int i, int c, bool transposed, const float* L, const float* beta, float* Z, int width) {
  const long row = transposed ? 1 : CHUNK, col = transposed ? CHUNK : 1;
  Vec z[MR][NV];
  for (int m = 0; m < MR; m++)
    for (int n = 0; n < NV; n++) z[m][n] = load(Z + (i + m) * width + n * LANES);
  for (int k = transposed ? i + MR : 0; k < (transposed ? c : i); k++) {
    Vec done[NV];
    for (int n = 0; n < NV; n++) done[n] = beta[k] * load(Z + k * width + n * LANES);
    for (int m = 0; m < MR; m++) {
      const Vec a = broadcast(L[(i + m) * row + k * col]);
      for (int n = 0; n < NV; n++) z[m][n] -= a * done[n];
    }
  }
  for (int m = 1; m < MR; m++)
    for (int k = 0; k < m; k++) {  // from the first row down, or from the last up
      const int to = transposed ? MR - 1 - m : m, from = transposed ? MR - 1 - k : k;
      const Vec a = broadcast(L[(i + to) * row + (i + from) * col] * beta[i + from]);
      for (int n = 0; n < NV; n++) z[to][n] -= a * z[from][n];
    }
  for (int m = 0; m < MR; m++)
    for (int n = 0; n < NV; n++) store(Z + (i + m) * width + n * LANES, z[m][n]);
}

template <int NV>
void solve_columns(int c, bool transposed, const float* L, const float* beta, float* Z, int width) {
  constexpr int MR = WIDE_ROWS;
  const int whole = c / MR * MR;
  if (transposed) {
    for (int i = c - 1; i >= whole; i--) solve_rows<1, NV>(i, c, true, L, beta, Z, width);
    for (int i = whole - MR; i >= 0; i -= MR) solve_rows<MR, NV>(i, c, true, L, beta, Z, width);
  } else {
    for (int i = 0; i < whole; i += MR) solve_rows<MR, NV>(i, c, false, L, beta, Z, width);
    for (int i = whole; i < c; i++) solve_rows<1, NV>(i, c, false, L, beta, Z, width);
  }
}

// Z = (I + L diag(beta))^-1 Z, or (I + L^T diag(beta))^-1 Z; L zero on and above the diagonal, Z [c, width].
void solve(int c, bool transposed, const float* L, const float* beta, float* Z, int width) {
  int j = 0;
  for (; j + WIDE * LANES <= width; j += WIDE * LANES) solve_columns<WIDE>(c, transposed, L, beta, Z + j, width);
  for (; j < width; j += LANES) solve_columns<1>(c, transposed, L, beta, Z + j, width);
}

// One task's buffers. Rows of K or V floats are padded with zeros to whole vectors, KP or VP.
struct Work {
  const Call& a;
  const int K, V, KP, VP;
  float *q, *k, *kT, *L, *P, *D, *error, *x, *z, *S;  // of forward, and recomputed by backward
  float *y, *d_reads, *zT, *dL, *dP, *dqk, *dS;       // of backward only
  float G[CHUNK + LANES], rest[CHUNK + LANES], e[CHUNK + LANES], f[CHUNK + LANES], beta[CHUNK];
  float dG[CHUNK], side[CHUNK + LANES];
  VecInt lane;

  Work(const Call& call, bool backward) : a(call), K(call.K), V(call.V), KP(padded(K)), VP(padded(V)) {
    struct Piece { float** at; int size; };
    const int square = CHUNK * CHUNK, keys = CHUNK * KP, values = CHUNK * VP, whole = K * VP;
    std::vector<Piece> pieces{{&q, keys}, {&k, keys}, {&kT, K * CHUNK}, {&L, square}, {&P, square}, {&D, square}};
    pieces.insert(pieces.end(), {{&error, values}, {&x, values}, {&z, values}, {&S, whole}});
    if (backward) {
      pieces.insert(pieces.end(), {{&y, values}, {&d_reads, 2 * values}, {&zT, V * CHUNK}, {&dL, square}, {&dP, square}});
      pieces.insert(pieces.end(), {{&dqk, 2 * keys}, {&dS, whole}});
    }
    size_t total = LANES;
    for (const Piece& p : pieces) total += padded(p.size);
    static thread_local std::vector<float> memory;  // kept from call to call: fresh pages cost as much as a short sequence
    memory.assign(total, 0.0f);
    float* next = memory.data();
    while ((uintptr_t)next % sizeof(Vec)) next++;
    for (const Piece& p : pieces) *p.at = next, next += padded(p.size);
    for (int n = 0; n < LANES; n++) lane[n] = n;
  }

  int64_t token(int64_t b, int64_t t, int64_t h) const { return (b * a.T + t) * a.HV + h; }
  void get_memory(float* to, const float* from) const {
    for (int i = 0; i < K; i++) memcpy(to + i * VP, from + i * V, V * sizeof(float));
  }
  void put_memory(float* to, const float* from) const {
    for (int i = 0; i < K; i++) memcpy(to + i * V, from + i * VP, V * sizeof(float));
  }

  // Everything of c tokens from t on that does not need the memory. What g says at a document's start has no meaning.
  void prepare(int64_t b, int64_t t, int64_t h, int c, bool fresh) {
    const int64_t key_head = h / (a.HV / a.H);
    const int cp = padded(c);
    double total = 0;
    for (int i = 0; i < c; i++) {
      get_row(q + i * KP, a.q, b * a.q_step[0] + (t + i) * a.q_step[1] + key_head * a.q_step[2], K, KP, a.qk_bf16);
      get_row(k + i * KP, a.k, b * a.k_step[0] + (t + i) * a.k_step[1] + key_head * a.k_step[2], K, KP, a.qk_bf16);
      get_row(error + i * VP, a.v, b * a.v_step[0] + (t + i) * a.v_step[1] + h * a.v_step[2], V, VP, a.v_bf16);
      beta[i] = a.beta[token(b, t + i, h)];
      total += fresh && i == 0 ? 0.0 : (double)a.g[token(b, t + i, h)];
      G[i] = (float)total, rest[i] = (float)(total - G[i]);  // what a float loses of a long sum shows in a small difference
    }
    for (int i = c; i < cp; i++) G[i] = rest[i] = 0;
    memset(k + c * KP, 0, (cp - c) * KP * sizeof(float));
    transpose(cp, K, k, KP, kT, CHUNK);
    lower_of(c, K, k, KP, kT, L);
    lower_of(c, K, q, KP, kT, P);
    for (int i = 0; i < cp; i += LANES) {
      store(e + i, exp(load(G + i)));
      store(f + i, exp((G[c - 1] - load(G + i)) + (rest[c - 1] - load(rest + i))));
    }
    for (int i = 0; i < c; i++) fade(i, cp);
  }

  // Row i of D, and L and P times it.
  void fade(int i, int cp) {
    float *l = L + i * CHUNK, *p = P + i * CHUNK, *d = D + i * CHUNK;
    const Vec zero{};
    for (int j = 0; j < cp; j += LANES) {
      const VecInt at = lane + j;
      const Vec decay = j > i ? zero : exp((G[i] - load(G + j)) + (rest[i] - load(rest + j)));
      store(d + j, at <= i ? decay : zero);
      store(p + j, at <= i ? load(p + j) * decay : zero);
      store(l + j, at < i ? load(l + j) * decay : zero);
    }
  }

  // x, error and z of a prepared chunk whose memory is S.
  void correct(int c, bool fresh) {
    if (!fresh) {
      gemm(c, VP, K, k, KP, 1, S, VP, x, VP);
      for (int i = 0; i < c; i++)
        for (int j = 0; j < VP; j++) error[i * VP + j] -= e[i] * x[i * VP + j];
    }
    solve(c, false, L, beta, error, VP);
    for (int i = 0; i < c; i++) scaled_row(z + i * VP, error + i * VP, beta[i], VP);
  }

  // o of a chunk; S becomes the memory after it.
  void forward(int64_t b, int64_t t, int64_t h, int c, bool fresh) {
    prepare(b, t, h, c, fresh);
    correct(c, fresh);
    if (!fresh) {
      for (int i = 0; i < c; i++) scaled_row(q + i * KP, q + i * KP, e[i], KP);
      gemm(c, VP, K, q, KP, 1, S, VP, x, VP);
      scaled_row(S, S, e[c - 1], K * VP);
    }
    lower_times(c, VP, P, z, VP, x, VP, fresh ? Into::SET : Into::ADD);
    for (int i = 0; i < c; i++) {
      put_row(a.o, token(b, t + i, h) * V, x + i * VP, V, a.v_bf16);
      scaled_row(z + i * VP, z + i * VP, f[i], VP);
    }
    gemm(K, VP, c, k, 1, KP, z, VP, S, VP, fresh ? Into::SET : Into::ADD);
  }

  // Gradients of a chunk whose memory is S; dS, the gradient of the memory after it, becomes that of S.
  void backward(int64_t b, int64_t t, int64_t h, int c, bool fresh) {
    prepare(b, t, h, c, fresh);
    correct(c, fresh);
    float *d_o = d_reads, *dx = d_reads + c * VP, *dq = dqk, *dk = dqk + c * KP;  // d_o, dx: of Q S and K S in the end
    float decayed = fresh ? 0.0f : e[c - 1] * dot(S, dS, K * VP);                 // gradient of G_last through the memory
    for (int i = 0; i < c; i++) get_row(d_o + i * VP, a.d_o, token(b, t + i, h) * V, V, VP, a.v_bf16);

    gemm(c, VP, K, k, KP, 1, dS, VP, y, VP);  // y: gradient of z, and by solving that of what stands before beta
    for (int i = 0; i < c; i++) {
      scaled_row(y + i * VP, y + i * VP, f[i], VP);
      dG[i] = -dot(y + i * VP, z + i * VP, VP);
      decayed -= dG[i];
    }
    lower_transposed_times(c, VP, P, d_o, VP, y, VP, Into::ADD);
    solve(c, true, L, beta, y, VP);
    for (int i = 0; i < c; i++) {
      a.dbeta[token(b, t + i, h)] = dot(y + i * VP, error + i * VP, VP);
      scaled_row(y + i * VP, y + i * VP, beta[i], VP);
      put_row(a.dv, token(b, t + i, h) * V, y + i * VP, V, a.v_bf16);
      scaled_row(dx + i * VP, y + i * VP, -e[i], VP);
    }

    transpose(c, V, z, VP, zT, CHUNK);
    lower_of(c, V, y, VP, zT, dL);  // its negative
    lower_of(c, V, d_o, VP, zT, dP);
    memset(side, 0, sizeof side);
    for (int i = 0; i < c; i++) scores(i, padded(c));

    for (int i = 0; i < c; i++) {
      scaled_row(z + i * VP, z + i * VP, f[i], VP);
      scaled_row(d_o + i * VP, d_o + i * VP, e[i], VP);
    }
    if (fresh) {
      memset(dqk, 0, 2 * c * KP * sizeof(float));
    } else {
      gemm_nt(2 * c, K, V, d_reads, VP, 1, S, VP, dqk, KP);
      for (int i = 0; i < c; i++) dG[i] += dot(dq + i * KP, q + i * KP, KP) + dot(dx + i * VP, x + i * VP, VP);
    }
    gemm_nt(c, K, V, z, VP, 1, dS, VP, dk, KP, Into::ADD);
    lower_times(c, KP, dP, k, KP, dq, KP, Into::ADD);
    lower_times(c, KP, dL, k, KP, dk, KP, Into::ADD);
    lower_transposed_times(c, KP, dL, k, KP, dk, KP, Into::ADD);
    lower_transposed_times(c, KP, dP, q, KP, dk, KP, Into::ADD);
    const bool as_bf16 = a.qk_bf16 && a.HV == a.H;
    for (int i = 0; i < c; i++) {
      put_row(a.dq, token(b, t + i, h) * K, dq + i * KP, K, as_bf16);
      put_row(a.dk, token(b, t + i, h) * K, dk + i * KP, K, as_bf16);
    }

    float total = decayed;
    for (int i = c - 1; i >= 0; i--) {
      total += dG[i] - side[i];
      a.dg[token(b, t + i, h)] = fresh && i == 0 ? 0.0f : total;
    }
    if (fresh) return;
    scaled_row(dS, dS, e[c - 1], K * VP);
    gemm(K, VP, c, q, 1, KP, d_o, VP, dS, VP, Into::ADD);
    gemm(K, VP, c, k, 1, KP, dx, VP, dS, VP, Into::ADD);
  }

  // Row i of dL (which comes negated) and dP, from gradients of L and P to those of K K^T and Q K^T; and their share in dG.
  void scores(int i, int cp) {
    float *dl = dL + i * CHUNK, *dp = dP + i * CHUNK;
    const Vec zero{};
    Vec row{};
    for (int j = 0; j < cp; j += LANES) {
      const VecInt at = lane + j;
      const Vec d = load(D + i * CHUNK + j);
      const Vec of_l = at < i ? -load(dl + j) : zero, of_p = at <= i ? load(dp + j) : zero;
      const Vec of_log_d = of_l * load(L + i * CHUNK + j) + of_p * load(P + i * CHUNK + j);
      row += of_log_d;
      store(side + j, load(side + j) + of_log_d);
      store(dl + j, of_l * d);
      store(dp + j, of_p * d);
    }
    dG[i] += sum(row);
  }
};

// The chunks of all sequences: where each begins, and how many came before each sequence.
struct Cuts {
  std::vector<std::vector<int64_t>> at;
  std::vector<int64_t> before{0};

  Cuts(const Call& a, int length) : at(a.B) {
    for (int64_t b = 0; b < a.B; b++) {
      cut(a.starts ? a.starts + b * a.T : nullptr, a.T, length, at[b]);
      before.push_back(before.back() + at[b].size() - 1);
    }
  }
};

bool is_fresh(const Call& a, int64_t b, int64_t t) {
  return (a.starts && a.starts[b * a.T + t]) || (t == 0 && !a.has_state);
}

// to [tokens, H, K] = the sum of from [tokens, HV, K] over each key head's value heads
void sum_heads(const Call& a, const float* from, char* to) {
  const int group = a.HV / a.H, K = a.K;
#pragma omp parallel for num_threads(a.threads)
  for (int64_t at = 0; at < a.B * a.T * a.H; at++) {
    std::vector<float> total(from + at * group * K, from + (at * group + 1) * K);
    for (int r = 1; r < group; r++)
      for (int i = 0; i < K; i++) total[i] += from[(at * group + r) * K + i];
    put_row(to, at * K, total.data(), K, a.qk_bf16);
  }
}

// One token after another, no chunk: NV vectors of V at a time, the memory written once.
template <int NV>
void step_columns(int K, int cols, const float* q, const float* k, const float* v, float decay, float beta, float* S, int s_row,
                  float* o) {
  auto get = [cols](const float* p, int n) {
    return cols - n >= LANES ? load(p + n) : load_some(p + n, cols - n);
  };
  auto put = [cols](float* p, int n, Vec x) { cols - n >= LANES ? store(p + n, x) : store_some(p + n, x, cols - n); };
  Vec held[NV] = {}, out[NV] = {}, change[NV];
  for (int i = 0; i < K; i++)
    for (int n = 0; n < NV; n++) held[n] += k[i] * get(S + (long)i * s_row, n * LANES);
  for (int n = 0; n < NV; n++) change[n] = beta * (get(v, n * LANES) - decay * held[n]);
  for (int i = 0; i < K; i++)
    for (int n = 0; n < NV; n++) {
      const Vec s = decay * get(S + (long)i * s_row, n * LANES) + k[i] * change[n];
      put(S + (long)i * s_row, n * LANES, s);
      out[n] += q[i] * s;
    }
  for (int n = 0; n < NV; n++) put(o, n * LANES, out[n]);
}

void step(const Call& a, int64_t b, int64_t h, float* row) {
  const int K = a.K, V = a.V;
  const int64_t key_head = h / (a.HV / a.H);
  float *q = row, *k = q + K, *v = k + K, *o = v + V, *S = a.state + (b * a.HV + h) * K * V;
  for (int64_t t = 0; t < a.T; t++) {
    const int64_t at = (b * a.T + t) * a.HV + h;
    get_row(q, a.q, b * a.q_step[0] + t * a.q_step[1] + key_head * a.q_step[2], K, K, a.qk_bf16);
    get_row(k, a.k, b * a.k_step[0] + t * a.k_step[1] + key_head * a.k_step[2], K, K, a.qk_bf16);
    get_row(v, a.v, b * a.v_step[0] + t * a.v_step[1] + h * a.v_step[2], V, V, a.v_bf16);
    const bool fresh = is_fresh(a, b, t);
    if (fresh) memset(S, 0, (int64_t)K * V * sizeof(float));
    const float decay = fresh ? 0.0f : std::exp(a.g[at]);
    constexpr int COLS = 4 * LANES;
    for (int j = 0; j < V; j += COLS) {
      const int cols = V - j < COLS ? V - j : COLS;
      const int vectors = (cols + LANES - 1) / LANES;
      if (vectors == 4) step_columns<4>(K, cols, q, k, v + j, decay, a.beta[at], S + j, V, o + j);
      else if (vectors == 3) step_columns<3>(K, cols, q, k, v + j, decay, a.beta[at], S + j, V, o + j);
      else if (vectors == 2) step_columns<2>(K, cols, q, k, v + j, decay, a.beta[at], S + j, V, o + j);
      else step_columns<1>(K, cols, q, k, v + j, decay, a.beta[at], S + j, V, o + j);
    }
    put_row(a.o, at * V, o, V, a.v_bf16);
  }
}

}  // namespace

extern "C" {

// How many chunks `forward` will keep a memory of.
int64_t gated_delta_rule_chunks(const Call* call) { return Cuts(*call, CHUNK).before.back(); }

void gated_delta_rule_forward(const Call* call) {
  const Call& a = *call;
  const Cuts cuts(a, a.kept ? CHUNK : READING);
#pragma omp parallel num_threads(a.threads)
  {
    Work w(a, false);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < a.B * a.HV; task++) {
      const int64_t b = task / a.HV, h = task % a.HV, size = a.K * a.V;
      if (a.has_state) w.get_memory(w.S, a.state + task * size);
      const auto& at = cuts.at[b];
      for (size_t n = 0; n + 1 < at.size(); n++) {
        const bool fresh = is_fresh(a, b, at[n]);
        if (a.kept && !fresh) w.put_memory(a.kept + ((cuts.before[b] + n) * a.HV + h) * size, w.S);
        w.forward(b, at[n], h, at[n + 1] - at[n], fresh);
      }
      w.put_memory(a.state + task * size, w.S);
    }
  }
}

// The two grouped ones are room for dq and dk per value head, [B, T, HV, K], where key heads have several; else null.
void gated_delta_rule_backward(const Call* call, float* dq_grouped, float* dk_grouped) {
  Call a = *call;
  const Cuts cuts(a, CHUNK);
  if (a.HV > a.H) a.dq = (char*)dq_grouped, a.dk = (char*)dk_grouped;
#pragma omp parallel num_threads(a.threads)
  {
    Work w(a, true);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < a.B * a.HV; task++) {
      const int64_t b = task / a.HV, h = task % a.HV, size = a.K * a.V;
      w.get_memory(w.dS, a.d_state + task * size);
      const auto& at = cuts.at[b];
      for (size_t n = at.size() - 1; n-- > 0;) {
        const bool fresh = is_fresh(a, b, at[n]);
        if (!fresh) w.get_memory(w.S, a.kept + ((cuts.before[b] + n) * a.HV + h) * size);
        w.backward(b, at[n], h, at[n + 1] - at[n], fresh);
        if (fresh) memset(w.dS, 0, (int64_t)w.K * w.VP * sizeof(float));
      }
      w.put_memory(a.d_state + task * size, w.dS);
    }
  }
  if (a.HV > a.H) sum_heads(a, dq_grouped, call->dq), sum_heads(a, dk_grouped, call->dk);
}

// As forward, token by token: for a few tokens.
void gated_delta_rule_steps(const Call* call) {
  const Call& a = *call;
  const int64_t tasks = a.B * a.HV;
  const bool shared = a.threads > 1 && tasks * a.T * a.K * a.V > SHARE_FROM;
#pragma omp parallel num_threads(a.threads) if (shared)
  {
    std::vector<float> row(2 * a.K + 2 * a.V);
#pragma omp for
    for (int64_t task = 0; task < tasks; task++) step(a, task / a.HV, task % a.HV, row.data());
  }
}
}
