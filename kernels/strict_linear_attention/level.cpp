// A level of BDH on a CPU, forward and backward, fp32. Definition and letters: reference.py.
//
// A task is one head. It takes a sequence in chunks, and a chunk's neurons in blocks, so that all of the width of the neurons stays in
// cache: what is kept of a token is of the model width. Backward takes the chunks in reverse, from memories that forward kept every
// SEGMENT chunks, and computes the neurons again.
#include "memory.h"
#include "rows.h"

using namespace seqzoo;

extern "C" struct Call {  // the fields of level_cpp.py's Call, in order
  int64_t B, T, H, N, D, threads;
  int64_t turn_rows;                       // of cos and sin: B, or 1
  int64_t has_state, wants_state, parts;   // parts: into how many the batch is split where weights' gradients are summed
  float norm_eps, pass_scale;              // 1 / (1 - dropout)
  const float *v, *encoder, *gate, *decoder;  // [B, T, D]; [H, N, D]
  const float *cos, *sin;                  // [turn_rows, N / 2, T]
  const float* decay;                      // [H] or null
  const uint8_t *starts, *passed;          // [B, T], [B, H, N, T] or null
  float* state;                            // [B, H, N, D] before the first token, written over by that after the last
  float *a, *u;                            // [B, H, T, D] what was read, or null; what each head gives
  float* kept;                             // [segments, H, N, D] or null
  double* active;                          // [B, H, 2]
  const float* du;                         // [B, T, D]
  float *d_state, *dv;                     // [B, H, N, D] gradient of the last memory, then of the first; [B, H, T, D]
  float *d_encoder, *d_gate, *d_decoder;   // [parts, H, N, D], zeros
};

namespace {

constexpr int SEGMENT = 8;  // chunks

const Vec ZERO{};
inline Vec positive(Vec x) { return x < ZERO ? ZERO : x; }  // NaN stays

bool is_fresh(const Call& a, int64_t b, int64_t t) {
  return (a.starts && a.starts[b * a.T + t]) || (t == 0 && !a.has_state);
}

struct Head {
  const Call& a;
  const int N, D;
  int64_t b = 0, h = 0, t = 0;
  int c = 0, cp = 0;
  std::vector<float> vT, scores, reads, normed, normedT, y, r, u, spread;
  double active_x = 0, active_z = 0;

  explicit Head(const Call& a)
      : a(a), N(a.N), D(a.D), vT(D * CHUNK), scores(CHUNK * CHUNK), reads(D * CHUNK), normed(D * CHUNK), normedT(D * CHUNK),
        y(BLOCK * CHUNK), r(BLOCK * CHUNK), u(D * CHUNK), spread(CHUNK) {}

  const float* v() const { return a.v + (b * a.T + t) * D; }
  const float* weights(const float* of, int n0) const { return of + (h * N + n0) * D; }
  int64_t out_at() const { return ((b * a.H + h) * a.T + t) * D; }

  void go_to(int64_t token, int tokens) {
    t = token, c = tokens, cp = padded(c);
    neurons_first(c, D, v(), D, vT.data());
  }

  // x [n, CHUNK] of the neurons from n0 on
  void fire(int n0, int n, float* x) {
    gemm(n, cp, D, weights(a.encoder, n0), D, 1, vT.data(), CHUNK, x, CHUNK);
    for (int i = 0; i < n * CHUNK; i += CHUNK)
      for (int j = 0; j < cp; j += LANES) store(x + i + j, positive(load(x + i + j)));
  }

  // to = from turned by the positions, against them if `back`; both [n, CHUNK]
  template <bool BACK> void turn(int n0, int n, const float* from, float* to) const {
    const int64_t at = ((b % a.turn_rows) * (N / 2) + n0 / 2) * a.T + t;
    for (int i = 0; i < n / 2; i++) {
      const float *cos = a.cos + at + i * a.T, *sin = a.sin + at + i * a.T, *even = from + 2 * i * CHUNK;
      float* out = to + 2 * i * CHUNK;
      for (int j = 0; j < cp; j += LANES) {
        const Vec co = get(cos + j, c - j), si = BACK ? -get(sin + j, c - j) : get(sin + j, c - j);
        const Vec e = load(even + j), o = load(even + CHUNK + j);
        store(out + j, e * co - o * si);
        store(out + CHUNK + j, o * co + e * si);
      }
    }
  }

