from seqzoo.kernels.linear_attention.op import linear_attention
from seqzoo.kernels.linear_attention.step import linear_attention_step_
