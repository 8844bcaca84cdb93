// spike_linear on a CPU: int8 weights times whole counts, summed in int32. fp32 or bf16 in and out.
//
// A count is split in two: what fits into int8, which is nearly all there is, and the rest, kept as a short list for each row. Of a
// group, AVX-512's VNNI multiplies unsigned by signed bytes: the weights are moved up by 128, and -128 sum s is where the sum begins. So
// every int8 weight is exact. Each lane's sum of a group is a float times the group's scale; a result's lanes are added at the end.
// Every sum runs in the same order whatever the number of rows or threads, so a result never depends on its batch.
#include <algorithm>
#include <cmath>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "spike.h"

using namespace seqzoo;

extern "C" struct Call {  // as in cpp.py
  int64_t rows, in, out, group, half;
  double k;
  const void* x;  // [rows, in], contiguous, as all are
  const int8_t* weight;  // [out, in]
  const float *scales, *bias;  // [out, groups], [out] or null
  void* y;  // [rows, out]
};

namespace {

constexpr long STEP = 64;  // channels read at a time; a group of counts is filled up to that with zeros
constexpr int USUAL = 128;  // channels of a group that the compiler is to know
constexpr long NEAR = 128 << 10;  // bytes of weights that stay close while rows pass by
constexpr long AHEAD = 12288;  // bytes of weights from what is read to what is asked for
constexpr long SHARE = 1 << 18;  // products for which waking a thread pays
constexpr int BLOCK = 8;  // channels that are not shared between threads

struct Far {  // of a count, what int8 does not hold
  long channel;
  double rest;
};

struct Counts {
  long groups, wide;  // wide: of a group with its filling
  std::vector<int8_t> near;  // [rows, groups, wide]
  std::vector<int32_t> begin;  // [rows, groups]: where sums begin
  std::vector<float> threshold;  // [rows]
  std::vector<std::vector<Far>> far;  // [rows]
};

#ifdef __AVX512VNNI__
constexpr int SHIFT = 128;
#else
constexpr int SHIFT = 0;
#endif

template <typename T> Counts counts_of(const Call& a) {
  const long groups = (a.in + a.group - 1) / a.group, wide = (a.group + STEP - 1) / STEP * STEP;
  Counts c{groups, wide, std::vector<int8_t>(a.rows * groups * wide), std::vector<int32_t>(a.rows * groups),
           std::vector<float>(a.rows), std::vector<std::vector<Far>>(a.rows)};
  share_out(a.rows, a.rows * a.in, [&](long i) {
    static thread_local std::vector<float> room;
    room.resize(a.in);
    float* row = room.data();
    widen(row, (const T*)a.x + i * a.in, a.in);
    const float v = threshold(row, a.in, a.k);
    Vec most{}, broken{};
    for (long j = 0; j < a.in; j += LANES) {
      const Vec s = counted(get(row + j, a.in - j), v), size = magnitude(s);
      put(row + j, s, a.in - j);
      most = size > most ? size : most;
      broken += s - s;  // 0, or NaN where a count is no number
    }
    const bool whole = add_up(broken) == 0;
    c.threshold[i] = whole ? v : NAN;
    if (!whole) return;
    for (long g = 0; g < groups; g++) {
      const long n = std::min(a.group, a.in - g * a.group);
      int8_t* near = &c.near[(i * groups + g) * wide];
      const float* s = row + g * a.group;
      int sum = 0;
      for (long j = 0; j < n; j++) {
        near[j] = (int8_t)std::max(-127.0f, std::min(127.0f, s[j]));
        sum += near[j];
      }
      c.begin[i * groups + g] = -SHIFT * sum;
    }
    if (add_up(most > 127.0f ? broadcast(1.0f) : Vec{}) > 0)
      for (long j = 0; j < a.in; j++)
        if (std::fabs(row[j]) > 127) c.far[i].push_back({j, row[j] - (row[j] > 0 ? 127.0 : -127.0)});
  });
  return c;
}

template <typename T> void finish(const Call& a, const Counts& c, long i, long o, float sum) {
  if (!c.far[i].empty()) {
    double rest = 0;
    const int8_t* w = a.weight + o * a.in;
    const float* scales = a.scales + o * c.groups;
    for (const Far& f : c.far[i]) rest += f.rest * w[f.channel] * scales[f.channel / a.group];
    sum = (float)(sum + rest);
  }
  sum *= c.threshold[i];
  if (a.bias) sum += a.bias[o];
  store_row((T*)a.y + i * a.out + o, &sum, 1);
}

#ifdef __AVX512VNNI__
typedef int32_t Ints __attribute__((vector_size(64)));

struct Place {  // of a tile: its first weights and counts, and how far it is from a row of them to the next
  const int8_t *w, *s;
  long w_row, s_row;
};

template <int M, int J> inline __attribute__((always_inline)) void step(__m512i (&dots)[M][J], const Place& p, long k, long n) {
  const __m512i up = _mm512_set1_epi8((char)SHIFT);
  const __mmask64 there = n < STEP ? (1ull << n) - 1 : ~0ull;
  __m512i from_w[J];
  for (int j = 0; j < J; j++) {
    const int8_t* w = p.w + j * p.w_row + k;
    from_w[j] = _mm512_xor_si512(n < STEP ? _mm512_maskz_loadu_epi8(there, w) : _mm512_loadu_si512(w), up);
    if (M == 1) __builtin_prefetch((const char*)w + AHEAD);
  }
  for (int m = 0; m < M; m++) {
    const __m512i from_s = _mm512_loadu_si512(p.s + m * p.s_row + k);
    for (int j = 0; j < J; j++) dots[m][j] = _mm512_dpbusd_epi32(dots[m][j], from_w[j], from_s);
  }
}

template <typename T, int M, int J, int K> void tile_of(const Call& a, const Counts& c, long i0, long o0) {  // K: of a group, or 0
  const long s_row = c.groups * c.wide;
  const int8_t *w = a.weight + o0 * a.in, *s = &c.near[i0 * s_row];
  const int32_t* begin = &c.begin[i0 * c.groups];
  const float* scales = a.scales + o0 * c.groups;
  Vec sums[M][J] = {};
  for (long g = 0; g < c.groups; g++) {
    const long n = K ? K : std::min<long>(a.group, a.in - g * a.group);
    const Place p{w + g * a.group, s + g * c.wide, a.in, s_row};
    __m512i dots[M][J];
    for (int m = 0; m < M; m++)
      for (int j = 0; j < J; j++) dots[m][j] = _mm512_maskz_set1_epi32(1, begin[m * c.groups + g]);
    long k = 0;
    for (; k + STEP <= n; k += STEP) step(dots, p, k, STEP);
    if (k < n) step(dots, p, k, n - k);
    for (int j = 0; j < J; j++)
      for (int m = 0; m < M; m++) sums[m][j] += __builtin_convertvector((Ints)dots[m][j], Vec) * scales[j * c.groups + g];
  }
  for (int m = 0; m < M; m++)
    for (int j = 0; j < J; j++) finish<T>(a, c, i0 + m, o0 + j, add_up(sums[m][j]));
}

template <typename T, int M, int J> void tile(const Call& a, const Counts& c, long i, long o) {
  a.group == USUAL && a.in % USUAL == 0 ? tile_of<T, M, J, USUAL>(a, c, i, o) : tile_of<T, M, J, 0>(a, c, i, o);
}
#else
inline int dot(const int8_t* w, const int8_t* s, long n) {  // compilers know this one
  int sum = 0;
  for (long k = 0; k < n; k++) sum += w[k] * s[k];
  return sum;
}

template <typename T, int M, int J> void tile(const Call& a, const Counts& c, long i0, long o0) {
  for (long o = o0; o < o0 + J; o++)
    for (long i = i0; i < i0 + M; i++) {
      float sum = 0;
      for (long g = 0; g < c.groups; g++) {
        const long from = g * a.group, n = std::min<long>(a.group, a.in - from);
        sum += dot(a.weight + o * a.in + from, &c.near[(i * c.groups + g) * c.wide], n) * a.scales[o * c.groups + g];
      }
      finish<T>(a, c, i, o, sum);
    }
}
#endif

template <typename T, int M, int J> void rows_of(const Call& a, const Counts& c, long i, long from, long to) {
  for (; from + J <= to; from += J) tile<T, M, J>(a, c, i, from);
  for (; from < to; from++) tile<T, M, 1>(a, c, i, from);
}

template <typename T> void channels(const Call& a, const Counts& c, long from, long to) {
  const long some = std::max<long>(BLOCK, NEAR / a.in);
  for (; from < to; from += some) {
    const long end = std::min(to, from + some);
    long i = 0;
    for (; i + 4 <= a.rows; i += 4) rows_of<T, 4, 3>(a, c, i, from, end);
    for (; i < a.rows; i++) rows_of<T, 1, 4>(a, c, i, from, end);
  }
}

template <typename T> void forward(const Call& a) {
  const Counts c = counts_of<T>(a);
  const long shares = a.rows * a.out * a.in / SHARE;
#ifdef _OPENMP
  if (shares > 1) {
#pragma omp parallel num_threads((int)std::min<long>(shares, omp_get_max_threads()))
    {
      const long me = omp_get_thread_num(), all = omp_get_num_threads(), blocks = (a.out + BLOCK - 1) / BLOCK;
      channels<T>(a, c, me * blocks / all * BLOCK, std::min<long>(a.out, (me + 1) * blocks / all * BLOCK));
    }
    return;
  }
#endif
  channels<T>(a, c, 0, a.out);
}

}  // namespace

extern "C" void spike_linear_forward(const Call* a) { a->half ? forward<bf16>(*a) : forward<float>(*a); }
