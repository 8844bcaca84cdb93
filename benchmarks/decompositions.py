"""What kernels an op is made of, and what each must move and multiply: ours, peers', and the least possible.

A row is a file of `kernel_models/`, whose MODELS say what an op does in each direction. A pass is one kernel (or
several that touch the same). Its bytes count each address once for reading and once for writing: a cache without end.
tests/test_roofline.py holds each of ours against the loads, stores and products that the interpreter counts.
"""

from seqzoo.benchmarks.kernel_models import (
    delta_inputs,
    delta_step,
    expert_mlp,
    gated_delta_rule,
    kimi_delta_rule,
    linear_attention,
    momentum_delta_rule,
    ovq_attention,
    rms_norm,
    short_conv,
    spike,
    strict_linear_attention,
)
from seqzoo.benchmarks.shapes import Model

OPS = (
    gated_delta_rule,
    kimi_delta_rule,
    linear_attention,
    momentum_delta_rule,
    strict_linear_attention,
    ovq_attention,
    short_conv,
    delta_inputs,
    rms_norm,
    delta_step,
    spike,
    expert_mlp,
)
MODELS: dict[tuple[str, str], Model] = {(model.op, model.direction): model for file in OPS for model in file.MODELS}
