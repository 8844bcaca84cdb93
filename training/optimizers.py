"""Which parameter is stepped by what: the `optimizer=` choices."""

import re
from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from seqzoo.training.muon import Muon
from seqzoo.training.sharded import cuts_of

CONV = r"\bconv\.weight$"  # a filter per channel: two dimensions, and yet no matrix


def adamw(model: nn.Module, *, lr: float, betas: Sequence[float], eps: float, weight_decay: float) -> list[Optimizer]:
    """AdamW for all. Matrices decay; vectors (norms, biases, decays, filters) do not."""
    return [_adamw(learning(model), lr, betas, eps, weight_decay)]


def muon(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    ns_steps: int,
    ns_dtype: str,
    adjust_lr_fn: str,
    adamw: dict,
) -> list[Optimizer]:
    """Muon for the hidden matrices, experts' stacks too; AdamW for the rest.

    Args:
        model: its parameters by name decide.
        lr, weight_decay, momentum, ns_steps, ns_dtype, adjust_lr_fn: Muon's.
        adamw: lr, betas, eps, weight_decay of the rest, and `names`: regular expressions of the matrices that are not
            Muon's (embedding, head, router: their rows are looked up or chosen, not multiplied through).

    Raises:
        ValueError: no matrix is left for Muon.
    """
    names = "|".join(adamw["names"])
    hidden, rest = [], []
    for name, p in learning(model):
        theirs = _is_matrix(name, p) and not (names and re.search(names, name))
        (hidden if theirs else rest).append((name, p))
    if not hidden:
        raise ValueError(f"optimizer.adamw.names: expected to leave a matrix to Muon, got none past {names!r}")
    options = dict(momentum=momentum, ns_steps=ns_steps, ns_dtype=ns_dtype, adjust_lr_fn=adjust_lr_fn)
    first = Muon([p for _, p in hidden], lr=lr, weight_decay=weight_decay, **options)
    return [first, _adamw(rest, **{name: value for name, value in adamw.items() if name != "names"})]


def learning(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that learn, by name."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _adamw(
    named: list[tuple[str, Tensor]], lr: float, betas: Sequence[float], eps: float, weight_decay: float
) -> Optimizer:
    matrices = [p for name, p in named if _is_matrix(name, p)]
    vectors = [p for name, p in named if not _is_matrix(name, p)]
    groups = [
        {"params": params, "weight_decay": decay}
        for kind, decay in ((matrices, weight_decay), (vectors, 0.0))
        for params in _by_cut(kind)
    ]
    return AdamW(groups, lr=lr, betas=tuple(betas), eps=eps, fused=True)


def _by_cut(params: list[Tensor]) -> list[list[Tensor]]:
    """Those that are cut over the same processes: a fused step is of one mesh."""
    found: dict[int, list[Tensor]] = {}
    for p in params:
        found.setdefault(cuts_of(p), []).append(p)
    return list(found.values())


def _is_matrix(name: str, p: Tensor) -> bool:
    return p.ndim >= 2 and not re.search(CONV, name)
