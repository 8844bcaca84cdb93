from seqzoo.kernels.ovq_attention.op import OVQRule, OVQState, ovq_attention
