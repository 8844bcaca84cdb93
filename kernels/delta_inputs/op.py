"""delta_inputs: the public op. Everything above this folder calls this and nothing else in it."""

import torch
from jaxtyping import Float
from torch import Tensor

from seqzoo.kernels.delta_inputs.composed import delta_inputs_composed
from seqzoo.kernels.delta_inputs.cpp import NATIVE, delta_inputs_cpp
from seqzoo.kernels.delta_inputs.gpu import MOST, delta_inputs_triton
from seqzoo.kernels.delta_inputs.reference import DeltaInputs, delta_inputs_reference
from seqzoo.kernels.dispatch import choose
from seqzoo.kernels.gpu import usable

BACKENDS = {
    "reference": delta_inputs_reference,
    "torch": delta_inputs_composed,
    "cpp": delta_inputs_cpp,  # float32 and bfloat16 on a CPU
    "triton": delta_inputs_triton,  # float32, bfloat16 and float16 on a GPU, keys up to 512 wide
}
KINDS = (torch.float32, torch.bfloat16, torch.float16)  # that Triton has


def delta_inputs(
    qkv: Float[Tensor, "B T C"],
    ba: Float[Tensor, "B T HV2"],
    a_log: Float[Tensor, " HV"],
    dt_bias: Float[Tensor, " HV"],
    *,
    num_key_heads: int,
    key_width: int,
    beta_scale: float = 1.0,
) -> DeltaInputs:
    """Queries, keys, values, log decays and step sizes for `gated_delta_rule`. Definition: `reference.py`.

    Args:
        qkv: queries, keys and values side by side, C = 2 H K + HV V, as they come from the convolution.
        ba: before their nonlinearities, the step sizes and then the decays of the HV value heads.
        a_log: natural log of each head's rate of decay [nats per token].
        dt_bias: added to the decay before its softplus.
        num_key_heads, key_width: H and K.
        beta_scale: the largest step size, 1 or 2.

    Returns:
        q, k, g and beta in fp32 (fp64 where qkv is), and v, a view into qkv that is not to be written to.

    Raises:
        ValueError: sizes that do not fit together, or a forced backend that cannot run this.
    """
    (HV,), values = a_log.shape, qkv.shape[-1] - 2 * num_key_heads * key_width
    if num_key_heads < 1 or key_width < 1:
        raise ValueError(
            f"delta_inputs: num_key_heads and key_width: expected >= 1, got {num_key_heads} and {key_width}"
        )
    if beta_scale not in (1, 2):
        raise ValueError(f"delta_inputs: beta_scale: expected 1 or 2, got {beta_scale!r}")
    if values <= 0 or not HV or values % HV:
        raise ValueError(
            f"delta_inputs: qkv: expected 2 * {num_key_heads} * {key_width} channels and a multiple of {HV} heads' for "
            f"values, got {qkv.shape[-1]}"
        )
    if ba.shape != (*qkv.shape[:2], 2 * HV):
        raise ValueError(f"delta_inputs: ba: expected shape {(*qkv.shape[:2], 2 * HV)}, got {tuple(ba.shape)}")
    if dt_bias.shape != a_log.shape:
        raise ValueError(f"delta_inputs: dt_bias: expected shape {(HV,)}, got {tuple(dt_bias.shape)}")
    able = lambda name: (
        usable() and qkv.dtype in KINDS and key_width <= MOST if name == "triton" else NATIVE.usable(qkv)
    )
    name = choose(BACKENDS, tokens=qkv.shape[1], device=qkv.device, able=able)
    return BACKENDS[name](qkv, ba, a_log, dt_bias, num_key_heads, key_width, beta_scale)
