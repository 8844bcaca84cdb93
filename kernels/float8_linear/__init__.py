from seqzoo.kernels.float8_linear.op import UNIT, float8_linear, has_float8
