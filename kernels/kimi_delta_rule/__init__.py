from seqzoo.kernels.kimi_delta_rule.op import kimi_delta_rule
