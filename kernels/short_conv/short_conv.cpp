// short_conv on a CPU: y_t = silu(s_t), s_t = sum_i weight_{W-1-i} x_{t-i} over the taps i that stay inside the document. fp32 or
// bf16, computed in fp32.
//
// A task is some channels of a block of tokens, so that the rows, weights and sums it works with stay in the nearest cache. Backward
// computes s again and goes through time once: what token t owes to x_{t-i} is collected in a ring of W rows, of which the oldest is
// done after each token. It starts each block with an empty ring and runs W-1 tokens past its end. The weight's gradient is summed
// inside a block, then over blocks in order, so it does not depend on the number of threads.
#include <algorithm>
#include <vector>

#include "rows.h"

using namespace seqzoo;

extern "C" struct Call {  // as in cpp.py
  int64_t B, T, C, W, x_bf16, weight_bf16;
  int64_t x_batch, x_time, past_batch, past_time;  // elements between batches, tokens
  const void *x, *past, *weight;
  const uint8_t* starts;  // [B, T] or null
  void *y, *next;         // [B, T, C], [B, W-1, C]
  const void *dy, *dnext;
  void *dx, *dpast;  // dpast may be null
  float* dweight;    // [C, W]
};

namespace {

constexpr long TOKENS = 256, CHANNELS = 256;  // of a task

// N pointers in registers: a compiler that sees what they point to written to has to fetch them again. None for N = 0.
template <typename P, int N> struct Pointers {
  P at[N];
  explicit Pointers(const P* from) { std::copy_n(from, N, at); }
  P operator[](long i) const { return at[i]; }
};
template <typename P> struct Pointers<P, 0> {
  const P* at;
  explicit Pointers(const P* from) : at(from) {}
  P operator[](long i) const { return at[i]; }
};

// FIXED is W, or 0 for any other.
template <typename T, int FIXED> struct Conv {
  const Call& a;
  const long W;

  explicit Conv(const Call& call) : a(call), W(FIXED ? FIXED : call.W) {}

  const T* input(long b, long t) const {  // null before the past
    if (t >= 0) return (const T*)a.x + b * a.x_batch + t * a.x_time;
    return a.past ? (const T*)a.past + b * a.past_batch + (W - 1 + t) * a.past_time : nullptr;
  }
  long reach(long b, long t) const {  // taps that token t has, itself included
    const long all = a.past ? W : std::min(W, t + 1);
    if (a.starts)
      for (long i = 0; i < all && i <= t; i++)
        if (a.starts[b * a.T + t - i]) return i + 1;
    return all;
  }
  long last_start(long b) const {  // before which the next past holds nothing
    long t = a.T - 1;
    if (a.starts)
      for (; t >= 0; t--)
        if (a.starts[b * a.T + t]) return t;
    return -W;
  }
  void weights(float* to, long c0, long n) const {  // [W, CHANNELS]
    const char* from = (const char*)a.weight + c0 * W * (a.weight_bf16 ? sizeof(bf16) : sizeof(float));
    for (long c = 0; c < n; c++)
      for (long w = 0; w < W; w++) {
        if (a.weight_bf16) load_row(to + w * CHANNELS + c, (const bf16*)from + c * W + w, 1);
        else to[w * CHANNELS + c] = ((const float*)from)[c * W + w];
      }
  }
  long blocks() const { return (a.T + TOKENS - 1) / TOKENS; }
  long strips() const { return (a.C + CHANNELS - 1) / CHANNELS; }

  template <typename F> void tasks(F&& run) const {  // run(batch, block, its first token and end, first channel and how many)
    share_out(a.B * blocks() * strips(), a.B * a.T * a.C, [&](long task) {
      const long c0 = task % strips() * CHANNELS, block = task / strips() % blocks(), b = task / strips() / blocks();
      run(b, block, block * TOKENS, std::min<long>(a.T, (block + 1) * TOKENS), c0, std::min<long>(CHANNELS, a.C - c0));
    });
  }

  template <bool WHOLE> void sum(const float* w, const T* const* taken, long taps, T* y, long n) const {
    const Pointers<const T*, WHOLE ? FIXED : 0> rows(taken);
    if (WHOLE) taps = W;
    for (long c = 0; c < n; c += LANES) {
      Vec s{};
      for (long i = 0; i < taps; i++) s += get(w + (W - 1 - i) * CHANNELS + c, n - c) * get(rows[i] + c, n - c);
      put(y + c, s * sigmoid(s), n - c);
    }
  }

  void forward() const {
    tasks([&](long b, long, long t0, long t1, long c0, long n) {
      static thread_local std::vector<float> room;
      static thread_local std::vector<const T*> rows;
      room.resize(W * CHANNELS), rows.resize(W);
      float* w = room.data();
      weights(w, c0, n);
      for (long t = t0; t < t1; t++) {
        const long taps = reach(b, t);
        for (long i = 0; i < taps; i++) rows[i] = input(b, t - i) + c0;
        T* y = (T*)a.y + (b * a.T + t) * a.C + c0;
        if (taps == W) sum<true>(w, rows.data(), taps, y, n);
        else sum<false>(w, rows.data(), taps, y, n);
      }
    });
    for (long b = 0; b < a.B; b++)
      for (long j = 0, last = last_start(b); j < W - 1; j++) {
        const long t = a.T - (W - 1) + j;
        T* to = (T*)a.next + (b * (W - 1) + j) * a.C;
        const T* from = t >= last ? input(b, t) : nullptr;
        if (from) memcpy(to, from, a.C * sizeof(T));
        else memset(to, 0, a.C * sizeof(T));
      }
  }

  // One token: its share of the weights' gradient (where it is in the block) and of the ring.
  template <bool WHOLE> void spread(const float* w, float* dw, float* const* slots, const T* const* taken, long taps, const T* dy, long n) const {
    const Pointers<const T*, WHOLE ? FIXED : 0> rows(taken);
    const Pointers<float*, WHOLE ? FIXED : 0> ring(slots);
    if (WHOLE) taps = W;
    for (long c = 0; c < n; c += LANES) {
      const long left = n - c;
      Vec s{};
      for (long i = 0; i < taps; i++) s += get(w + (W - 1 - i) * CHANNELS + c, left) * get(rows[i] + c, left);
      const Vec half = sigmoid(s), ds = get(dy + c, left) * half * (1.0f + s * (1.0f - half));
      for (long i = 0; i < taps; i++) {
        const long at = (W - 1 - i) * CHANNELS + c;
        store(ring[i] + c, load(ring[i] + c) + ds * load(w + at));
        if (dw) store(dw + at, load(dw + at) + ds * get(rows[i] + c, left));
      }
    }
  }

  void emit(long b, long t, long c0, long n, float* row, long last) const {  // the gradient of x_t, or of the past's row
    T* to = t >= 0 ? (T*)a.dx + (b * a.T + t) * a.C : a.dpast ? (T*)a.dpast + (b * (W - 1) + W - 1 + t) * a.C : nullptr;
    const long j = t - a.T + W - 1;  // its place in the next past
    const T* from_next = j >= 0 && t >= last ? (const T*)a.dnext + (b * (W - 1) + j) * a.C + c0 : nullptr;
    for (long c = 0; c < n; c += LANES) {
      Vec d = load(row + c);
      if (from_next) d += get(from_next + c, n - c);
      if (to) put(to + c0 + c, d, n - c);
      store(row + c, Vec{});
    }
  }

  void backward() const {
    std::vector<float> partial(a.B * blocks() * W * a.C);
    std::vector<long> last(a.B);
    for (long b = 0; b < a.B; b++) last[b] = last_start(b);
    tasks([&](long b, long block, long t0, long t1, long c0, long n) {
      static thread_local std::vector<float> room;
      static thread_local std::vector<const T*> rows;
      static thread_local std::vector<float*> ring;
      room.assign(3 * W * CHANNELS, 0), rows.resize(W), ring.resize(W);
      float *w = room.data(), *dw = w + W * CHANNELS, *slots = dw + W * CHANNELS;
      weights(w, c0, n);
      const long from = block ? t0 : -(W - 1);  // the first row this task owes
      for (long t = t0; t < t1 + W - 1; t++) {
        if (t < a.T) {
          const long taps = reach(b, t);
          for (long i = 0; i < taps; i++) rows[i] = input(b, t - i) + c0, ring[i] = slots + (t - i + W) % W * CHANNELS;
          const T* dy = (const T*)a.dy + (b * a.T + t) * a.C + c0;
          float* here = t < t1 ? dw : nullptr;
          if (taps == W) spread<true>(w, here, ring.data(), rows.data(), taps, dy, n);
          else spread<false>(w, here, ring.data(), rows.data(), taps, dy, n);
        }
        const long done = t - (W - 1);
        float* row = slots + (done + W) % W * CHANNELS;
        if (done >= from) emit(b, done, c0, n, row, last[b]);
        else std::fill_n(row, n, 0.0f);
      }
      for (long i = 0; i < W; i++) std::copy_n(dw + i * CHANNELS, n, &partial[((b * blocks() + block) * W + i) * a.C + c0]);
    });
    std::fill_n(a.dweight, a.C * W, 0.0f);
    for (long part = 0; part < a.B * blocks(); part++)
      for (long i = 0; i < W; i++)
        for (long c = 0; c < a.C; c++) a.dweight[c * W + i] += partial[(part * W + i) * a.C + c];
  }
};

template <typename F> void by_type(const Call& a, F&& run) {
  if (a.x_bf16) return a.W == 4 ? run(Conv<bf16, 4>(a)) : run(Conv<bf16, 0>(a));
  return a.W == 4 ? run(Conv<float, 4>(a)) : run(Conv<float, 0>(a));
}

}  // namespace

extern "C" {
void short_conv_forward(const Call* a) {
  by_type(*a, [](const auto& conv) { conv.forward(); });
}
void short_conv_backward(const Call* a) {
  by_type(*a, [](const auto& conv) { conv.backward(); });
}
}
