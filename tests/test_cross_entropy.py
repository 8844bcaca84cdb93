"""The laws of linear_cross_entropy: every backend is torch's, and nothing as large as all logits is ever there."""

from inspect import unwrap

import pytest
import torch
import torch.nn.functional as F
import traced
from hydra import compose, initialize_config_module
from runs import HYBRID, TRANSFORMER
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.linear_cross_entropy import chunked, linear_cross_entropy
from seqzoo.kernels.linear_cross_entropy.op import BACKENDS
from seqzoo.layers.linear import Linear
from seqzoo.models import SeqZooForCausalLM
from seqzoo.models.losses import IGNORED, cross_entropy
from seqzoo.train import model_config
from seqzoo.training.objectives import NextToken

BF16 = torch.bfloat16
CHUNKS = [1, 4, 5, 23, 1000]  # rows: alone, with a rest, all at once


def draw(N=23, V=37, D=11, dtype=torch.float64):
    hidden, weight = torch.randn(N, D, dtype=dtype) * 2, torch.randn(V, D, dtype=dtype)
    labels = torch.randint(V, (N,))
    labels[::5] = IGNORED
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def both(loss, hidden, weight, labels, scale=0.3):
    nats = loss(hidden, weight, labels)
    return nats.detach(), *torch.autograd.grad(nats * scale, (hidden, weight))


def torchs(hidden, weight, labels):
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")


def in_chunks(monkeypatch, rows, vocabulary=37):
    monkeypatch.setattr(chunked, "LOGITS", rows * vocabulary)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", CHUNKS)
def test_is_torchs_cross_entropy(backend, rows, monkeypatch):
    in_chunks(monkeypatch, rows)
    inputs = draw()
    with use_backend(backend):
        assert_close(both(linear_cross_entropy, *inputs), both(torchs, *inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", CHUNKS)
@pytest.mark.parametrize("dtype, autocast", [(torch.float32, False), (torch.float32, True), (BF16, False)])
def test_errors_are_no_larger_than_torchs(dtype, autocast, rows, monkeypatch):
    """In fp32 within 1e-6 of the exact values; where logits are rounded to bf16, as torch's, whose logits are too."""
    in_chunks(monkeypatch, rows)
    inputs = draw(dtype=dtype)
    with torch.autocast("cpu", BF16, enabled=autocast):
        ours, theirs = both(linear_cross_entropy, *inputs), both(torchs, *inputs)
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype]
    exact = both(torchs, *(x.detach().double().requires_grad_() for x in inputs[:2]), inputs[2])
    for got, torch_got, wanted in zip(ours, theirs, exact, strict=True):
        error, torch_error = ((x - wanted).abs().max() / wanted.abs().max() for x in (got, torch_got))
        assert error <= 1e-6 + (1.2 * torch_error if autocast or dtype == BF16 else 0)


def test_many_chunks_are_summed_in_fp32(monkeypatch):
    in_chunks(monkeypatch, 1)
    hidden, weight, labels = draw(N=800, D=3, dtype=BF16)
    with torch.no_grad():
        hidden.abs_()
    found = both(linear_cross_entropy, hidden, weight, labels.fill_(5))[2]
    wanted = both(torchs, hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), labels)[
        2
    ]
    assert (found - wanted).abs().max() <= 5e-3 * wanted.abs().max()  # in bf16 the sum stands still half way


