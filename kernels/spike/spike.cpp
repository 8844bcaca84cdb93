// spike on a CPU: what a row's counts stand for. fp32 or bf16.
#include <vector>

#include "spike.h"

using namespace seqzoo;

extern "C" struct Call {  // as in cpp.py
  int64_t rows, width, half;
  double k;
  const void* x;  // [rows, width], contiguous
  void* y;
};

namespace {

constexpr long BLOCK = 1 << 14;  // elements in a task

template <typename T> void forward(const Call& a) {
  const long W = a.width, step = W < BLOCK ? BLOCK / W : 1;
  share_out((a.rows + step - 1) / step, a.rows * W, [&](long block) {
    static thread_local std::vector<float> room;
    room.resize(W);
    float* row = room.data();
    for (long i = block * step; i < a.rows && i < (block + 1) * step; i++) {
      widen(row, (const T*)a.x + i * W, W);
      const float v = threshold(row, W, a.k);
      T* y = (T*)a.y + i * W;
      for (long j = 0; j < W; j += LANES) put(y + j, v * counted(get(row + j, W - j), v), W - j);
    }
  });
}

}  // namespace

extern "C" void spike_forward(const Call* a) { a->half ? forward<bf16>(*a) : forward<float>(*a); }
