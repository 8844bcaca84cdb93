"""expert_mlp: the public op. Everything above this folder calls this and nothing else in it."""

from jaxtyping import Float, Int64
from torch import Tensor

from seqzoo.kernels.dispatch import choose, readable
from seqzoo.kernels.expert_mlp import gpu, native
from seqzoo.kernels.expert_mlp.exchange import are_elsewhere, expert_mlp_exchanged
from seqzoo.kernels.expert_mlp.grouped import expert_mlp_grouped
from seqzoo.kernels.expert_mlp.reference import Hidden, expert_mlp_reference

BACKENDS = {
    "reference": expert_mlp_reference,
    "torch": expert_mlp_grouped,
    "cpp": native.expert_mlp_native,  # float32 and bfloat16 on a CPU
    "triton": gpu.expert_mlp_triton,
}


def expert_mlp(
    x: Float[Tensor, "N D"],
    chosen: Int64[Tensor, "N k"],
    weight: Float[Tensor, "N k"],
    gate_up: Float[Tensor, "E I2 D"],
    down: Float[Tensor, "E D I"],
    hidden: Hidden | None = None,
) -> Float[Tensor, "N D"]:
    """Send every token through the gated MLPs it chose and add up what they say. Definition: `reference.py`.

    Args:
        x: tokens.
        chosen: which expert, 0 to E-1, each of a token's k slots goes to; a repeated one counts twice.
        weight: of each slot's output, in any floating dtype.
        gate_up: each expert's gate matrix (rows 0 to I-1) and up matrix (rows I to 2I-1), in x's dtype.
        down: each expert's output matrix, in x's dtype. Where both are cut over processes, between experts, tokens
            go there and come back (`exchange.py`).
        hidden: applied row by row to what stands between the matrices, [rows, I], as a quantiser; backends reference
            and torch.

    Returns:
        The weighted sums, in x's dtype. Gradients flow to all but `chosen`. Two runs on a CPU give the same bits.

    Raises:
        ValueError: shapes or dtypes that do not agree, an expert that does not exist (checked where that needs no
            waiting for a device), or a forced backend that cannot run this.
    """
    (N, D), (E, I) = x.shape, (gate_up.shape[0], down.shape[-1])
    expected = dict(chosen=(N, weight.shape[-1]), weight=(N, chosen.shape[-1]), gate_up=(E, 2 * I, D), down=(E, D, I))
    for (name, shape), given in zip(expected.items(), (chosen, weight, gate_up, down), strict=True):
        if given.shape != shape:
            raise ValueError(f"expert_mlp: {name}: expected shape {shape}, got {tuple(given.shape)}")
    for name, given in dict(gate_up=gate_up, down=down).items():
        if given.dtype != x.dtype:
            raise ValueError(f"expert_mlp: {name}: expected x's dtype {x.dtype}, got {given.dtype}")
    if are_elsewhere(gate_up):
        return expert_mlp_exchanged(expert_mlp, x, chosen, weight, gate_up, down, hidden)
    runs = dict(cpp=lambda: native.runs(x), triton=lambda: gpu.runs(x, chosen))
    able = lambda name: hidden is None and runs[name]()
    name = choose(BACKENDS, tokens=chosen.numel(), device=x.device, able=able)
    if name in runs and hidden is not None:
        raise ValueError(f"expert_mlp: backend {name}: expected no `hidden`, got one")
    if name != "cpp" and readable(x) and chosen.numel() and not 0 <= chosen.min() <= chosen.max() < E:
        raise ValueError(f"expert_mlp: chosen: expected 0 to {E - 1}, got {chosen.min()} to {chosen.max()}")
    others = () if hidden is None else (hidden,)
    return BACKENDS[name](x, chosen, weight, gate_up, down, *others)
