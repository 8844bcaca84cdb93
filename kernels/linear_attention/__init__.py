from seqzoo.kernels.linear_attention.op import linear_attention
