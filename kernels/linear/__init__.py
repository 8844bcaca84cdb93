from seqzoo.kernels.linear.op import linear
