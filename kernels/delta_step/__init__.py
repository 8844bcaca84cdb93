from seqzoo.kernels.delta_step.op import delta_step_, delta_step_is_one
