from seqzoo.kernels.spike.op import spike, spike_counts, spike_linear
