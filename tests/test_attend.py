"""What softmax mixers share: biases where they are asked for, and torch.compile, each call as one graph."""

import json

import pytest
import traced
from cases import MIXERS

from seqzoo.layers.registry import build

TRACED = """
import json, sys
import torch
from seqzoo.layers.registry import build
from seqzoo.layers.span import Span

B, T, D = 2, 23, 16
torch.manual_seed(0)
part = build("mixers", json.loads(sys.argv[1]), D)
for p in part.parameters():
    torch.nn.init.normal_(p, std=0.3)
compiled = torch.compile(part, backend="aot_eager", fullgraph=True)
x, sinks, time = torch.randn(B, T, D), torch.randn(3, D), torch.arange(T).expand(B, -1)
starts = torch.arange(T) == torch.tensor([[5], [9]])
span = Span(time - torch.where(starts, time, 0).cummax(1).values, starts=starts)
near = dict(atol=1e-5, rtol=1e-4)
for given in (None, span, span._replace(sinks=sinks)):
    weights = torch.randn(B, T, D)
    outs = [run(x, given)[0] for run in (compiled, part)]
    torch.testing.assert_close(*outs, **near)
    torch.testing.assert_close(*(torch.autograd.grad((o * weights).sum(), part.k_proj.weight) for o in outs), **near)
with torch.no_grad():
    state, pieces = part.init_state(B, device=x.device, dtype=x.dtype), []
    for a, b in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 20), (20, T)):
        y, state = compiled(x[:, a:b], Span(time[:, a:b], sinks=None if a else sinks), state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), part(x, Span(time, sinks=sinks))[0], **near)
"""


@pytest.mark.parametrize("name", ["attention", "attention-window", "momentum_attention", "momentum_attention-learned"])
def test_compiles(name):
    """In a process without the type checks of tests, which cannot be traced."""
    spec = json.dumps({"kind": name, **MIXERS[name]})
    traced.passes(TRACED, spec)


@pytest.mark.parametrize("kind", ["attention", "momentum_attention"])
@pytest.mark.parametrize("bias, out_bias, out", [(True, None, True), (False, None, False), (True, False, False)])
def test_biases(kind, bias, out_bias, out):
    """out_bias None is as bias."""
    spec = {**MIXERS[kind], "kind": kind, "bias": bias, "out_bias": out_bias, "output_gate": True}
    part = build("mixers", spec, 16)
    inputs = (part.q_proj, part.k_proj, part.v_proj, part.gate_proj)
    assert all((proj.bias is not None) == bias for proj in inputs) and (part.out_proj.bias is not None) == out
