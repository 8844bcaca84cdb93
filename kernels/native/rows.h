// Rows of floats or bf16, a vector at a time, for native ops that are bound by memory: what is read and written is either type, what is
// computed is fp32. Strides in elements; the elements of a row stand side by side.
#pragma once
#include <type_traits>
#include <utility>

#include "gemm.h"
#if defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#endif

namespace seqzoo {

typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
typedef uint16_t Upper __attribute__((vector_size(LANES * 2)));
typedef uint16_t UpperLoose __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

inline Vec widened(Upper x) { return (Vec)(__builtin_convertvector(x, Bits) << 16); }
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
inline Upper narrowed(Vec x) { return (Upper)_mm512_cvtneps_pbh((__m512)x); }
#else
inline Upper narrowed(Vec x) {  // to the nearest, ties to even; a NaN stays one
  const Bits bits = (Bits)x, near = bits + 0x7fff + ((bits >> 16) & 1);
  return __builtin_convertvector(((bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : near) >> 16, Upper);
}
#endif

// The n next elements, n >= LANES for a whole vector; of fewer the lanes beyond are 0, and nothing beyond is touched.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline uint16_t first_lanes(long n) { return (uint16_t)((1u << n) - 1); }
inline Vec get_some(const float* p, long n) { return (Vec)_mm512_maskz_loadu_ps(first_lanes(n), p); }
inline Vec get_some(const bf16* p, long n) { return widened((Upper)_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
inline void put_some(float* p, Vec x, long n) { _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)x); }
inline void put_some(bf16* p, Vec x, long n) { _mm256_mask_storeu_epi16(p, first_lanes(n), (__m256i)narrowed(x)); }
#else
inline Vec get_some(const float* p, long n) { return load_some(p, (int)n); }
inline Vec get_some(const bf16* p, long n) {
  Upper upper{};
  memcpy(&upper, p, n * sizeof(bf16));
  return widened(upper);
}
inline void put_some(float* p, Vec x, long n) { store_some(p, x, (int)n); }
inline void put_some(bf16* p, Vec x, long n) {
  const Upper upper = narrowed(x);
  memcpy(p, &upper, n * sizeof(bf16));
}
#endif
inline Vec get(const float* p, long n) { return n >= LANES ? load(p) : get_some(p, n); }
inline Vec get(const bf16* p, long n) { return n >= LANES ? widened(*(const UpperLoose*)p) : get_some(p, n); }
inline void put(float* p, Vec x, long n) {
  if (n >= LANES) store(p, x);
  else put_some(p, x, n);
}
inline void put(bf16* p, Vec x, long n) {
  if (n >= LANES) *(UpperLoose*)p = narrowed(x);
  else put_some(p, x, n);
}
template <typename T> inline Vec as(Vec x) {  // rounded to T
  if constexpr (std::is_same_v<T, float>) return x;
  else return widened(narrowed(x));
}

template <int STEP, int... L> inline Vec folded(Vec x, std::integer_sequence<int, L...>) {
  return x + __builtin_shufflevector(x, x, (L ^ STEP)...);
}
template <int STEP = LANES / 2> inline float add_up(Vec x) {  // by halves: four steps for sixteen lanes
  x = folded<STEP>(x, std::make_integer_sequence<int, LANES>{});
  if constexpr (STEP > 1) return add_up<STEP / 2>(x);
  else return x[0];
}

inline Vec sigmoid(Vec x) {
  const Vec most = broadcast(88.0f);  // beyond it e^x overflows
  return 1.0f / (1.0f + exp(-x > most ? most : -x));
}

// ln(1 + e^x) = max(x, 0) + 2 artanh(u / (2 + u)), u = e^-|x|
inline Vec softplus(Vec x) {
  const Vec zero{}, u = exp(x > zero ? -x : x), s = u / (2.0f + u), s2 = s * s;
  Vec p = broadcast(1.0f / 15);
  p = p * s2 + 1.0f / 13, p = p * s2 + 1.0f / 11, p = p * s2 + 1.0f / 9, p = p * s2 + 1.0f / 7;
  p = p * s2 + 1.0f / 5, p = p * s2 + 1.0f / 3, p = p * s2 + 1.0f;
  return (x < zero ? zero : x) + 2.0f * s * p;
}

// n parameters of either type as floats, to[i * to_step] = from[i * from_step]
inline void widen_row(float* to, long to_step, const void* from, long from_step, bool half, long n) {
  for (long i = 0; i < n; i++) {
    if (half) load_row(to + i * to_step, (const bf16*)from + i * from_step, 1);
    else to[i * to_step] = ((const float*)from)[i * from_step];
  }
}

template <typename T> struct Rows {  // row i = (o, j), j < inner, is at o * outer_step + j * inner_step
  T* first;
  long inner, outer_step, inner_step;
  T* operator()(long i) const {
    return i < inner ? first + i * inner_step : first + i / inner * outer_step + i % inner * inner_step;
  }
};

constexpr long ALONE = 1 << 15;  // elements up to which waking other threads costs more than they save

// run(task) for every task, which are independent, in any order; `elements` in all of them
template <typename F> inline void share_out(long tasks, long elements, F&& run) {
  if (tasks == 1 || elements <= ALONE) {
    for (long i = 0; i < tasks; i++) run(i);
    return;
  }
#pragma omp parallel for schedule(dynamic)
  for (long i = 0; i < tasks; i++) run(i);
}

}  // namespace seqzoo
