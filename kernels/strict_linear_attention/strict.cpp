// Strict linear attention on a CPU, forward and backward, fp32. Definition: reference.py; a chunk: memory.h.
//
// A task is one head of one sequence. Backward takes the chunks in reverse, from memories that forward kept every SEGMENT chunks.
#include "memory.h"

using namespace seqzoo;

extern "C" struct Call {  // the fields of cpp.py's Call, in order
  int64_t B, T, H, G, N, D, threads, has_state;
  const float *r, *v, *decay;  // [B, T, H, N], [B, T, G, D], [H] or null
  const uint8_t* starts;       // [B, T] or null
  float *state, *a, *kept;     // [B, H, N, D] before the first token, then after the last; [B, T, H, D]; [segments, H, N, D] or null
  const float* da;             // [B, T, H, D]
  float *d_state, *dr, *dv;    // as state, first of the last memory; as r; [B, T, H, D]
};

namespace {

constexpr int SEGMENT = 8;  // chunks

struct Head {
  const Call& a;
  const int N, D;
  const int64_t b, h;
  const Fade fade;
  const std::vector<int64_t> at;
  std::vector<float> r, v, written, scores, reads, vT;

  Head(const Call& a, int64_t task)
      : a(a), N(a.N), D(a.D), b(task / a.H), h(task % a.H), fade(a.decay ? a.decay[h] : 0),
        at(cut(a.starts ? a.starts + b * a.T : nullptr, a.T)), r(N * CHUNK), v(D * CHUNK), written(D * CHUNK),
        scores(CHUNK * CHUNK), reads(D * CHUNK), vT(D * CHUNK) {}

  int64_t row(int64_t t) const { return (b * a.T + t) * a.H + h; }
  bool fresh(size_t i) const { return (a.starts && a.starts[b * a.T + at[i]]) || (i == 0 && !a.has_state); }
  int tokens(size_t i) const { return at[i + 1] - at[i]; }
  int64_t segments() const { return (at.size() - 1 + SEGMENT - 1) / SEGMENT; }

  void load_chunk(size_t i) {
    const int c = tokens(i);
    neurons_first(c, N, a.r + row(at[i]) * N, a.H * N, r.data());
    for (int k = 0; k < c; k++) {
      const float* from = a.v + ((b * a.T + at[i] + k) * a.G + h / (a.H / a.G)) * D;
      scaled(D, from, 1, &v[k * D]);
      scaled(D, from, fade.power[c - k], &written[k * D]);
    }
  }

  void forward(size_t i, float* S) {
    const int c = tokens(i);
    load_chunk(i);
    std::fill(reads.begin(), reads.end(), 0.0f);
    if (!fresh(i)) read(N, c, D, r.data(), S, reads.data());
    for (int k = 0; fade.some && k < c; k++) scaled(D, &reads[k * D], fade.power[k], &reads[k * D]);
    pairs(c, N, r.data(), r.data(), scores.data(), Into::SET);
    below(c, fade, scores.data());
    lower_times(c, D, scores.data(), v.data(), reads.data());
    write(N, c, D, fresh(i) ? 0 : fade.power[c], r.data(), written.data(), S);
    for (int k = 0; k < c; k++) memcpy(a.a + row(at[i] + k) * D, &reads[k * D], sizeof(float) * D);
  }

  void backward(size_t i, const float* S, float* dS, Back& back, float* dr) {
    const int c = tokens(i);
    load_chunk(i);
    neurons_first(c, D, v.data(), D, vT.data());
    std::vector<float> da(c * D), daT(D * CHUNK), dv(c * D);
    for (int k = 0; k < c; k++) memcpy(&da[k * D], a.da + row(at[i] + k) * D, sizeof(float) * D);
    neurons_first(c, D, da.data(), D, daT.data());
    pairs(c, N, r.data(), r.data(), back.scores.data(), Into::SET);
    back.begin(c, v.data(), vT.data(), da.data(), daT.data(), dv.data());
    back.neurons(N, r.data(), S, dS, fresh(i), dr);
    back.end(dv.data());
    transpose(N, c, dr, CHUNK, a.dr + row(at[i]) * N, a.H * N);
    for (int k = 0; k < c; k++) memcpy(a.dv + row(at[i] + k) * D, &dv[k * D], sizeof(float) * D);
  }
};

std::vector<int64_t> segments_before(const Call& a) {  // each sequence
  std::vector<int64_t> before{0};
  for (int64_t b = 0; b < a.B; b++) before.push_back(before.back() + Head(a, b * a.H).segments());
  return before;
}

}  // namespace

extern "C" {

// How many memories of all heads `forward` keeps.
int64_t strict_linear_attention_segments(const Call* call) { return segments_before(*call).back(); }

void strict_linear_attention_forward(const Call* call) {
  const Call& a = *call;
  const int64_t size = a.N * a.D;
  const auto before = segments_before(a);
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
  for (int64_t task = 0; task < a.B * a.H; task++) {
    Head head(a, task);
    float* S = a.state + task * size;
    for (size_t i = 0; i + 1 < head.at.size(); i++) {
      if (a.kept && i % SEGMENT == 0 && !head.fresh(i))
        memcpy(a.kept + ((before[head.b] + i / SEGMENT) * a.H + head.h) * size, S, sizeof(float) * size);
      head.forward(i, S);
    }
  }
}

void strict_linear_attention_backward(const Call* call) {
  const Call& a = *call;
  const int64_t size = a.N * a.D;
  const auto before = segments_before(a);
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
  for (int64_t task = 0; task < a.B * a.H; task++) {
    Head head(a, task);
    Back back(a.D, head.fade);
    std::vector<float> memories(SEGMENT * size), dr(a.N * CHUNK);
    for (int64_t s = head.segments(); s-- > 0;) {
      const size_t from = s * SEGMENT, to = std::min(head.at.size() - 1, from + SEGMENT);
      if (!head.fresh(from))
        memcpy(memories.data(), a.kept + ((before[head.b] + s) * a.H + head.h) * size, sizeof(float) * size);
      for (size_t i = from; i + 1 < to; i++) {
        float* S = &memories[(i - from) * size];
        memcpy(S + size, S, sizeof(float) * size);
        head.load_chunk(i);
        write(a.N, head.tokens(i), a.D, head.fresh(i) ? 0 : head.fade.power[head.tokens(i)], head.r.data(), head.written.data(),
              S + size);
      }
      for (size_t i = to; i-- > from;) head.backward(i, &memories[(i - from) * size], a.d_state + task * size, back, dr.data());
    }
  }
}
}
