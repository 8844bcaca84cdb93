from seqzoo.kernels.kimi_delta_rule.op import kimi_delta_rule
from seqzoo.kernels.kimi_delta_rule.step import kimi_delta_rule_step_
