// The memory of strict linear attention within one chunk of one head. Definition: reference.py; algebra: chunked.py.
//
// Activations lie neuron by neuron, [N, CHUNK]: a neuron's tokens side by side. So every product with what is kept per neuron, [N, D]
// (the memory, the weights), reads both as they lie, and a rotation of neighbouring neurons is one of whole rows.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "gemm.h"

namespace seqzoo {

constexpr int CHUNK = 64;    // tokens; whole vectors
constexpr int BLOCK = 128;   // neurons in work at a time
constexpr int STRIP = 16;    // rows of a triangle at a time; what lies right of them is skipped

// The first tokens of a sequence's chunks, and T: a chunk never crosses the start of a document.
inline std::vector<int64_t> cut(const uint8_t* starts, int64_t T) {
  std::vector<int64_t> at;
  for (int64_t t = 0; t < T; t++)
    if (at.empty() || t - at.back() == CHUNK || (starts && starts[t])) at.push_back(t);
  at.push_back(T);
  return at;
}

struct Fade {  // exp(decay n)
  float power[CHUNK + 1];
  bool some;
  explicit Fade(float decay) : some(decay != 0) {
    for (int n = 0; n <= CHUNK; n++) power[n] = std::exp(decay * n);
  }
};

// X [c, CHUNK] (+)= below the diagonal of A^T B, both [K, CHUNK]: pairs of tokens. What is right of a strip is left alone.
inline void pairs(int c, int K, const float* A, const float* B, float* X, Into into) {
  for (int i = 0; i < c; i += STRIP) {
    const int rows = std::min(STRIP, c - i);
    gemm(rows, std::min(padded(i + rows), CHUNK), K, A + i, 1, CHUNK, B, CHUNK, X + i * CHUNK, CHUNK, into);
  }
}

// Sets what is not below the diagonal to 0, and lets the rest fade with the distance.
inline void below(int c, const Fade& fade, float* X) {
  for (int i = 0; i < c; i++) {
    float* row = X + i * CHUNK;
    if (fade.some)
      for (int j = 0; j < i; j++) row[j] *= fade.power[i - j];
    for (int j = i; j < CHUNK; j++) row[j] = 0;
  }
}

// Y [c, D] += X V with X [c, CHUNK] below the diagonal
inline void lower_times(int c, int D, const float* X, const float* V, float* Y) {
  for (int i = 0; i < c; i += STRIP) {
    const int rows = std::min(STRIP, c - i);
    gemm(rows, D, i + rows, X + i * CHUNK, CHUNK, 1, V, D, Y + i * D, D, Into::ADD);
  }
}

// Y [c, D] += X^T V, likewise
inline void lower_transposed_times(int c, int D, const float* X, const float* V, float* Y) {
  for (int i = 0; i < c; i += STRIP) {
    const int rows = std::min(STRIP, c - i);
    gemm(rows, D, c - i, X + i * CHUNK + i, 1, CHUNK, V + i * D, D, Y + i * D, D, Into::ADD);
  }
}

inline void scaled(int64_t n, const float* from, float by, float* to) {
  for (int64_t i = 0; i < n; i++) to[i] = by * from[i];
}

// [D, CHUNK] = [c, D]^T, 0 beyond c
inline void neurons_first(int c, int D, const float* from, int from_row, float* to) {
  if (c < CHUNK) memset(to, 0, sizeof(float) * D * CHUNK);
  transpose(c, D, from, from_row, to, CHUNK);
}

// S [n, D] = keep S + R V, with R [n, CHUNK] and V [c, D]
inline void write(int n, int c, int D, float keep, const float* R, const float* V, float* S) {
  if (keep == 0) return gemm(n, D, c, R, CHUNK, 1, V, D, S, D);
  if (keep != 1) scaled((int64_t)n * D, S, keep, S);
  gemm(n, D, c, R, CHUNK, 1, V, D, S, D, Into::ADD);
}

// Y [c, D] += R^T S
inline void read(int n, int c, int D, const float* R, const float* S, float* Y) {
  gemm(c, D, n, R, 1, CHUNK, S, D, Y, D, Into::ADD);
}

// What backward knows of a chunk beside its neurons. V, dA [c, D]; the rest follows from them.
struct Back {
  int c, D;
  const Fade& fade;
  std::vector<float> writes, writesT, reads, readsT, both, scores, from_memory;

  Back(int D, const Fade& fade)
      : D(D), fade(fade), writes(CHUNK * D), writesT(CHUNK * D), reads(CHUNK * D), readsT(CHUNK * D), both(CHUNK * CHUNK),
        scores(CHUNK * CHUNK), from_memory(CHUNK * D) {}

  // vT, daT [D, CHUNK]. `scores` must hold R R^T's lower part.
  void begin(int chunk, const float* v, const float* vT, const float* da, const float* daT, float* dv) {
    c = chunk;
    for (int i = 0; i < c; i++) {
      scaled(D, v + i * D, fade.power[c - i], writes.data() + i * D);
      scaled(D, da + i * D, fade.power[i], reads.data() + i * D);
    }
    neurons_first(c, D, writes.data(), D, writesT.data());
    neurons_first(c, D, reads.data(), D, readsT.data());
    pairs(c, D, daT, vT, both.data(), Into::SET);
    below(c, fade, both.data());
    for (int i = 0; i < c; i++)
      for (int j = 0; j < i; j++) both[j * CHUNK + i] = both[i * CHUNK + j];
    below(c, fade, scores.data());
    lower_transposed_times(c, D, scores.data(), da, dv);
    std::fill(from_memory.begin(), from_memory.end(), 0.0f);
  }

  // n neurons: dR [n, CHUNK] from R; dS becomes that of the memory before the chunk. `fresh`: there was none.
  void neurons(int n, const float* R, const float* S, float* dS, bool fresh, float* dR) {
    const int cp = padded(c);
    gemm(n, cp, c, R, CHUNK, 1, both.data(), CHUNK, dR, CHUNK);
    gemm(n, cp, D, dS, D, 1, writesT.data(), CHUNK, dR, CHUNK, Into::ADD);
    read(n, c, D, R, dS, from_memory.data());
    if (fresh) return (void)memset(dS, 0, sizeof(float) * n * D);
    gemm(n, cp, D, S, D, 1, readsT.data(), CHUNK, dR, CHUNK, Into::ADD);
    write(n, c, D, fade.power[c], R, reads.data(), dS);
  }

  void end(float* dv) {
    for (int i = 0; i < c; i++)
      for (int d = 0; d < D; d++) dv[i * D + d] += fade.power[c - i] * from_memory[i * D + d];
  }
};

}  // namespace seqzoo