  // normed = LN(reads), of which `spread` keeps 1 / standard deviation
  void norm() {
    for (int i = 0; i < c; i++) {
      const float* x = reads.data() + i * D;
      double mean = 0, square = 0;
      for (int d = 0; d < D; d++) mean += x[d];
      mean /= D;
      for (int d = 0; d < D; d++) square += (x[d] - mean) * (x[d] - mean);
      spread[i] = 1 / std::sqrt(square / D + a.norm_eps);
      for (int d = 0; d < D; d++) normed[i * D + d] = (x[d] - (float)mean) * spread[i];
    }
    neurons_first(c, D, normed.data(), D, normedT.data());
  }

  // in place: the gradient of `reads` from that of `normed`
  void norm_back(float* g) const {
    for (int i = 0; i < c; i++, g += D) {
      const float* x = normed.data() + i * D;
      double sum = 0, along = 0;
      for (int d = 0; d < D; d++) sum += g[d], along += g[d] * x[d];
      for (int d = 0; d < D; d++) g[d] = spread[i] * (g[d] - (float)(sum / D) - x[d] * (float)(along / D));
    }
  }

  // Whether dropout lets them through, for LANES tokens of a neuron: 0 or 1 / (1 - dropout).
  Vec pass(int neuron, int j) const {
    float through[LANES] = {};
    const uint8_t* from = a.passed + ((b * a.H + h) * N + neuron) * a.T + t + j;
    for (int l = 0; l < LANES && j + l < c; l++) through[l] = from[l] ? a.pass_scale : 0;
    return load(through);
  }

  void forward(int64_t token, int tokens, bool fresh, bool writes, const Fade& fade, float* x, float* S) {
    go_to(token, tokens);
    const float* written = v();
    if (fade.some && writes) {
      for (int i = 0; i < c; i++) scaled(D, v() + i * D, fade.power[c - i], normed.data() + i * D);
      written = normed.data();
    }
    std::fill(reads.begin(), reads.end(), 0.0f);
    for (int n0 = 0; n0 < N; n0 += BLOCK) {
      const int n = std::min(BLOCK, N - n0);
      fire(n0, n, x + n0 * CHUNK);
      turn<false>(n0, n, x + n0 * CHUNK, r.data());
      pairs(c, n, r.data(), r.data(), scores.data(), n0 ? Into::ADD : Into::SET);
      if (!fresh) read(n, c, D, r.data(), S + (long)n0 * D, reads.data());
      if (writes) write(n, c, D, fresh ? 0 : fade.power[c], r.data(), written, S + (long)n0 * D);
    }
    if (fade.some)
      for (int i = 0; i < c; i++) scaled(D, reads.data() + i * D, fade.power[i], reads.data() + i * D);
    below(c, fade, scores.data());
    lower_times(c, D, scores.data(), v(), reads.data());
    if (a.a) memcpy(a.a + out_at(), reads.data(), sizeof(float) * c * D);
    norm();
    float* out = a.u + out_at();
    for (int n0 = 0; n0 < N; n0 += BLOCK) {
      const int n = std::min(BLOCK, N - n0);
      gemm(n, cp, D, weights(a.gate, n0), D, 1, normedT.data(), CHUNK, y.data(), CHUNK);
      gated(n0, n, x + n0 * CHUNK);
      gemm(c, D, n, y.data(), 1, CHUNK, weights(a.decoder, n0), D, out, D, n0 ? Into::ADD : Into::SET);
    }
  }

  // y = x * relu(y), dropout included; counts what is active
  void gated(int n0, int n, const float* x) {
    VecInt count_x{}, count_z{};
    for (int i = 0; i < n; i++)
      for (int j = 0; j < cp; j += LANES) {
        const Vec on = load(x + i * CHUNK + j);
        Vec z = on * positive(load(y.data() + i * CHUNK + j));
        count_x -= on > ZERO, count_z -= z > ZERO;
        if (a.passed) z *= pass(n0 + i, j);
        store(y.data() + i * CHUNK + j, z);
      }
    for (int l = 0; l < LANES; l++) active_x += count_x[l], active_z += count_z[l];
  }
};

struct BackwardHead : Head {
  Fade fade;
  Back memory;
  std::vector<float> xs, rs, dx, z, du_T, d_normed, d_normedT, memories;

