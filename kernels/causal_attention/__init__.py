from seqzoo.kernels.causal_attention.op import causal_attention
