// linear for few rows on a CPU: y = x W^T + bias, bound by reading W once. fp32 or bf16, sums in fp32.
//
// Output channels are taken several at a time, so that as many streams of W are under way; what comes next is asked for early. Every
// sum runs over k in the same order whatever the number of rows or threads, so a result never depends on its batch.
#include <algorithm>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__FMA__)
#include <immintrin.h>
#endif

#include "rows.h"

using namespace seqzoo;

extern "C" struct Call {  // as in cpp.py
  int64_t rows, in, out, half;
  const void *x, *weight, *bias;  // [rows, in], [out, in], [out] or null; contiguous
  void* y;  // [rows, out]
};

namespace {

constexpr int MOST = 4;  // rows of x in a tile
constexpr int BLOCK = 8;  // channels that are not shared between threads
constexpr long AHEAD = 12288;  // bytes of W from what is read to what is asked for
constexpr long SHARE = 1 << 16;  // bytes of W for which waking a thread pays

// a b + c, rounded once in every tile: left to itself, the compiler fuses in some tiles and not in others.
inline Vec fused(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Vec) == 64) return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  if constexpr (sizeof(Vec) == 32) return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
  return a * b + c;
}

template <typename T, int M, int J> inline void tile(const Call& a, const T* x, long j0, T* y) {
  const T* w = (const T*)a.weight + j0 * a.in;
  Vec sums[M][J] = {};
  const auto step = [&](long k, long n) {
    Vec from_w[J];
    for (int j = 0; j < J; j++) {
      from_w[j] = get(w + j * a.in + k, n);
      __builtin_prefetch((const char*)(w + j * a.in + k) + AHEAD);
    }
    for (int m = 0; m < M; m++) {
      const Vec from_x = get(x + m * a.in + k, n);
      for (int j = 0; j < J; j++) sums[m][j] = fused(from_x, from_w[j], sums[m][j]);
    }
  };
  long k = 0;
  for (; k + LANES <= a.in; k += LANES) step(k, LANES);
  if (k < a.in) step(k, a.in - k);
  const T* bias = (const T*)a.bias;
  for (int m = 0; m < M; m++)
    for (int j = 0; j < J; j++) {
      float s = add_up(sums[m][j]), b = 0;
      if (bias) load_row(&b, bias + j0 + j, 1), s += b;
      store_row(y + m * a.out + j0 + j, &s, 1);
    }
}

template <typename T, int J> void rows_of(const Call& a, long j0) {  // a block of W stays in cache for all of them
  static constexpr decltype(&tile<T, 1, J>) TILES[] = {tile<T, 1, J>, tile<T, 2, J>, tile<T, 3, J>, tile<T, 4, J>};
  for (long i = 0; i < a.rows; i += MOST)
    TILES[std::min<long>(MOST, a.rows - i) - 1](a, (const T*)a.x + i * a.in, j0, (T*)a.y + i * a.out);
}

template <typename T, int J> void channels(const Call& a, long from, long to) {
  for (; from + J <= to; from += J) rows_of<T, J>(a, from);
  for (; from < to; from++) rows_of<T, 1>(a, from);
}

template <typename T> void forward(const Call& a) {
  const auto share = [&](long from, long to) { a.rows > 2 ? channels<T, 4>(a, from, to) : channels<T, 8>(a, from, to); };
  const long shares = a.out * a.in * (long)sizeof(T) / SHARE;
#ifdef _OPENMP
  if (shares > 1) {
#pragma omp parallel num_threads((int)std::min<long>(shares, omp_get_max_threads()))
    {
      const long me = omp_get_thread_num(), all = omp_get_num_threads(), blocks = (a.out + BLOCK - 1) / BLOCK;
      share(me * blocks / all * BLOCK, std::min<long>(a.out, (me + 1) * blocks / all * BLOCK));
    }
    return;
  }
#endif
  share(0, a.out);
}

}  // namespace

extern "C" void linear_forward(const Call* a) { a->half ? forward<bf16>(*a) : forward<float>(*a); }