  BackwardHead(const Call& a, int64_t head)
      : Head(a), fade(a.decay ? a.decay[head] : 0), memory(a.D, fade), xs((long)SEGMENT * N * CHUNK), rs(N * CHUNK),
        dx(N * CHUNK), z(BLOCK * CHUNK), du_T(D * CHUNK), d_normed(D * CHUNK), d_normedT(D * CHUNK),
        memories((long)SEGMENT * N * D) {
    h = head;
  }

  // x and the memory at the start of each chunk of a segment again
  void again(const std::vector<int64_t>& at, size_t from, size_t to, const float* kept) {
    if (!is_fresh(a, b, at[from])) memcpy(memories.data(), kept, sizeof(float) * N * D);
    for (size_t i = from; i < to; i++) {
      go_to(at[i], at[i + 1] - at[i]);
      const bool fresh = is_fresh(a, b, t);
      for (int k = 0; k < c; k++) scaled(D, v() + k * D, fade.power[c - k], normed.data() + k * D);
      for (int n0 = 0; n0 < N; n0 += BLOCK) {
        const int n = std::min(BLOCK, N - n0);
        float* x = &xs[((i - from) * N + n0) * CHUNK];
        fire(n0, n, x);
        if (i + 1 == to) continue;
        turn<false>(n0, n, x, r.data());
        const float* S = &memories[((long)(i - from) * N + n0) * D];
        float* next = &memories[((long)(i + 1 - from) * N + n0) * D];
        if (!fresh) memcpy(next, S, sizeof(float) * n * D);
        write(n, c, D, fresh ? 0 : fade.power[c], r.data(), normed.data(), next);
      }
    }
  }

  void backward(int64_t token, int tokens, bool fresh, int64_t part, const float* x, const float* S, float* dS) {
    go_to(token, tokens);
    const int64_t grads = (part * a.H + h) * N * D;
    const float* du = a.du + (b * a.T + t) * D;
    float* dv = a.dv + out_at();
    memset(dv, 0, sizeof(float) * c * D);
    memcpy(reads.data(), a.a + out_at(), sizeof(float) * c * D);
    norm();
    neurons_first(c, D, du, D, du_T.data());
    std::fill(d_normed.begin(), d_normed.end(), 0.0f);
    for (int n0 = 0; n0 < N; n0 += BLOCK) {
      const int n = std::min(BLOCK, N - n0);
      const long w = grads + (long)n0 * D;
      turn<false>(n0, n, x + n0 * CHUNK, &rs[n0 * CHUNK]);
      pairs(c, n, &rs[n0 * CHUNK], &rs[n0 * CHUNK], memory.scores.data(), n0 ? Into::ADD : Into::SET);
      gemm(n, cp, D, weights(a.gate, n0), D, 1, normedT.data(), CHUNK, y.data(), CHUNK);
      gemm(n, cp, D, weights(a.decoder, n0), D, 1, du_T.data(), CHUNK, r.data(), CHUNK);
      gated_back(n0, n, x + n0 * CHUNK, &dx[n0 * CHUNK]);
      gemm(n, D, c, z.data(), CHUNK, 1, du, D, a.d_decoder + w, D, Into::ADD);
      gemm(n, D, c, y.data(), CHUNK, 1, normed.data(), D, a.d_gate + w, D, Into::ADD);
      gemm(c, D, n, y.data(), 1, CHUNK, weights(a.gate, n0), D, d_normed.data(), D, Into::ADD);
    }
    norm_back(d_normed.data());
    neurons_first(c, D, d_normed.data(), D, d_normedT.data());
    memory.begin(c, v(), vT.data(), d_normed.data(), d_normedT.data(), dv);
    for (int n0 = 0; n0 < N; n0 += BLOCK) {
      const int n = std::min(BLOCK, N - n0);
      memory.neurons(n, &rs[n0 * CHUNK], S + (long)n0 * D, dS + (long)n0 * D, fresh, r.data());
      turn<true>(n0, n, r.data(), r.data());
      float* d = &dx[n0 * CHUNK];
      for (int i = 0; i < n * CHUNK; i += CHUNK)
        for (int j = i; j < i + cp; j += LANES)
          store(d + j, load(x + n0 * CHUNK + j) > ZERO ? load(d + j) + load(r.data() + j) : ZERO);
      gemm(n, D, c, d, CHUNK, 1, v(), D, a.d_encoder + grads + (long)n0 * D, D, Into::ADD);
      gemm(c, D, n, d, 1, CHUNK, weights(a.encoder, n0), D, dv, D, Into::ADD);
    }
    memory.end(dv);
  }

