// Rows of floats or bf16, a vector at a time, for native ops that are bound by memory: what is read and written is either type, what is
// computed is fp32. Strides in elements; the elements of a row stand side by side.
#pragma once
#include <type_traits>
#include <utility>

#include "gemm.h"

namespace seqzoo {

typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
typedef uint16_t Upper __attribute__((vector_size(LANES * 2)));
typedef uint16_t UpperLoose __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

inline Bits rounded(Bits bits) {  // to bf16 in the upper half, to the nearest, ties to even; a NaN stays one
  const Bits near = bits + 0x7fff + ((bits >> 16) & 1);
  return ((bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : near) & 0xffff0000;
}

// The n next elements, n >= LANES for a whole vector; lanes beyond are 0.
inline Vec get(const float* p, long n) { return n >= LANES ? load(p) : load_some(p, (int)n); }
inline Vec get(const bf16* p, long n) {
  Upper upper{};
  if (n >= LANES) upper = *(const UpperLoose*)p;
  else memcpy(&upper, p, n * sizeof(bf16));
  return (Vec)(__builtin_convertvector(upper, Bits) << 16);
}
inline void put(float* p, Vec x, long n) {
  if (n >= LANES) store(p, x);
  else store_some(p, x, (int)n);
}
inline void put(bf16* p, Vec x, long n) {
  const Upper upper = __builtin_convertvector(rounded((Bits)x) >> 16, Upper);
  if (n >= LANES) *(UpperLoose*)p = upper;
  else memcpy(p, &upper, n * sizeof(bf16));
}
template <typename T> inline Vec as(Vec x) {  // rounded to T
  if constexpr (std::is_same_v<T, float>) return x;
  else return (Vec)rounded((Bits)x);
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
  T* operator()(long i) const { return first + i / inner * outer_step + i % inner * inner_step; }
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
