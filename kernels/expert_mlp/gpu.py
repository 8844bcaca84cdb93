"""The experts' MLPs on a GPU: a grouped matrix product, torch's where that is fast, and Triton for all around it.

Slots are sorted by expert on the device, and nothing waits for it. The weight is in what stands between the matrices,
so that no row of width D is kept for backward: of the R = N k rows only the gates are, 2 I numbers each; the rest is
gathered and computed again.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from seqzoo.kernels.expert_mlp import grouped_product
from seqzoo.kernels.expert_mlp.grouped_product import matrices_gradient, product
from seqzoo.kernels.gpu import launch, needs_gpu, tuned, usable

MOST = 64  # slots per token, which kernels go through one by one


def runs(x: Tensor, chosen: Tensor) -> bool:
    """Whether this backend is to be chosen for x: triton installed, and a dtype and slots that it has kernels for."""
    return usable() and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and chosen.shape[1] <= MOST


def expert_mlp_triton(x: Tensor, chosen: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Same as `expert_mlp_reference`; hidden values and gates are rounded to x's dtype between the products.

    Raises:
        ValueError: no GPU, a dtype that it has no kernels for, or more than 64 slots per token.
    """
    needs_gpu(x)
    if chosen.shape[1] > MOST:
        raise ValueError(f"expert_mlp: backend triton: expected at most {MOST} slots per token, got {chosen.shape[1]}")
    inputs = (x, weight, gate_up, down)
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    return _differentiable(x, chosen, weight, gate_up, down, learns)[0]