  // From y before its relu and r, the gradient of z: z, what x gets from it, and in y what y gets.
  void gated_back(int n0, int n, const float* x, float* dx) {
    for (int i = 0; i < n; i++)
      for (int j = 0; j < cp; j += LANES) {
        const int at = i * CHUNK + j;
        const Vec on = load(x + at), open = positive(load(y.data() + at));
        Vec dz = load(r.data() + at), out = on * open;
        if (a.passed) {
          const Vec through = pass(n0 + i, j);
          dz *= through, out *= through;
        }
        store(z.data() + at, out);
        store(dx + at, dz * open);
        store(y.data() + at, open > ZERO ? dz * on : ZERO);
      }
  }
};

// Tokens one after the other, touching only what is active: the memory's rows of pairs that turn, the gates of x, the outputs of x * y.
struct Steps {
  const Call& a;
  const int N, D;
  std::vector<float> x, reads;
  explicit Steps(const Call& a) : a(a), N(a.N), D(a.D), x(N), reads(D) {}

  void run(int64_t b, int64_t h) {
    float* S = a.state + (b * a.H + h) * N * D;
    const float keep = a.decay ? std::exp(a.decay[h]) : 1;
    double active_x = 0, active_z = 0;
    for (int64_t t = 0; t < a.T; t++) {
      const bool fresh = is_fresh(a, b, t);
      if (fresh) memset(S, 0, sizeof(float) * N * D);
      const float* v = a.v + (b * a.T + t) * D;
      gemv(N, D, a.encoder + h * N * D, D, v, x.data());
      std::fill(reads.begin(), reads.end(), 0.0f);
      for (int i = 0; i < N; i += 2) {
        x[i] = std::max(x[i], 0.0f), x[i + 1] = std::max(x[i + 1], 0.0f);
        if (x[i] == 0 && x[i + 1] == 0) continue;
        const int64_t at = ((b % a.turn_rows) * (N / 2) + i / 2) * a.T + t;
        const float cos = a.cos[at], sin = a.sin[at];
        pair(x[i] * cos - x[i + 1] * sin, x[i + 1] * cos + x[i] * sin, v, S + (long)i * D, reads.data());
      }
      if (keep != 1) scaled((int64_t)N * D, S, keep, S);
      norm();
      float* u = a.u + ((b * a.H + h) * a.T + t) * D;
      memset(u, 0, sizeof(float) * D);
      for (int i = 0; i < N; i++) {
        if (x[i] == 0) continue;
        active_x++;
        const float y = dot(a.gate + (h * N + i) * D, reads.data(), D);
        if (y <= 0) continue;
        active_z++;
        const float z = x[i] * y;
        const float* out = a.decoder + (h * N + i) * D;
        for (int d = 0; d < D; d++) u[d] += z * out[d];
      }
    }
    a.active[(b * a.H + h) * 2] = active_x, a.active[(b * a.H + h) * 2 + 1] = active_z;
  }

  // Two rows of the memory: read, then written.
  void pair(float r0, float r1, const float* v, float* S, float* reads) const {
    for (int d = 0; d < D; d++) {
      const float s0 = S[d], s1 = S[D + d];
      reads[d] += r0 * s0 + r1 * s1;
      S[d] = s0 + r0 * v[d];
      S[D + d] = s1 + r1 * v[d];
    }
  }

  void norm() {
    double mean = 0, square = 0;
    for (int d = 0; d < D; d++) mean += reads[d];
    mean /= D;
    for (int d = 0; d < D; d++) square += (reads[d] - mean) * (reads[d] - mean);
    const float by = 1 / std::sqrt(square / D + a.norm_eps);
    for (int d = 0; d < D; d++) reads[d] = (reads[d] - (float)mean) * by;
  }
};

int64_t segments_of(const std::vector<int64_t>& at) { return (at.size() - 1 + SEGMENT - 1) / SEGMENT; }

// out [B, T, D] = the sum of each [B, H, T, D] over the heads
void sum_heads(const Call& a, const float* each, float* out) {
  const int64_t size = a.T * a.D;
#pragma omp parallel for num_threads(a.threads) if (a.B * a.H * size > (1 << 16))
  for (int64_t row = 0; row < a.B * a.T; row++) {
    const int64_t b = row / a.T, at = row % a.T * a.D;
    for (int64_t d = 0; d < a.D; d++) {
      float total = 0;
      for (int64_t h = 0; h < a.H; h++) total += each[(b * a.H + h) * size + at + d];
      out[row * a.D + d] = total;
    }
  }
}

}  // namespace

