// Small fp32 matrix products held in registers, for native ops whose operands stay in cache.
//
//     gemm     C [M,N] = / += / -= A [M,K] B [K,N]      A by two strides, so A^T costs nothing
//     gemm_nt  the same with B stored transposed, [N,K] (a weight as torch keeps it)
//
// Row-major, strides in elements. Any M, N, K >= 0, no alignment, nothing outside the matrices is read or written. The vectors are
// the compiler's own (GCC, Clang), as wide as the machine's, so the same text runs on AVX-512, AVX2 and NEON. One thread: callers
// share work out between calls. Sums run over k in order, the same for a row whatever M is, so a result never depends on its batch.
#pragma once
#include <cstdint>
#include <cstring>

namespace seqzoo {

#if defined(__AVX512F__)
constexpr int LANES = 16, WIDE = 4, NARROW_ROWS = 12;  // 32 registers: 6 x 4 or 12 x 2 sums, the rest for operands
#elif defined(__AVX__)
constexpr int LANES = 8, WIDE = 2, NARROW_ROWS = 6;  // 16 registers: 6 x 2 sums
#else
constexpr int LANES = 4, WIDE = 4, NARROW_ROWS = 12;  // NEON: 32 registers
#endif
constexpr int WIDE_ROWS = 6;

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t VecInt __attribute__((vector_size(LANES * 4)));
typedef float VecLoose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));  // at any float's address

inline Vec load(const float* p) { return *(const VecLoose*)p; }
inline void store(float* p, Vec x) { *(VecLoose*)p = x; }
inline Vec broadcast(float x) { return x - Vec{}; }
inline Vec load_some(const float* p, int n) {  // the first n lanes, the rest 0; 0 < n < LANES
  if (n <= 0 || n >= LANES) __builtin_unreachable();
  Vec x{};
  memcpy(&x, p, n * sizeof(float));
  return x;
}
inline void store_some(float* p, Vec x, int n) {
  if (n <= 0 || n >= LANES) __builtin_unreachable();
  memcpy(p, &x, n * sizeof(float));
}
inline float sum(Vec x) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += x[i];
  return total;
}
constexpr int padded(int n) { return (n + LANES - 1) / LANES * LANES; }  // n floats rounded up to whole vectors

inline float dot(const float* a, const float* b, int n) {
  Vec s0{}, s1{};
  int i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) s0 += load(a + i) * load(b + i), s1 += load(a + i + LANES) * load(b + i + LANES);
  if (i + LANES <= n) s0 += load(a + i) * load(b + i), i += LANES;
  if (i < n) s1 += load_some(a + i, n - i) * load_some(b + i, n - i);
  return sum(s0 + s1);
}

// e^x to about 1e-7 relative for -87 <= x <= 88; 0 below, so that a strong decay ends at nothing and not at a denormal.
inline Vec exp(Vec x) {
  const VecInt gone = x < -87.0f;
  x = gone ? Vec{} : x;
  const Vec shift = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  Vec n = x * 1.44269504088896341f + shift - shift;
  Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
  Vec p = broadcast(1.0f / 5040);
  p = p * r + 1.0f / 720, p = p * r + 1.0f / 120, p = p * r + 1.0f / 24, p = p * r + 1.0f / 6;
  p = p * r + 0.5f, p = p * r + 1.0f, p = p * r + 1.0f;
  VecInt scale = (__builtin_convertvector(n, VecInt) + 127) << 23;
  Vec power;
  memcpy(&power, &scale, sizeof power);
  return gone ? Vec{} : p * power;
}