def sort(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """chosen [N, k] -> order [R] int64, the slots (n k + j) by expert; place [N, k] int32, its inverse; ends [E] int32,
    behind each expert's last row."""
    narrow = torch.int16 if experts <= torch.iinfo(torch.int16).max else torch.int32  # fewer digits to sort by
    expert, order = chosen.flatten().to(narrow).sort(stable=True)
    every = torch.arange(experts, device=chosen.device, dtype=narrow)
    ends = torch.searchsorted(expert, every, right=True, out_int32=True)
    numbers = torch.arange(order.numel(), device=chosen.device, dtype=torch.int32)
    return order, torch.empty_like(numbers).scatter_(0, order, numbers).view_as(chosen), ends


def _start(kernel: str, like: Tensor, rows: int, width: int, *arguments: Tensor, strips: bool = True, **sizes) -> None:
    from seqzoo.kernels.expert_mlp import gpu_rows

    config = tuned("expert_mlp", kernel, like.device, like.dtype, width=width)
    programs = -(-rows // config["BR"]) * (-(-width // config["BC"]) if strips else 1)
    if programs:
        launch(getattr(gpu_rows, f"{kernel}_rows"), (programs,), *arguments, rows, **sizes, **config)


def spread(x: Tensor, order: Tensor, k: int) -> Tensor:
    """x [N, D] -> [R, D], each token once per slot."""
    out = x.new_empty(order.numel(), x.shape[1])
    _start("spread", x, *out.shape, x.contiguous(), order, out, SLOTS=k, D=x.shape[1])
    return out


def collect(rows: Tensor, place: Tensor) -> Tensor:
    """rows [R, D] -> [N, D], the sums of each token's slots."""
    out = rows.new_empty(place.shape[0], rows.shape[1])
    _start("collect", rows, *out.shape, rows.contiguous(), place, out, SLOTS=place.shape[1], D=rows.shape[1])
    return out


def gate(gates: Tensor, weight: Tensor, order: Tensor) -> Tensor:
    """gates [R, 2 I] -> [R, I]."""
    R, I = gates.shape[0], gates.shape[1] // 2
    out = gates.new_empty(R, I)
    _start("gate", gates, R, I, gates.contiguous(), weight.contiguous(), order, out, I=I)
    return out


def gate_backward(gates: Tensor, weight: Tensor, order: Tensor, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `gate` made, d_gates, d_weight (fp32, as weight)."""
    from seqzoo.kernels.expert_mlp.gpu_rows import gate_rows_backward

    R, I = given.shape
    between, d_gates = torch.empty_like(given), torch.empty_like(gates)
    d_weight = weight.new_empty(weight.shape, dtype=torch.float32)
    config = tuned("expert_mlp", "gate_backward", gates.device, gates.dtype, width=I)
    tensors = (gates, weight.contiguous(), order, given.contiguous(), between, d_gates, d_weight)
    if R:
        launch(gate_rows_backward, (-(-R // config["BR"]),), *tensors, R, I=I, **config)
    return between, d_gates, d_weight


@torch.library.custom_op("seqzoo::expert_mlp_triton", mutates_args=())
def _differentiable(
    x: Tensor, chosen: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y; and where `keep` the gates, order, place and ends, for backward."""
    order, place, ends = sort(chosen, gate_up.shape[0])
    gates = product(spread(x, order, chosen.shape[1]), gate_up, ends)
    y = collect(product(gate(gates, weight, order), down, ends), place)
    return (y, gates, order, place, ends) if keep else (y, *(t.new_empty(0) for t in (gates, order, place, ends)))


@_differentiable.register_fake
def _(x, chosen, weight, gate_up, down, keep):
    if not keep:
        whole = [chosen.new_empty(0, dtype=t) for t in (torch.int64, torch.int32, torch.int32)]
        return x.new_empty(x.shape), x.new_empty(0), *whole
    R = chosen.shape[0] * chosen.shape[1]
    return (
        x.new_empty(x.shape),
        x.new_empty(R, gate_up.shape[1]),
        chosen.new_empty(R),
        chosen.new_empty(chosen.shape, dtype=torch.int32),
        chosen.new_empty(gate_up.shape[0], dtype=torch.int32),
    )


@torch.library.custom_op("seqzoo::expert_mlp_triton_backward", mutates_args=())
def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, gates: Tensor, order: Tensor, place: Tensor,
    ends: Tensor, experts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dweight and, where `experts` are to learn, those of their matrices, else nothing in them."""
    k = place.shape[1]
    d_out = spread(dy, order, k)
    d_between = product(d_out, down.mT, ends)
    between, d_gates, d_weight = gate_backward(gates, weight, order, d_between)
    dx = collect(product(d_gates, gate_up.mT, ends), place)
    matrices = x.new_empty(0), x.new_empty(0)
    if experts:
        d_gate_up = matrices_gradient(d_gates, spread(x, order, k), gate_up, ends)
        matrices = d_gate_up, matrices_gradient(d_out, between, down, ends)
    return dx, d_weight.to(weight.dtype), *matrices


@_gradients.register_fake
def _(dy, x, weight, gate_up, down, gates, order, place, ends, experts):
    matrices = [t.new_empty(t.shape if experts else 0) for t in (gate_up, down)]
    return x.new_empty(x.shape), weight.new_empty(weight.shape), *matrices


def _remember(ctx, inputs, output):
    x, chosen, weight, gate_up, down, _ = inputs
    _, *kept = output
    ctx.save_for_backward(x, weight, gate_up, down, *kept)
    ctx.mark_non_differentiable(*kept)


def _backward(ctx, dy, *_):
    experts = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    dx, dweight, *matrices = _gradients(dy, *ctx.saved_tensors, experts)
    return dx, None, dweight, *(matrices if experts else (None, None)), None


_differentiable.register_autograd(_backward, setup_context=_remember)


def examples(make: Callable) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that start the kernels in their shape classes; see `kernels/gpu/examples.py`."""
    yield from grouped_product.examples(make)
    for N, k, D, I, dtype in (
        (4096, 10, 2048, 512, torch.bfloat16),
        (4096, 8, 1024, 256, torch.float32),
        (64, 10, 2048, 512, torch.bfloat16),
        (2048, 2, 256, 128, torch.bfloat16),
    ):
        R = N * k
        x, rows, gates, weight = make((N, D), dtype), make((R, D), dtype), make((R, 2 * I), dtype), make((N, k), dtype)
        order, place, given = make((R,), torch.int64), make((N, k), torch.int32), make((R, I), dtype)
        name = f"{N} tokens of {D}, {k} slots, {dtype}"
        yield f"spread {name}", lambda x=(x, order, k): spread(*x)
        yield f"collect {name}", lambda x=(rows, place): collect(*x)
        yield f"gate {name}", lambda x=(gates, weight, order): gate(*x)
        yield f"gate backward {name}", lambda x=(gates, weight, order, given): gate_backward(*x)