extern "C" {

// How many memories of all heads `bdh_level_forward` keeps.
int64_t bdh_level_segments(const Call* call) {
  int64_t all = 0;
  for (int64_t b = 0; b < call->B; b++) all += segments_of(cut(call->starts ? call->starts + b * call->T : nullptr, call->T));
  return all;
}

void bdh_level_forward(const Call* call, float* u) {
  const Call& a = *call;
  const int64_t size = a.N * a.D;
  std::vector<std::vector<int64_t>> cuts;
  std::vector<int64_t> before{0};
  for (int64_t b = 0; b < a.B; b++) {
    cuts.push_back(cut(a.starts ? a.starts + b * a.T : nullptr, a.T));
    before.push_back(before.back() + segments_of(cuts.back()));
  }
#pragma omp parallel num_threads(a.threads)
  {
    Head head(a);
    std::vector<float> x(a.N * CHUNK);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < a.B * a.H; task++) {
      head.b = task / a.H, head.h = task % a.H, head.active_x = head.active_z = 0;
      const Fade fade(a.decay ? a.decay[head.h] : 0);
      const auto& at = cuts[head.b];
      float* S = a.state + task * size;
      for (size_t i = 0; i + 1 < at.size(); i++) {
        const bool fresh = is_fresh(a, head.b, at[i]), last = i + 2 == at.size();
        if (a.kept && i % SEGMENT == 0 && !fresh)
          memcpy(a.kept + ((before[head.b] + i / SEGMENT) * a.H + head.h) * size, S, sizeof(float) * size);
        head.forward(at[i], at[i + 1] - at[i], fresh, !last || a.wants_state, fade, x.data(), S);
      }
      a.active[task * 2] = head.active_x, a.active[task * 2 + 1] = head.active_z;
    }
  }
  sum_heads(a, a.u, u);
}

void bdh_level_backward(const Call* call, float* dv) {
  const Call& a = *call;
  const int64_t size = a.N * a.D;
  std::vector<std::vector<int64_t>> cuts;
  std::vector<int64_t> before{0};
  for (int64_t b = 0; b < a.B; b++) {
    cuts.push_back(cut(a.starts ? a.starts + b * a.T : nullptr, a.T));
    before.push_back(before.back() + segments_of(cuts.back()));
  }
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
  for (int64_t task = 0; task < a.H * a.parts; task++) {
    const int64_t part = task / a.H;
    BackwardHead head(a, task % a.H);
    for (head.b = part * a.B / a.parts; head.b < (part + 1) * a.B / a.parts; head.b++) {
      const auto& at = cuts[head.b];
      float* dS = a.d_state + (head.b * a.H + head.h) * size;
      for (int64_t s = segments_of(at); s-- > 0;) {
        const size_t from = s * SEGMENT, to = std::min(at.size() - 1, from + SEGMENT);
        head.again(at, from, to, a.kept + ((before[head.b] + s) * a.H + head.h) * size);
        for (size_t i = to; i-- > from;)
          head.backward(at[i], at[i + 1] - at[i], is_fresh(a, head.b, at[i]), part, &head.xs[(i - from) * a.N * CHUNK],
                        &head.memories[(i - from) * size], dS);
      }
    }
  }
  sum_heads(a, a.dv, dv);
}

// As forward, for a few tokens.
void bdh_level_steps(const Call* call, float* u) {
  const Call& a = *call;
  const bool shared = a.threads > 1 && a.B * a.H * a.T * a.N * a.D > (1 << 16);
#pragma omp parallel num_threads(a.threads) if (shared)
  {
    Steps steps(a);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < a.B * a.H; task++) steps.run(task / a.H, task % a.H);
  }
  sum_heads(a, a.u, u);
}
}
