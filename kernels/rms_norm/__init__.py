from seqzoo.kernels.rms_norm.op import gated_rms_norm, rms_norm
