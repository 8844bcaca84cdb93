from seqzoo.kernels.float8_linear.op import float8_linear, has_float8
