from seqzoo.kernels.linear_cross_entropy.op import IGNORED, linear_cross_entropy
