"""What gpu_ops times: an op at a shape, by us and by its peers, with the same inputs.

A case yields (side, function); a side that cannot be had here yields the reason instead. The first side's results are
what the others are held against. `attention` is another function at the same shape: it is timed, not compared.
"""

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import NamedTuple

os.environ.setdefault("FLA_DISABLE_BACKEND_DISPATCH", "1")  # fla's own kernels: FlashQLA is a side of its own

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.benchmarks.shapes import Shape

Side = tuple[str, Callable[..., tuple[Tensor, ...]] | str]
OTHER = "attention"


class Case(NamedTuple):
    """An op at a shape."""

    op: str
    label: str
    shape: Shape
    inputs: dict[str, Tensor]
    sides: list[Side]  # each takes the inputs, in order
    learns: bool = True  # whether a backward pass is timed too


def _draw(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device).to(dtype)


def _peer(name: str, package: str, load: Callable[[], Callable]) -> Side:
    if not find_spec(package):
        return name, f"the package {package} is not installed"
    try:
        return name, load()
    except Exception as error:  # whatever a peer needs that is not here
        return name, f"{type(error).__name__}: {error}"


def attention(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor]:
    """Full causal attention with as many heads as v has."""
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    return (F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2),)


def gated_delta_rule(shapes: dict[str, Shape], device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    from seqzoo.kernels.gated_delta_rule.op import BACKENDS

    def fla() -> Callable:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        return lambda *x: chunk_gated_delta_rule(*x, scale=1.0, output_final_state=True)

    def qla() -> Callable:
        from flash_qla import chunk_gated_delta_rule

        return lambda *x: chunk_gated_delta_rule(*x, scale=1.0, output_final_state=True)

    for label, s in shapes.items():
        draw = _draw(device, dtype)
        q, k = (F.normalize(draw(s.B, s.T, s.H, s.K).float(), dim=-1).to(dtype) for _ in range(2))
        g, beta = F.logsigmoid(draw(s.B, s.T, s.HV).float()), draw(s.B, s.T, s.HV).float().sigmoid()
        inputs = dict(q=q * s.K**-0.5, k=k, v=draw(s.B, s.T, s.HV, s.V), g=g, beta=beta)
        sides = [
            ("seqzoo", lambda *x: BACKENDS["triton"](*x, None)),
            _peer("fla", "fla", fla),
            _peer("FlashQLA", "flash_qla", qla),
            (OTHER, attention),
        ]
        yield Case("gated_delta_rule", label, s, inputs, sides)


def linear_attention(shapes: dict[str, Shape], device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """HV query heads on H memories; a decay per head, then one per channel."""
    from seqzoo.kernels.linear_attention.op import BACKENDS

    def fla(channels: bool) -> Callable:
        if channels:
            from fla.ops.gla import chunk_gla as run
        else:
            from fla.ops.simple_gla import chunk_simple_gla as run

        def call(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
            k, v, g = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v, g))  # it knows no groups
            o, state = run(q, k, v, g, scale=1.0, output_final_state=True)
            return o, state

        return call

    for label, s in shapes.items():
        for channels in (False, True):
            draw = _draw(device, dtype)
            g = F.logsigmoid(draw(s.B, s.T, s.H, s.K).float() + 2)
            inputs = dict(
                q=draw(s.B, s.T, s.HV, s.K) * s.K**-0.5, k=draw(s.B, s.T, s.H, s.K), v=draw(s.B, s.T, s.H, s.V),
                g=g if channels else g.mean(-1),
            )  # fmt: skip
            ours = lambda *x: BACKENDS["triton"](*x, None)
            sides = [("seqzoo", ours), _peer("fla", "fla", lambda channels=channels: fla(channels))]
            kind = "decay per channel" if channels else "decay per head"
            yield Case("linear_attention", f"{label}, {kind}", s, inputs, sides)


def kimi_delta_rule(shapes: dict[str, Shape], device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """HV heads of keys and of values."""
    from seqzoo.kernels.kimi_delta_rule.op import BACKENDS

    def fla() -> Callable:
        from fla.ops.kda import chunk_kda

        return lambda *x: chunk_kda(*x, scale=1.0, output_final_state=True)

    for label, s in shapes.items():
        draw = _draw(device, dtype)
        q, k = (F.normalize(draw(s.B, s.T, s.HV, s.K).float(), dim=-1).to(dtype) for _ in range(2))
        g, beta = F.logsigmoid(draw(s.B, s.T, s.HV, s.K).float() + 2), draw(s.B, s.T, s.HV).float().sigmoid()
        inputs = dict(q=q * s.K**-0.5, k=k, v=draw(s.B, s.T, s.HV, s.V), g=g, beta=beta)
        sides = [("seqzoo", lambda *x: BACKENDS["triton"](*x, None)), _peer("fla", "fla", fla)]
        yield Case("kimi_delta_rule", label, s, inputs, sides)


def momentum_delta_rule(shapes: dict[str, Shape], device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """fla's is torch code and wrong where momentum fades fast; a slow fade is drawn, where both agree."""
    from seqzoo.kernels.momentum_delta_rule.op import BACKENDS

    def fla() -> Callable:
        from fla.ops.momentum_delta_rule import chunk_momentum_delta_rule as run

        def call(q, k, v, p, log_alpha, log_mu, beta, eta):
            q, k, p = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k, p))
            return run(q, k, v, log_alpha, log_mu, p, beta, eta, scale=1.0)[:1]

        return call

    for label, s in shapes.items():
        draw = _draw(device, dtype)
        q, k, p = (F.normalize(draw(s.B, s.T, s.H, s.K).float(), dim=-1).to(dtype) for _ in range(3))
        gates = [draw(s.B, s.T, s.HV).float().sigmoid() for _ in range(4)]
        inputs = dict(
            q=q * s.K**-0.5, k=k, v=draw(s.B, s.T, s.HV, s.V), p=p, log_alpha=-0.1 * gates[0], log_mu=-0.1 * gates[1],
            beta=gates[2], eta=gates[3],
        )  # fmt: skip
        sides = [("seqzoo", lambda *x: BACKENDS["triton"](*x, None)), _peer("fla (torch code)", "fla", fla)]
        yield Case("momentum_delta_rule", label, s, inputs, sides)


def strict_linear_attention(shapes: dict[str, Shape], device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """BDH's memory: K neurons a head; beside it torch's own batched products over all pairs of tokens."""
    from seqzoo.kernels.strict_linear_attention.op import BACKENDS

    def pairs(r: Tensor, v: Tensor) -> tuple[Tensor]:
        r, v = r.transpose(1, 2), v.transpose(1, 2)
        return (((r @ r.mT).tril(-1) @ v).transpose(1, 2),)

    for label, s in shapes.items():
        draw = _draw(device, dtype)
        inputs = dict(r=F.relu(draw(s.B, s.T, s.H, s.K)) * s.K**-0.5, v=draw(s.B, s.T, 1, s.V))
        sides = [("seqzoo", lambda r, v: BACKENDS["triton"](r, v, None, None, None)), ("all pairs in torch", pairs)]
        yield Case("strict_linear_attention", label, s, inputs, sides)


CASES = (gated_delta_rule, kimi_delta_rule, linear_attention, momentum_delta_rule, strict_linear_attention)
SHAPES = {
    "gated_delta_rule": {
        "1x32768, 16/32 heads": Shape(1, 32768, 16, 32), "1x8192, 16/32 heads": Shape(1, 8192, 16, 32),
        "4x8192, 16/32 heads": Shape(4, 8192, 16, 32), "1x32768, 4/8 heads": Shape(1, 32768, 4, 8),
        "1x32768, 2/8 heads": Shape(1, 32768, 2, 8), "8x2048, 8/8 heads of 64": Shape(8, 2048, 8, 8, 64, 64),
        "2x4096, 4/4 heads of 256": Shape(2, 4096, 4, 4, 256, 256),
    },
    "kimi_delta_rule": {
        "1x32768, 32 heads": Shape(1, 32768, 32, 32), "1x8192, 32 heads": Shape(1, 8192, 32, 32),
        "4x8192, 32 heads": Shape(4, 8192, 32, 32),
    },
    "linear_attention": {
        "1x32768, 32 heads": Shape(1, 32768, 32, 32), "1x8192, 28 heads on 4 memories": Shape(1, 8192, 4, 28),
    },
    "momentum_delta_rule": {"1x8192, 16/16 heads": Shape(1, 8192, 16, 16)},
    "strict_linear_attention": {"2x2048, 4 heads of 8192": Shape(2, 2048, 4, 4, 8192, 256)},
}  # fmt: skip
SMALL = {name: {"1x70, 1/2 heads": Shape(1, 70, 1, 2, 32, 32, 4)} for name in SHAPES}  # for the interpreter


def cases(names: list[str], device: torch.device) -> Iterator[Case]:
    """Those of the named ops; on a CPU small ones in fp32, for Triton's interpreter."""
    shapes, dtype = (SHAPES, torch.bfloat16) if device.type == "cuda" else (SMALL, torch.float32)
    for make in CASES:
        if make.__name__ in names:
            yield from make(shapes[make.__name__], device, dtype)
