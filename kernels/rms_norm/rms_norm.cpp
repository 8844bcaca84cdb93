// rms_norm and gated_rms_norm on a CPU: a row is read once, and stays in cache for what follows. fp32 or bf16, computed in fp32.
//
//     r = (mean x^2 + eps)^-1/2   n = r x   y = (weight + offset) n   or   y = silu(gate) weight n
//     backward, with m = dL/dn:   dx = r (m - n mean(m n))            dweight = sum over rows of dL/d(weight n) n
//
// Rows come in blocks of a fixed size; dweight is summed inside a block, then over blocks in order, so it does not depend on the
// number of threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "rows.h"

using namespace seqzoo;

extern "C" struct Call {  // as in cpp.py
  int64_t rows, width, x_bf16, gate_bf16, weight_bf16, gated;
  int64_t x_steps[3], gate_steps[3];  // rows that share an outer step, the outer and the inner step
  float eps, offset;
  const void *x, *gate, *weight;
  void* y;
  float* rstd;  // [rows] or null in forward
  const void* dy;
  void *dx, *dgate;
  float* dweight;
};

namespace {

constexpr long BLOCK = 1 << 14;  // elements in a block of rows

long rows_per_block(const Call& a) { return std::max(1L, BLOCK / (long)a.width); }

std::vector<float> weights(const Call& a) {
  std::vector<float> w(a.width);
  widen_row(w.data(), 1, a.weight, 1, a.weight_bf16, a.width);
  for (float& x : w) x += a.offset;
  return w;
}

template <typename T> Rows<const T> rows_of(const void* first, const int64_t* steps) {
  return {(const T*)first, steps[0], steps[1], steps[2]};
}

template <typename T, typename G, bool GATED> void forward(const Call& a) {
  const long W = a.width, N = a.rows, step = rows_per_block(a);
  const auto w = weights(a);
  const auto x_rows = rows_of<T>(a.x, a.x_steps);
  const auto gate_rows = rows_of<G>(a.gate, a.gate_steps);
  share_out((N + step - 1) / step, N * W, [&](long block) {
    for (long i = block * step; i < std::min(N, (block + 1) * step); i++) {
      const T* x = x_rows(i);
      const G* gates = GATED ? gate_rows(i) : nullptr;
      Vec s0{}, s1{};
      for (long j = 0; j < W; j += 2 * LANES) {
        const Vec x0 = get(x + j, W - j);
        s0 += x0 * x0;
        if (j + LANES >= W) break;
        const Vec x1 = get(x + j + LANES, W - j - LANES);
        s1 += x1 * x1;
      }
      const float r = 1 / std::sqrt(add_up(s0 + s1) / W + a.eps);
      if (a.rstd) a.rstd[i] = r;
      T* y = (T*)a.y + i * W;
      for (long j = 0; j < W; j += LANES) {
        const long n = W - j;
        Vec out = get(x + j, n) * r;
        if constexpr (GATED) {
          out = as<T>(out) * get(&w[j], n);
          if (a.weight_bf16) out = as<T>(out);
          const Vec gate = get(gates + j, n);
          out *= gate * sigmoid(gate);
        } else {
          out *= get(&w[j], n);
        }
        put(y + j, out, n);
      }
    }
  });
}

template <typename T, typename G, bool GATED> void backward(const Call& a) {
  const long W = a.width, N = a.rows, step = rows_per_block(a), blocks = (N + step - 1) / step;
  const auto w = weights(a);
  const auto x_rows = rows_of<T>(a.x, a.x_steps);
  const auto gate_rows = rows_of<G>(a.gate, a.gate_steps);
  std::vector<float> partial(blocks * W);
  share_out(blocks, N * W, [&](long block) {
    float* dw = &partial[block * W];
    static thread_local std::vector<float> room;
    room.resize(W);
    float* m = room.data();
    for (long i = block * step; i < std::min(N, (block + 1) * step); i++) {
      const T *x = x_rows(i), *dy = (const T*)a.dy + i * W;
      const G* gates = GATED ? gate_rows(i) : nullptr;
      const float r = a.rstd[i];
      Vec along{};
      for (long j = 0; j < W; j += LANES) {
        const long left = W - j;
        const Vec n = get(x + j, left) * r, weight = get(&w[j], left);
        Vec d = get(dy + j, left);
        if constexpr (GATED) {
          const Vec gate = get(gates + j, left), s = sigmoid(gate);
          put((G*)a.dgate + i * W + j, d * n * weight * s * (1.0f + gate * (1.0f - s)), left);
          d *= gate * s;
        }
        put(dw + j, get(dw + j, left) + d * n, left);
        d *= weight;
        put(m + j, d, left);
        along += d * n;
      }
      const float mean = add_up(along) / W;
      T* dx = (T*)a.dx + i * W;
      for (long j = 0; j < W; j += LANES) put(dx + j, (get(m + j, W - j) - get(x + j, W - j) * (r * mean)) * r, W - j);
    }
  });
  std::fill_n(a.dweight, W, 0.0f);
  for (long block = 0; block < blocks; block++)
    for (long j = 0; j < W; j++) a.dweight[j] += partial[block * W + j];
}

template <typename F> void by_type(const Call& a, F&& run) {  // run(element of x, element of gate, gated)
  constexpr std::true_type yes{};
  constexpr std::false_type no{};
  if (!a.gated) return a.x_bf16 ? run(bf16{}, bf16{}, no) : run(0.0f, 0.0f, no);
  if (a.x_bf16) return a.gate_bf16 ? run(bf16{}, bf16{}, yes) : run(bf16{}, 0.0f, yes);
  return a.gate_bf16 ? run(0.0f, bf16{}, yes) : run(0.0f, 0.0f, yes);
}

}  // namespace

extern "C" {
void rms_norm_forward(const Call* a) {
  by_type(*a, [&](auto x, auto gate, auto gated) { forward<decltype(x), decltype(gate), gated>(*a); });
}
void rms_norm_backward(const Call* a) {
  by_type(*a, [&](auto x, auto gate, auto gated) { backward<decltype(x), decltype(gate), gated>(*a); });
}
}