// bf16 is the upper half of a float.
typedef uint16_t bf16;
inline void load_row(float* to, const float* from, int n) { memcpy(to, from, n * sizeof(float)); }
inline void load_row(float* to, const bf16* from, int n) {
  for (int i = 0; i < n; i++) {
    uint32_t bits = (uint32_t)from[i] << 16;
    memcpy(to + i, &bits, 4);
  }
}
inline void store_row(float* to, const float* from, int n) { memcpy(to, from, n * sizeof(float)); }
inline void store_row(bf16* to, const float* from, int n) {  // to the nearest, ties to even; a NaN stays one
  for (int i = 0; i < n; i++) {
    uint32_t bits;
    memcpy(&bits, from + i, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to[i] = (bf16)((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
  }
}

// to [cols, rows] = from [rows, cols]^T
inline void transpose(int rows, int cols, const float* from, int from_row, float* to, int to_row) {
  constexpr int BLOCK = 16;
  for (int i0 = 0; i0 < rows; i0 += BLOCK)
    for (int j0 = 0; j0 < cols; j0 += BLOCK) {
      const int i1 = i0 + BLOCK < rows ? i0 + BLOCK : rows, j1 = j0 + BLOCK < cols ? j0 + BLOCK : cols;
      for (int j = j0; j < j1; j++)
        for (int i = i0; i < i1; i++) to[j * (long)to_row + i] = from[i * (long)from_row + j];
    }
}

enum class Into { SET, ADD, SUB };  // C = AB, C += AB, C -= AB

// MR x NV vectors of C; `cols` of them count (B is padded to whole vectors, C is not).
template <int MR, int NV>
inline void tile(int K, const float* A, long a_row, long a_col, const float* B, long b_row, float* C, long c_row, int cols, Into into) {
  Vec c[MR][NV] = {};
  for (int k = 0; k < K; k++) {
    Vec b[NV];
    for (int j = 0; j < NV; j++) b[j] = load(B + k * b_row + j * LANES);
    for (int i = 0; i < MR; i++) {
      const Vec a = broadcast(A[i * a_row + k * a_col]);
      for (int j = 0; j < NV; j++) c[i][j] += a * b[j];
    }
  }
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NV; j++) {
      float* p = C + i * c_row + j * LANES;
      const int n = cols - j * LANES;
      Vec x = c[i][j];
      if (into != Into::SET) {
        const Vec old = n >= LANES ? load(p) : load_some(p, n);
        x = into == Into::ADD ? old + x : old - x;
      }
      if (n >= LANES) store(p, x);
      else store_some(p, x, n);
    }
}

template <int MR, int NV>
inline int rows(int i, int M, int K, const float* A, long a_row, long a_col, const float* B, long b_row, float* C, long c_row, int cols,
                Into into) {
  for (; i + MR <= M; i += MR) tile<MR, NV>(K, A + i * a_row, a_row, a_col, B, b_row, C + i * c_row, c_row, cols, into);
  return i;
}

template <int NV>
__attribute__((noinline)) void panel(int M, int K, const float* A, long a_row, long a_col, const float* B, long b_row, float* C,
                                     long c_row, int cols, Into into) {
  constexpr int MR = NV == WIDE ? WIDE_ROWS : NARROW_ROWS;
  int i = rows<MR, NV>(0, M, K, A, a_row, a_col, B, b_row, C, c_row, cols, into);
  if constexpr (MR > 4) i = rows<4, NV>(i, M, K, A, a_row, a_col, B, b_row, C, c_row, cols, into);
  if constexpr (MR > 2) i = rows<2, NV>(i, M, K, A, a_row, a_col, B, b_row, C, c_row, cols, into);
  rows<1, NV>(i, M, K, A, a_row, a_col, B, b_row, C, c_row, cols, into);
}

// Up to WIDE vectors of columns, from B already padded to whole vectors.
inline void panel_of(int cols, int M, int K, const float* A, long a_row, long a_col, const float* B, long b_row, float* C, long c_row,
                     Into into) {
  const int vectors = (cols + LANES - 1) / LANES;
  if (vectors == WIDE) return panel<WIDE>(M, K, A, a_row, a_col, B, b_row, C, c_row, cols, into);
  int j = 0;
  if (vectors >= 2) {
    const int some = cols < 2 * LANES ? cols : 2 * LANES;
    panel<2>(M, K, A, a_row, a_col, B, b_row, C, c_row, some, into), j = 2 * LANES;
  }
  if (j < cols) panel<1>(M, K, A, a_row, a_col, B + j, b_row, C + j, c_row, cols - j, into);
}

constexpr int PANEL = WIDE * LANES, DEPTH = 256;  // columns and rows of B in work at a time
constexpr int NEAR = 512;  // floats between rows of B from which on its rows fight for the same lines of cache: copy them first

inline void clear(int M, int N, float* C, long c_row) {
  for (int i = 0; i < M; i++) memset(C + i * c_row, 0, N * sizeof(float));
}

// C (+|-)= A B; A[i, k] is at A[i * a_row + k * a_col], so (1, row stride) reads a matrix stored transposed.
inline void gemm(int M, int N, int K, const float* A, long a_row, long a_col, const float* B, long b_row, float* C, long c_row,
                 Into into = Into::SET) {
  if (K == 0 && into == Into::SET) return clear(M, N, C, c_row);
  alignas(64) float packed[DEPTH * PANEL];
  for (int k0 = 0; k0 < K; k0 += DEPTH) {
    const int depth = K - k0 < DEPTH ? K - k0 : DEPTH;
    for (int j0 = 0; j0 < N; j0 += PANEL) {
      const int cols = N - j0 < PANEL ? N - j0 : PANEL;
      const float* b = B + k0 * b_row + j0;
      long row = b_row;
      if (cols % LANES || (b_row >= NEAR && M > WIDE_ROWS)) {
        row = padded(cols);
        for (int k = 0; k < depth; k++) {
          memset(packed + k * row + row - LANES, 0, LANES * sizeof(float));
          memcpy(packed + k * row, b + k * b_row, cols * sizeof(float));
        }
        b = packed;
      }
      panel_of(cols, M, depth, A + k0 * a_col, a_row, a_col, b, row, C + j0, c_row, into);
    }
    if (into == Into::SET) into = Into::ADD;
  }
}

// C (+|-)= A B^T, B stored [N, K] with b_row between its rows; A as in gemm.
inline void gemm_nt(int M, int N, int K, const float* A, long a_row, long a_col, const float* B, long b_row, float* C, long c_row,
                    Into into = Into::SET) {
  if (K == 0 && into == Into::SET) return clear(M, N, C, c_row);
  alignas(64) float packed[DEPTH * PANEL];
  for (int k0 = 0; k0 < K; k0 += DEPTH) {
    const int depth = K - k0 < DEPTH ? K - k0 : DEPTH;
    for (int j0 = 0; j0 < N; j0 += PANEL) {
      const int cols = N - j0 < PANEL ? N - j0 : PANEL;
      const long row = padded(cols);
      for (int k = 0; k < depth; k++) memset(packed + k * row + row - LANES, 0, LANES * sizeof(float));
      transpose(cols, depth, B + j0 * b_row + k0, b_row, packed, row);
      panel_of(cols, M, depth, A + k0 * a_col, a_row, a_col, packed, row, C + j0, c_row, into);
    }
    if (into == Into::SET) into = Into::ADD;
  }
}

// y [N] (+|-)= B x, B stored [N, K]: one token, bound by reading B once.
inline void gemv(int N, int K, const float* B, long b_row, const float* x, float* y, Into into = Into::SET) {
  for (int j = 0; j < N; j++) {
    const float s = dot(B + j * b_row, x, K);
    y[j] = into == Into::SET ? s : into == Into::ADD ? y[j] + s : y[j] - s;
  }
}

}  // namespace seqzoo
