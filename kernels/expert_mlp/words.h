// Matrix products over 32-bit words: a word is one float, or two bf16 that stand next to each other along the summed axis.
// Seen so, fp32 and bf16 share every line below but the multiply-add itself: bf16 uses the processor's pair product where
// there is one (AVX512_BF16), else both halves are widened on the way. Sums are fp32.
#pragma once
#include <type_traits>
#include <utility>

#include "gemm.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#define UNROLLED _Pragma("GCC unroll 8")  // else the sums move to memory at a loop's end

namespace seqzoo {

typedef int32_t Word;
typedef int32_t WordsLoose __attribute__((vector_size(LANES * 4), aligned(2), may_alias));
typedef uint32_t WordLoose __attribute__((aligned(2), may_alias));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef uint16_t HalvesLoose __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef uint32_t VecBits __attribute__((vector_size(LANES * 4)));

template <typename T> constexpr int PER_WORD = sizeof(Word) / sizeof(T);
template <typename T> constexpr long words(long elements) { return (elements + PER_WORD<T> - 1) / PER_WORD<T>; }

inline VecInt load_words(const void* p) { return *(const WordsLoose*)p; }
inline void store_words(Word* p, VecInt x) { *(WordsLoose*)p = x; }

// sum += a * b lane by lane; a lane of bf16 holds two products.
template <typename T> inline void multiply_add(Vec& sum, VecInt a, VecInt b) {
  if constexpr (std::is_same_v<T, float>) {
    sum += (Vec)a * (Vec)b;
  } else {
#if defined(__AVX512BF16__)
    sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    const int32_t upper = (int32_t)0xffff0000;
    sum += (Vec)(a << 16) * (Vec)(b << 16);
    sum += (Vec)(a & upper) * (Vec)(b & upper);
#endif
  }
}

// C [MR, PANEL] = or += A B over K words. Row i of A starts at a[i] and steps by a_step words; B is packed, [K, PANEL].
template <typename T, int MR>
__attribute__((noinline)) void tile(long K, const void* const* a, long a_step, const Word* b, float* const* c, bool add) {
  Vec sums[MR][WIDE] = {};
  const WordLoose* row[MR];
  for (int i = 0; i < MR; i++) row[i] = (const WordLoose*)a[i];
  for (long k = 0; k < K; k++, b += PANEL) {
    VecInt from_b[WIDE];
    for (int j = 0; j < WIDE; j++) from_b[j] = load_words(b + j * LANES);
    for (int i = 0; i < MR; i++) {
      const VecInt from_a = (int32_t)row[i][k * a_step] + VecInt{};
      for (int j = 0; j < WIDE; j++) multiply_add<T>(sums[i][j], from_a, from_b[j]);
    }
  }
  UNROLLED for (int i = 0; i < MR; i++)  // row by row: two of them may be the same place
    UNROLLED for (int j = 0; j < WIDE; j++) {
      float* p = c[i] + j * LANES;
      store(p, add ? load(p) + sums[i][j] : sums[i][j]);
    }
}

template <typename T> void tile_of(int rows, long K, const void* const* a, long a_step, const Word* b, float* const* c, bool add) {
  static constexpr decltype(&tile<T, 1>) TILES[] = {tile<T, 1>, tile<T, 2>, tile<T, 3>, tile<T, 4>, tile<T, 5>, tile<T, 6>};
  TILES[rows - 1](K, a, a_step, b, c, add);
}

// The next share of `left` rows in tiles as equal as can be, none above `most`.
inline int share(long left, int most) {
  const long tiles = (left + most - 1) / most;
  return (int)((left + tiles - 1) / tiles);
}

inline float total(Vec x) {  // by halves: four steps for sixteen lanes
  alignas(64) float s[LANES];
  store(s, x);
  for (int n = LANES / 2; n; n /= 2)
    for (int i = 0; i < n; i++) s[i] += s[i + n];
  return s[0];
}

// out[r][q] = a[r] . w[q] over K words: for so few rows that packing w would cost more than it saves.
constexpr int DOT_ROWS = 4, DOT_COLS = 4;
constexpr long AHEAD = 8192;  // bytes: weights come from far away and once, so they are asked for early
template <typename T, int MR> inline void dots(long K, const void* const* a, const void* const* w, float (*out)[PANEL], int at) {
  Vec sums[MR][DOT_COLS] = {};
  for (long k = 0; k < K; k += LANES) {
    const long left = K - k;
    VecInt from_w[DOT_COLS];
    const auto fetch = [&](const void* p) {
      const char* q = (const char*)p + k * sizeof(Word);
      if (left >= LANES) return load_words(q);
      VecInt some{};
      memcpy(&some, q, left * sizeof(Word));
      return some;
    };
    for (int q = 0; q < DOT_COLS; q++) {
      from_w[q] = fetch(w[q]);
      __builtin_prefetch((const char*)w[q] + k * sizeof(Word) + AHEAD);
    }
    for (int r = 0; r < MR; r++) {
      const VecInt from_a = fetch(a[r]);
      for (int q = 0; q < DOT_COLS; q++) multiply_add<T>(sums[r][q], from_a, from_w[q]);
    }
  }
  for (int r = 0; r < MR; r++)
    for (int q = 0; q < DOT_COLS; q++) out[r][at + q] = total(sums[r][q]);
}

template <int STEP, int... L> inline void swap_blocks(VecInt& x, VecInt& y, std::integer_sequence<int, L...>) {
  const VecInt low = __builtin_shufflevector(x, y, (L & STEP ? LANES + L - STEP : L)...);
  y = __builtin_shufflevector(x, y, (L & STEP ? LANES + L : L + STEP)...);
  x = low;
}
template <int STEP> inline void transpose_steps(VecInt* r) {
  for (int i = 0; i < LANES; i++)
    if (!(i & STEP)) swap_blocks<STEP>(r[i], r[i + STEP], std::make_integer_sequence<int, LANES>{});
  if constexpr (STEP > 1) transpose_steps<STEP / 2>(r);
}

// to [K words, PANEL], columns 0 to cols-1: B^T of B [cols, K elements] with b_row elements between rows (K even for bf16).
template <typename T> void pack_rows(Word* to, const T* b, long b_row, int cols, long K) {
  const long n = words<T>(K);
  const auto word = [&](int j, long k) { return (Word) * (const WordLoose*)(b + j * b_row + k * PER_WORD<T>); };
  for (int j0 = 0; j0 < cols; j0 += LANES)
    for (long k0 = 0; k0 < n; k0 += LANES) {
      if (j0 + LANES <= cols && k0 + LANES <= n) {
        VecInt r[LANES];
        for (int j = 0; j < LANES; j++) __builtin_prefetch(b + (j0 + LANES + j) * b_row + k0 * PER_WORD<T>);
        for (int j = 0; j < LANES; j++) r[j] = load_words(b + (j0 + j) * b_row + k0 * PER_WORD<T>);
        transpose_steps<LANES / 2>(r);
        for (int k = 0; k < LANES; k++) store_words(to + (k0 + k) * PANEL + j0, r[k]);
      } else {
        for (long k = k0; k < n && k < k0 + LANES; k++)
          for (int j = j0; j < cols && j < j0 + LANES; j++) to[k * PANEL + j] = word(j, k);
      }
    }
}

// to [K words, to_row], columns 0 to cols-1: row(k) points at B's k-th row, so that rows may come from anywhere.
template <typename T, typename Row> void pack_columns(Word* to, long to_row, Row row, int cols, long K) {
  for (long k = 0; k < K; k += PER_WORD<T>, to += to_row) {
    if constexpr (std::is_same_v<T, float>) {
      memcpy(to, row(k), cols * sizeof(float));
    } else {
      const bf16 *low = row(k), *high = k + 1 < K ? row(k + 1) : nullptr;
      int j = 0;
      if (high)
        for (; j + LANES <= cols; j += LANES) {
          const Halves l = *(const HalvesLoose*)(low + j), h = *(const HalvesLoose*)(high + j);
          store_words(to + j, (VecInt)(__builtin_convertvector(l, VecBits) | __builtin_convertvector(h, VecBits) << 16));
        }
      for (; j < cols; j++) to[j] = low[j] | (high ? (uint32_t)high[j] << 16 : 0u);
    }
  }
}

}  // namespace seqzoo
