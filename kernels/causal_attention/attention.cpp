// Causal attention on a CPU: tiles with an online softmax, forward and backward.
//
// A column is one query of one head; the R = H / G heads that share a key head stand side by side, c = t R + r, so a panel of
// columns uses each key R times. Scores stand transposed, keys down and columns across: maxima and sums of the softmax run down,
// lane by lane, and keys and values are read as they lie in memory.
//
//     forward   S' = K Q'   P' = 2^(c S' - top)   O' += V' P'                            c = log2 e / sqrt K
//     backward  S' and P' again, dP' = V dO'   dS' = P' (dP' - delta)   dV += P' dO   dK += dS' Q   dQ' += K' dS'
//
// Source: Dao et al. 2022, arXiv 2205.14135, algorithms 1 and 4. A column's result depends on neither its batch nor the number of
// threads; sums over columns (dK, dV) depend on the number of threads only through how many partial sums there are.
#include "backward.h"
#include "forward.h"

using namespace seqzoo;

extern "C" {
int64_t causal_attention_room_f32(const Call* a) { return forward_room<float>(*a); }
int64_t causal_attention_room_bf16(const Call* a) { return forward_room<bf16>(*a); }
void causal_attention_f32(const Call* a) { forward<float>(*a); }
void causal_attention_bf16(const Call* a) { forward<bf16>(*a); }
int64_t causal_attention_backward_room_f32(const Call* a) { return backward_room<float>(*a); }
int64_t causal_attention_backward_room_bf16(const Call* a) { return backward_room<bf16>(*a); }
void causal_attention_backward_f32(const Call* a) { backward<float>(*a); }
void causal_attention_backward_bf16(const Call* a) { backward<bf16>(*a); }
}