def test_large_logits_and_ignored_rows_stay_finite(monkeypatch):
    in_chunks(monkeypatch, 4)
    hidden, weight, labels = draw(dtype=torch.float32)
    with torch.no_grad():
        hidden *= 1e4
    labels[4:9] = IGNORED  # a chunk of none
    nats, d_hidden, d_weight = both(linear_cross_entropy, hidden, weight, labels)
    assert all(x.isfinite().all() for x in (nats, d_hidden, d_weight)) and not d_hidden[4:9].any()
    none = torch.full_like(labels, IGNORED)
    assert not any(x.any() for x in both(linear_cross_entropy, hidden, weight, none))
    assert linear_cross_entropy(hidden[:0], weight, labels[:0]) == 0


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation made, and how many products of matrices there were."""

    def __init__(self):
        super().__init__()
        self.elements = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        self.elements = max(self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)), 0)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_logits_are_never_there(dtype, monkeypatch):
    N, V, D = 400, 50, 8
    in_chunks(monkeypatch, 20, V)
    inputs = draw(N, V, D, dtype)
    largest = {}
    for name, loss in (("ours", linear_cross_entropy), ("torch", torchs)):
        with Largest() as seen:
            both(loss, *inputs)
        largest[name] = seen.elements
    assert largest == {"ours": N * D, "torch": N * V}  # the gradient of hidden; a chunk and the weight are smaller


@pytest.mark.parametrize("learns, products", [((), 1), (("hidden",), 2), (("weight",), 2), (("hidden", "weight"), 3)])
def test_no_gradient_no_work(learns, products, monkeypatch):
    in_chunks(monkeypatch, 23)
    hidden, weight, labels = draw()
    hidden.requires_grad_("hidden" in learns), weight.requires_grad_("weight" in learns)
    with Largest() as seen:
        nats = linear_cross_entropy(hidden, weight, labels)
    assert seen.products == products and nats.requires_grad == bool(learns)
    with Largest() as seen, torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).requires_grad
    assert seen.products == 1


def test_refusals():
    hidden, weight, labels = draw(dtype=torch.float32)
    for error, inputs in (
        (r"hidden \[N, D\] and weight \[V, D\], got \[1, 23, 11\]", (hidden[None], weight, labels)),
        (r"weight: expected shape \(37, 11\), got \(37, 10\)", (hidden, weight[:, :10], labels)),
        (r"labels: expected shape \(23,\), got \(22,\)", (hidden, weight, labels[1:])),
        ("labels: expected torch.int64, got torch.int32", (hidden, weight, labels.int())),
        ("weight: expected hidden's dtype torch.float32, got torch.float64", (hidden, weight.double(), labels)),
        ("labels: expected 0 to 36 or -100, got 37", (hidden, weight, labels.where(labels != labels[1], 37))),
        ("labels: expected 0 to 36 or -100, got -1", (hidden, weight, labels.where(labels != labels[1], -1))),
    ):
        with pytest.raises(ValueError, match=error):
            unwrap(linear_cross_entropy)(*inputs)
    nats = linear_cross_entropy(hidden, weight, labels)
    nats.backward(retain_graph=True)
    with pytest.raises(ValueError, match="expected one backward pass, got a second"):
        nats.backward()


COMPILED = """
import torch, traced
from seqzoo.kernels.linear_cross_entropy import chunked, linear_cross_entropy
chunked.LOGITS = 5 * 13
labels = torch.randint(13, (12,))
labels[::3] = -100
leaves = [torch.randn(n, 4, requires_grad=True) for n in (12, 13)]
traced.agrees(lambda hidden, weight: linear_cross_entropy(hidden, weight, labels) / 7, leaves)
"""


def test_compiles():
    traced.passes(COMPILED)


# The model's loss without logits

HEADS = {  # what a head may be; those that are more than a matrix are called
    "plain": lambda head: head,
    "torch's": lambda head: _like(nn.Linear(*head.weight.shape[::-1], bias=False), head),
    "bias": lambda head: _like(Linear(*head.weight.shape[::-1]), head),
    "scaled": lambda head: nn.Sequential(head, nn.Softshrink(0.01)),
    "hook": lambda head: head.register_forward_hook(lambda module, given, gave: gave * 2) and head,
}


def _like(new, head):
    new.weight = head.weight
    return new


@pytest.mark.parametrize("head", HEADS)
def test_any_head(head):
    made = HEADS[head](Linear(6, 19, bias=False))
    hidden, targets = torch.randn(2, 9, 6), torch.randint(19, (2, 9))
    targets[0, 3:5] = IGNORED
    wanted = F.cross_entropy(made(hidden).flatten(0, 1), targets.flatten(), reduction="sum")
    assert_close(cross_entropy(made, hidden, targets), wanted)


def made(options, *more):
    with initialize_config_module("seqzoo.configs", version_base=None):
        return SeqZooForCausalLM(model_config(compose("train", overrides=[*options, *more])))


MODELS = {
    "attention": (TRANSFORMER, []),
    "experts": (HYBRID, []),
    "tied": (TRANSFORMER, ["+model.tie_word_embeddings=true"]),
    "spikes": (TRANSFORMER, ["+model.spikes={head: true}"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_models_loss_is_the_same_without_logits(name):
    options, more = MODELS[name]
    model = made(options, *more).train()
    ids = torch.randint(100, (2, 13))
    labels = ids.clone()
    labels[1, 4:7] = IGNORED
    shifted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].contiguous()
    for given in (dict(labels=labels), dict(shift_labels=shifted, num_items_in_batch=37)):
        found = []
        for return_logits in (True, False):
            out = model(ids, **given, return_logits=return_logits)
            grads = torch.autograd.grad(out.loss, [p for p in model.parameters() if p.requires_grad])
            found.append((out.loss.detach(), grads))
            assert (out.logits is not None) == return_logits
        assert_close(*found, rtol=1e-5, atol=1e-6)


def test_a_loss_of_ones_own_gets_its_logits():
    model = made(TRANSFORMER)
    model.loss_function = lambda logits, **_: logits.square().mean()
    ids = torch.randint(100, (1, 5))
    out = model(ids, labels=ids, return_logits=False)
    assert out.logits is None and out.loss == model(ids).logits.square().mean()


def test_training_asks_for_no_logits(monkeypatch):
    in_chunks(monkeypatch, 8, 4096)
    model = made(TRANSFORMER, "model.vocab_size=4096").train()
    ids = torch.randint(4096, (2, 64))
    inputs = dict(input_ids=ids, shift_labels=ids.roll(-1, 1), position_ids=torch.arange(64).expand(2, 64))
    with Largest() as seen:
        NextToken()(model, inputs, 128, None).loss.backward()
    assert seen.elements < 128 * 4096
