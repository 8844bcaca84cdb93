// delta_inputs on a CPU: q and k brought to unit length head by head, log decays and step sizes, in one pass over the tokens. fp32 or
// bf16 in, fp32 out. v is not touched here: it stays where it lies.
//
//     q = s r x,  r = (x . x + 1e-6)^-1/2        dx = s r (dq - x r^2 (dq . x)),  s = K^-1/2 for q, 1 for k
//     g = -e^a_log softplus(a + dt_bias)         da = -dg e^a_log sigmoid(a + dt_bias)
//     beta = c sigmoid(b)                        db = dbeta beta (1 - sigmoid(b)),  c = beta_scale
//
// Tokens come in blocks of a fixed number; the gradients of a_log (sum of dg g) and dt_bias (sum of da) are summed inside a block, then
// over blocks in order, so they do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "rows.h"

using namespace seqzoo;

extern "C" struct Call {  // as in cpp.py
  int64_t B, T, H, HV, K, V;
  int64_t qkv_bf16, ba_bf16, a_log_bf16, dt_bias_bf16;
  int64_t qkv_batch, qkv_time, ba_batch, ba_time;  // elements between batches, tokens
  double beta_scale;
  const void *qkv, *ba, *a_log, *dt_bias;
  float *q, *k, *g, *beta;  // [B, T, H, K] and [B, T, HV]; in backward their gradients
  const void* dv;           // [B, T, HV, V]
  void *dqkv, *dba;         // [B, T, 2 H K + HV V] and [B, T, 2 HV]
  float* dheads;            // [2, HV] of a_log, then of dt_bias
};

namespace {

constexpr long TOKENS = 64;  // in a block
constexpr float TINY = 1e-6f;

struct Gates {  // per value head, a whole number of vectors
  std::vector<float> rate, bias;
  explicit Gates(const Call& a) : rate(padded(a.HV)), bias(padded(a.HV)) {
    widen_row(rate.data(), 1, a.a_log, 1, a.a_log_bf16, a.HV);
    widen_row(bias.data(), 1, a.dt_bias, 1, a.dt_bias_bf16, a.HV);
    for (size_t h = 0; h < rate.size(); h += LANES) store(&rate[h], -exp(load(&rate[h])));
  }
};

template <typename T> float inverse_length(const T* x, long K) {
  Vec s{};
  for (long j = 0; j < K; j += LANES) {
    const Vec part = get(x + j, K - j);
    s += part * part;
  }
  return 1 / std::sqrt(add_up(s) + TINY);
}

template <typename X, typename G> struct Inputs {  // elements of qkv and of ba
  const Call& a;
  const Gates gates;
  explicit Inputs(const Call& call) : a(call), gates(call) {}

  long blocks() const { return (a.B * a.T + TOKENS - 1) / TOKENS; }
  Rows<const X> qkv() const { return {(const X*)a.qkv, a.T, a.qkv_batch, a.qkv_time}; }
  Rows<const G> ba() const { return {(const G*)a.ba, a.T, a.ba_batch, a.ba_time}; }

  template <typename F> void tokens(long channels, F&& run) const {  // run(block, token)
    share_out(blocks(), a.B * a.T * channels, [&](long block) {
      for (long i = block * TOKENS; i < std::min<long>(a.B * a.T, (block + 1) * TOKENS); i++) run(block, i);
    });
  }

  void forward() const {
    const long K = a.K, heads = a.H;
    const float scale = 1 / std::sqrt((float)K), most = a.beta_scale;
    tokens(2 * heads * K, [&](long, long i) {
      const X* x = qkv()(i);
      const G *b = ba()(i), *decay = b + a.HV;
      for (long h = 0; h < 2 * heads; h++, x += K) {
        float* to = h < heads ? a.q + (i * heads + h) * K : a.k + (i * heads + h - heads) * K;
        const float r = inverse_length(x, K) * (h < heads ? scale : 1);
        for (long j = 0; j < K; j += LANES) put(to + j, get(x + j, K - j) * r, K - j);
      }
      for (long h = 0; h < a.HV; h += LANES) {
        const long n = a.HV - h;
        put(a.beta + i * a.HV + h, sigmoid(get(b + h, n)) * most, n);
        put(a.g + i * a.HV + h, load(&gates.rate[h]) * softplus(get(decay + h, n) + load(&gates.bias[h])), n);
      }
    });
  }

  void backward() const {
    const long K = a.K, heads = a.H, width = 2 * heads * K + a.HV * a.V, row = padded(a.HV);
    const float scale = 1 / std::sqrt((float)K), most = a.beta_scale;
    std::vector<float> partial(blocks() * 2 * row);
    tokens(width, [&](long block, long i) {
      const X* x = qkv()(i);
      const G *b = ba()(i), *decay = b + a.HV;
      X* dx = (X*)a.dqkv + i * width;
      for (long h = 0; h < 2 * heads; h++, x += K, dx += K) {
        const float* d = h < heads ? a.q + (i * heads + h) * K : a.k + (i * heads + h - heads) * K;
        Vec length{}, along{};
        for (long j = 0; j < K; j += LANES) {
          const Vec part = get(x + j, K - j);
          length += part * part, along += part * get(d + j, K - j);
        }
        const float r = 1 / std::sqrt(add_up(length) + TINY), back = r * r * add_up(along);
        const float outer = h < heads ? r * scale : r;
        for (long j = 0; j < K; j += LANES) put(dx + j, (get(d + j, K - j) - get(x + j, K - j) * back) * outer, K - j);
      }
      memcpy(dx, (const X*)a.dv + i * a.HV * a.V, a.HV * a.V * sizeof(X));
      float* sums = &partial[block * 2 * row];
      for (long h = 0; h < a.HV; h += LANES) {
        const long n = a.HV - h;
        const Vec share = sigmoid(get(b + h, n)), at = get(decay + h, n) + load(&gates.bias[h]);
        const Vec dg = get(a.g + i * a.HV + h, n) * load(&gates.rate[h]), da = dg * sigmoid(at);
        G* dba = (G*)a.dba + i * 2 * a.HV + h;
        put(dba, get(a.beta + i * a.HV + h, n) * most * share * (1.0f - share), n);
        put(dba + a.HV, da, n);
        store(sums + h, load(sums + h) + dg * softplus(at));
        store(sums + row + h, load(sums + row + h) + da);
      }
    });
    std::fill_n(a.dheads, 2 * a.HV, 0.0f);
    for (long block = 0; block < blocks(); block++)
      for (long which = 0; which < 2; which++)
        for (long h = 0; h < a.HV; h++) a.dheads[which * a.HV + h] += partial[(block * 2 + which) * row + h];
  }
};

template <typename F> void by_type(const Call& a, F&& run) {
  if (a.qkv_bf16) return a.ba_bf16 ? run(Inputs<bf16, bf16>(a)) : run(Inputs<bf16, float>(a));
  return a.ba_bf16 ? run(Inputs<float, bf16>(a)) : run(Inputs<float, float>(a));
}

}  // namespace

extern "C" {
void delta_inputs_forward(const Call* a) {
  by_type(*a, [](const auto& inputs) { inputs.forward(); });
}
void delta_inputs_backward(const Call* a) {
  by_type(*a, [](const auto& inputs) { inputs.backward(); });
}
}
