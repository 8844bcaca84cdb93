// Matrix products over 32-bit words: a word is one float, or two bf16 that stand next to each other along the summed axis. Seen so,
// both types share every line below but the multiply-add: bf16 takes the processor's product of pairs where there is one
// (AVX512_BF16), else both halves are widened on the way. Sums are fp32.
#pragma once
#include <type_traits>
#include <utility>

#include "gemm.h"
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define SEQZOO_PAIRS 1
#include <immintrin.h>
#endif

namespace seqzoo {

typedef int32_t Word __attribute__((may_alias));
typedef int32_t WordsLoose __attribute__((vector_size(LANES * 4), aligned(2), may_alias));
typedef uint32_t VecBits __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef uint16_t HalvesLoose __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

template <typename T> constexpr int PER_WORD = sizeof(Word) / sizeof(T);
template <typename T> constexpr long words(long elements) { return (elements + PER_WORD<T> - 1) / PER_WORD<T>; }

inline VecInt load_words(const void* p) { return *(const WordsLoose*)p; }
inline void store_words(void* p, VecInt x) { *(WordsLoose*)p = x; }

inline Vec widen(const float* p) { return load(p); }
inline Vec widen(const bf16* p) { return (Vec)(__builtin_convertvector(*(const HalvesLoose*)p, VecBits) << 16); }

inline VecBits upper_half(Vec x) {  // rounded to bf16, to the nearest, ties to even; a NaN stays one
  const VecBits bits = (VecBits)x, rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return ((bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : rounded) & 0xffff0000;
}

inline void narrow(float* p, Vec x) { store(p, x); }
inline void narrow(bf16* p, Vec x) { *(HalvesLoose*)p = __builtin_convertvector(upper_half(x) >> 16, Halves); }

inline VecInt pairs(Vec low, Vec high) {  // words of low's and high's lanes
#ifdef SEQZOO_PAIRS
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  alignas(64) static const uint16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (VecInt)_mm512_permutexvar_epi16(_mm512_load_si512(ORDER), both);
#else
  return (VecInt)(upper_half(low) >> 16 | upper_half(high));
#endif
}

// sum += a * b lane by lane; a lane of bf16 holds two products.
template <typename T> inline void multiply_add(Vec& sum, VecInt a, VecInt b) {
  if constexpr (std::is_same_v<T, float>) {
    sum += (Vec)a * (Vec)b;
  } else {
#ifdef SEQZOO_PAIRS
    sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    const int32_t upper = (int32_t)0xffff0000;
    sum += (Vec)(a << 16) * (Vec)(b << 16);
    sum += (Vec)(a & upper) * (Vec)(b & upper);
#endif
  }
}

struct Strided {  // A [M, n words]: word (i, k) stands at at[i * row + k * col]
  const Word* at;
  long row, col;
};

// C [MR, NV vectors] = or += A B over n words; B is [n, b_row].
template <typename T, int MR, int NV>
inline void word_tile(long n, Strided a, const Word* b, long b_row, float* c, long c_row, bool add) {
  Vec sums[MR][NV] = {};
  for (long k = 0; k < n; k++) {
    VecInt from_b[NV];
    for (int j = 0; j < NV; j++) from_b[j] = load_words(b + k * b_row + j * LANES);
    for (int i = 0; i < MR; i++) {
      const VecInt from_a = a.at[i * a.row + k * a.col] + VecInt{};
      for (int j = 0; j < NV; j++) multiply_add<T>(sums[i][j], from_a, from_b[j]);
    }
  }
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NV; j++) {
      float* p = c + i * c_row + j * LANES;
      store(p, add ? load(p) + sums[i][j] : sums[i][j]);
    }
}

template <typename T, int MR, int NV>
inline long word_rows(long i, long M, long n, Strided a, const Word* b, long b_row, float* c, long c_row, bool add) {
  for (; i + MR <= M; i += MR) word_tile<T, MR, NV>(n, {a.at + i * a.row, a.row, a.col}, b, b_row, c + i * c_row, c_row, add);
  return i;
}

template <typename T, int NV>
__attribute__((noinline)) void word_panel(long M, long n, Strided a, const Word* b, long b_row, float* c, long c_row, bool add) {
  constexpr int MR = NV == WIDE ? WIDE_ROWS : NV == 3 ? 8 : 12;
  long i = word_rows<T, MR, NV>(0, M, n, a, b, b_row, c, c_row, add);
  if constexpr (MR > 8) i = word_rows<T, 8, NV>(i, M, n, a, b, b_row, c, c_row, add);
  if constexpr (MR > 4) i = word_rows<T, 4, NV>(i, M, n, a, b, b_row, c, c_row, add);
  i = word_rows<T, 2, NV>(i, M, n, a, b, b_row, c, c_row, add);
  word_rows<T, 1, NV>(i, M, n, a, b, b_row, c, c_row, add);
}

// C [M, vectors * LANES] = or += A B over n words, all columns whole vectors.
template <typename T> void product(long M, long vectors, long n, Strided a, const Word* b, long b_row, float* c, long c_row, bool add) {
  using Panel = decltype(&word_panel<T, 1>);
  static constexpr Panel PANELS[] = {word_panel<T, 1>, word_panel<T, 2>, word_panel<T, WIDE == 4 ? 3 : 1>, word_panel<T, WIDE>};
  for (long j = 0; j < vectors; j += WIDE) {
    const long some = vectors - j < WIDE ? vectors - j : WIDE;
    PANELS[some == WIDE ? 3 : some - 1](M, n, a, b + j * LANES, b_row, c + j * LANES, c_row, add);
  }
}

template <int STEP, int... L> inline void swap_blocks(VecInt& x, VecInt& y, std::integer_sequence<int, L...>) {
  const VecInt low = __builtin_shufflevector(x, y, (L & STEP ? LANES + L - STEP : L)...);
  y = __builtin_shufflevector(x, y, (L & STEP ? LANES + L : L + STEP)...);
  x = low;
}
template <int STEP = LANES / 2> inline void transpose_square(VecInt* r) {
  for (int i = 0; i < LANES; i++)
    if (!(i & STEP)) swap_blocks<STEP>(r[i], r[i + STEP], std::make_integer_sequence<int, LANES>{});
  if constexpr (STEP > 1) transpose_square<STEP / 2>(r);
}

template <int STEP = LANES / 2> inline Vec totals(Vec* r) {  // lane i is the sum of r[i]; r is used up
  for (int i = 0; i < STEP; i++) {
    VecInt x = (VecInt)r[i], y = (VecInt)r[i + STEP];
    swap_blocks<STEP>(x, y, std::make_integer_sequence<int, LANES>{});
    r[i] = (Vec)x + (Vec)y;
  }
  if constexpr (STEP > 1) return totals<STEP / 2>(r);
  else return r[0];
}

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// 2^x to about 1e-7 relative for x <= 127; 0 below -126, so that what is masked is exactly nothing.
inline Vec exp2(Vec x) {
  const Vec shift = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number, which then stands in the low bits
  const Vec whole = x + shift, r = x - (whole - shift);
  Vec p = broadcast(1.32765e-3f);  // least relative error on [-1/2, 1/2]
  p = p * r + 9.67554e-3f, p = p * r + 5.550713e-2f, p = p * r + 2.402212e-1f, p = p * r + 6.9314697e-1f, p = p * r + 1.00000007f;
  const Vec power = (Vec)((VecInt)p + ((VecInt)whole << 23));
  return x < -126.0f ? Vec{} : power;
}

}  // namespace seqzoo
