// A row's threshold and counts, as reference.py has them: sums in double, the rest in float.
#pragma once
#include "rows.h"

namespace seqzoo {

typedef double VecWide __attribute__((vector_size(LANES * 8)));

template <typename T> inline void widen(float* to, const T* from, long n) {
  for (long i = 0; i < n; i += LANES) put(to + i, get(from + i, n - i), n - i);
}

inline Vec magnitude(Vec x) { return x < Vec{} ? -x : x; }

inline float threshold(const float* x, long n, double k) {
  VecWide sums{};
  for (long i = 0; i < n; i += LANES) {
    sums += __builtin_convertvector(magnitude(get(x + i, n - i)), VecWide);
  }
  double total = 0;
  for (int i = 0; i < LANES; i++) total += sums[i];
  const float v = (float)(total / (k * n));
  return v < 1e-5f ? 1e-5f : v > 1e4f ? 1e4f : v;  // a NaN stays one
}

// How often a threshold v fits into x, to the nearest whole number, ties to even. From 2^23 on floats are whole.
inline Vec counted(Vec x, float v) {
  const Vec u = x / v, whole = broadcast(8388608.0f), size = magnitude(u);
  const Vec near = size < whole ? size + whole - whole : size;
  return u < Vec{} ? -near : near;
}

}  // namespace seqzoo
