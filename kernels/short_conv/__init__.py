from seqzoo.kernels.short_conv.op import short_conv
