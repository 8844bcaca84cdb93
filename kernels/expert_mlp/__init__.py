from seqzoo.kernels.expert_mlp.op import expert_mlp
