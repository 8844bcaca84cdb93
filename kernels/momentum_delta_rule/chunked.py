"""The momentum delta rule, C tokens at a time, forward and backward, in torch on any device.

Write N = -M, so that all terms add. Of a chunk's tokens 1 .. C, with 0 all that came before,

    A_ij, U_ij = products of alpha, of mu, over tokens j+1 .. i; 0 for j > i         how S and N fade from j to i
    G = A[:, 1:] diag(beta) U[1:, :]                                 what of a write to N at j is in S at i
    S_i = A_i0 S_0 + G_i0 N_0 + sum_j G_ij k_j z_j^T                 N_i = U_i0 N_0 + sum_j U_ij k_j z_j^T
    z_i = eta_i (v_i - S_{i-1}^T p_i)                                what each token writes

so with the chunk's first memories R = [S_0; N_0] stacked along K and before_i = [A, G] at i-1, after_i = [A, G] at i:

    Z = (I + diag(eta) L)^-1 eta (V - [before_A P, before_N P] R)    L = P K^T * before_G, strictly lower
    O = [after_A Q, after_N Q] R + (Q K^T * after_G) Z               R' = keep R + [G_C K, U_C K]^T Z

G is a product of two matrices of decays in [0, 1] and a sum of terms of one sign where beta >= 0, at most sum(beta): it
is exact however strong the decays. (As a difference of ratios of running products, it overflows or cancels.)
Where a document starts inside the chunk, A and U are 0 across its start. All but R is computed for all chunks of a
segment at once; of a segment only the inputs and R at its start are kept for backward, which computes the rest again.
Source: arXiv 2605.05838 for the rule; this form and its gradients were derived by hand.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = {"cpu": 32}  # tokens; 64 elsewhere
SEGMENT = {"cpu": 512}  # tokens; 4096 elsewhere, where launching costs more than cache


def momentum_delta_rule_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    log_alpha: Tensor,
    log_mu: Tensor,
    beta: Tensor,
    eta: Tensor,
    state: Tensor | None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same as `momentum_delta_rule_reference`."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    if state is None:
        state = q.new_zeros(v.shape[0], v.shape[2], 2, q.shape[3], v.shape[3], dtype=dtype)
    if starts is None:
        starts = torch.zeros(v.shape[:2], dtype=torch.bool, device=v.device)
    outputs, length = [], SEGMENT.get(v.device.type, 4096)
    time = (*(x.split(length, 1) for x in (q, k, v, p, log_alpha, log_mu, beta, eta)), starts.split(length, 1))
    for *inputs, starts_ in zip(*time, strict=True):
        o, state = _Segment.apply(*(x.to(dtype) for x in inputs), state.to(dtype), starts_)
        outputs.append(o.to(v.dtype))
    return torch.cat(outputs, dim=1), state


class _Chunks(NamedTuple):
    """What a segment's chunks hold before any memory. n chunks, N = B HV memories, C tokens in a chunk."""

    q: Tensor  # [n, N, C, K]
    k: Tensor
    v: Tensor  # [n, N, C, V]
    p: Tensor  # [n, N, C, K]
    beta: Tensor  # [n, N, C, 1]
    eta: Tensor
    goes_on: Tensor  # [n, N, C, 1] 0 where a document starts, else 1
    A: Tensor  # [n, N, C + 1, C + 1]
    U: Tensor  # [n, N, C, C + 1] from token 1 on
    before: Tensor  # [n, N, C, 2 + C] what a token meets: coefficients of S_0, of N_0, of each write
    after: Tensor  # [n, N, C, 2 + C] what it leaves
    pk: Tensor  # [n, N, C, C] P K^T
    qk: Tensor  # [n, N, C, C] Q K^T
    ask: Tensor  # [n, N, C, 2K] before of S_0 and N_0, times p
    read: Tensor  # [n, N, C, 2K] after of S_0 and N_0, times q
    write: Tensor  # [n, N, C, 2K] what is left of each write in S and in N at the chunk's end, times k
    keep: Tensor  # [n, N, 2, 2] from [S_0, N_0] to the chunk's end
    inverse: Tensor  # (I + diag(eta) L)^-1

    @property
    def L(self) -> Tensor:
        return self.pk * self.before[..., 2:]

    @property
    def P(self) -> Tensor:
        return self.qk * self.after[..., 2:]


class _Past(NamedTuple):
    """What the chunks made of the memories."""

    R: Tensor  # [n, N, 2K, V] at the start of each
    X: Tensor  # [n, N, C, V] ask R
    Y: Tensor  # read R
    Z: Tensor


def _to_chunks(x: Tensor, C: int, heads: int) -> Tensor:
    """[B, T, H, ...] -> [n, B heads, C, ...], each head heads / H times, padded with zeros at the end."""
    pad = -x.shape[1] % C
    if pad:
        x = torch.cat([x, x.new_zeros(x.shape[0], pad, *x.shape[2:])], dim=1)
    x = x.unflatten(1, (-1, C)).movedim((1, 3), (0, 2))  # [n, B, H, C, ...]
    if heads > x.shape[2]:
        x = x.repeat_interleave(heads // x.shape[2], dim=2)
    return x.flatten(1, 2).contiguous()


def _from_chunks(x: Tensor, like: Tensor) -> Tensor:
    """The reverse, and the adjoint of repeating heads: [n, B heads, C, ...] -> the shape of `like`, [B, T, H, ...]."""
    B, T, H = like.shape[:3]
    x = x.unflatten(1, (B, H, -1)).sum(3)
    return x.movedim((0, 2), (1, 3)).flatten(1, 2)[:, :T]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b over [n, N] at once; bmm on flat views spares matmul's bookkeeping."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def _fading(log: Tensor, unseen: Tensor) -> Tensor:
    """log decays [n, N, C] -> decay from token j to token i [n, N, C + 1, C + 1], 0 where `unseen`."""
    total = torch.nn.functional.pad(log.double().cumsum(-1), (1, 0))  # a float would lose long sums' small differences
    return (total[..., :, None] - total[..., None, :]).to(log.dtype).masked_fill_(unseen, -torch.inf).exp_()


def _prepare(q, k, v, p, log_alpha, log_mu, beta, eta, starts) -> _Chunks:
    C, heads = CHUNK.get(v.device.type, 64), v.shape[2]
    marks = _to_chunks(starts[:, :, None], C, heads)
    document = torch.nn.functional.pad(marks.int().cumsum(-1), (1, 0))  # 0: since before
    unseen = torch.ones(C + 1, C + 1, dtype=torch.bool, device=v.device).triu(1) | (
        document[..., :, None] != document[..., None, :]
    )
    forget = lambda log: _to_chunks(log.masked_fill(starts[:, :, None], 0.0), C, heads)  # a start whatever log says
    A, U = _fading(forget(log_alpha), unseen), _fading(forget(log_mu), unseen)[..., 1:, :]
    q, k, v, p = (_to_chunks(x, C, heads) for x in (q, k, v, p))
    beta, eta = (_to_chunks(x, C, heads)[..., None] for x in (beta, eta))
    goes_on = (~marks).to(v.dtype)[..., None]
    seen = torch.cat([A[..., :1], _product(A[..., 1:], beta * U)], dim=-1)
    before, after = seen[..., :-1, :] * goes_on, seen[..., 1:, :]
    pk, qk = _product(p, k.mT), _product(q, k.mT)
    ask = torch.cat([before[..., :1] * p, before[..., 1:2] * p], dim=-1)
    read = torch.cat([after[..., :1] * q, after[..., 1:2] * q], dim=-1)
    end, end_N = after[..., -1, :], U[..., -1, :]
    write = torch.cat([end[..., 2:, None] * k, end_N[..., 1:, None] * k], dim=-1)
    keep = torch.stack([end[..., 0], end[..., 1], torch.zeros_like(end_N[..., 0]), end_N[..., 0]], -1)
    system = eta * pk * before[..., 2:]
    eye = torch.eye(C, dtype=v.dtype, device=v.device).expand_as(system)
    inverse = torch.linalg.solve_triangular(system, eye, upper=False, unitriangular=True)
    return _Chunks(
        q, k, v, p, beta, eta, goes_on, A, U, before, after, pk, qk, ask, read, write,
        keep.unflatten(-1, (2, 2)), inverse,
    )  # fmt: skip


def _keep(keep: Tensor, R: Tensor) -> Tensor:
    """keep [N, 2, 2] on the two memories in R [N, 2K, V]."""
    return torch.bmm(keep, R.view(len(R), 2, -1)).view_as(R)


def _scan(c: _Chunks, R: Tensor) -> tuple[_Past, Tensor]:
    """Through the chunks with the memories R [N, 2K, V]; also those after the last."""
    C, both, wanted = c.k.shape[2], torch.cat([c.ask, c.read], dim=2), c.eta * c.v
    first, seen, Z = [], [], []
    for n in range(c.k.shape[0]):
        first.append(R)
        seen.append(torch.bmm(both[n], R))
        Z.append(torch.bmm(c.inverse[n], torch.addcmul(wanted[n], c.eta[n], seen[n][:, :C], value=-1)))
        R = torch.baddbmm(_keep(c.keep[n], R), c.write[n].mT, Z[n])
    X, Y = torch.stack(seen).split(C, dim=2)
    return _Past(torch.stack(first), X, Y, torch.stack(Z)), R


def _scan_back(c: _Chunks, d_out: Tensor, d_last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Against time: gradients of eta times each error, of the memories after each chunk, and before the first."""
    from_out, from_read = _product(c.P.mT, d_out), _product(c.read.mT, d_out)
    errors, after, d_R = [], [], d_last
    for n in reversed(range(c.k.shape[0])):
        after.append(d_R)
        errors.append(torch.bmm(c.inverse[n].mT, torch.baddbmm(from_out[n], c.write[n], d_R)))
        d_R = torch.baddbmm(_keep(c.keep[n].mT, d_R) + from_read[n], c.ask[n].mT, -c.eta[n] * errors[-1])
    return torch.stack(errors[::-1]), torch.stack(after[::-1]), d_R


def _turn(state: Tensor) -> Tensor:
    """[S, M] <-> [S, N]."""
    return torch.stack([state[:, :, 0], -state[:, :, 1]], dim=2)


class _Segment(torch.autograd.Function):
    """The time inputs of some tokens, all of one dtype, and the memories before them -> o and the memories after."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        *time, state, starts = inputs
        c = _prepare(*time, starts)
        past, last = _scan(c, _turn(state).flatten(2, 3).flatten(0, 1))
        out = past.Y + _product(c.P, past.Z)
        return _from_chunks(out, time[2]), _turn(last.view(state.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_o, d_last):
        *time, state, starts = ctx.saved_tensors
        with torch.autocast(d_o.device.type, enabled=False):
            c = _prepare(*time, starts)
            past, _ = _scan(c, _turn(state).flatten(2, 3).flatten(0, 1))
            d_out = _to_chunks(d_o, c.k.shape[2], d_o.shape[2])
            *grads, d_state = _gradients(c, past, d_out, _turn(d_last).flatten(2, 3).flatten(0, 1))
            grads = [_from_chunks(x, like) for x, like in zip(grads, time, strict=True)]
        for log in (4, 5):
            grads[log] = grads[log].masked_fill(starts[:, :, None], 0.0)
        return *grads, _turn(d_state.view(state.shape)), None


def _gradients(c: _Chunks, past: _Past, d_out: Tensor, d_last: Tensor) -> tuple[Tensor, ...]:
    """Of the time inputs [n, N, C, ...] and of the first memories [N, 2K, V]."""
    d_wanted, d_R, d_first = _scan_back(c, d_out, d_last)
    d_v = c.eta * d_wanted
    d_eta = (d_wanted * (c.v - past.X - _product(c.L, past.Z))).sum(-1)

    d_ask, d_read = -_product(d_v, past.R.mT), _product(d_out, past.R.mT)
    d_write = _product(past.Z, d_R.mT)
    d_keep = _product(d_R.unflatten(2, (2, -1)).flatten(3), past.R.unflatten(2, (2, -1)).flatten(3).mT)
    d_L, d_P = -_product(d_v, past.Z.mT), _product(d_out, past.Z.mT)

    end, end_N = c.after[..., -1, 2:, None], c.U[..., -1, 1:, None]
    (ask_S, ask_N), (read_S, read_N), (write_S, write_N) = (x.chunk(2, dim=-1) for x in (d_ask, d_read, d_write))
    d_pk, d_qk = d_L * c.before[..., 2:], d_P * c.after[..., 2:]
    d_p = c.before[..., :1] * ask_S + c.before[..., 1:2] * ask_N + _product(d_pk, c.k)
    d_q = c.after[..., :1] * read_S + c.after[..., 1:2] * read_N + _product(d_qk, c.k)
    d_k = end * write_S + end_N * write_N + _product(d_pk.mT, c.p) + _product(d_qk.mT, c.q)

    dot = lambda x, y: (x * y).sum(-1, keepdim=True)
    d_before = torch.cat([dot(ask_S, c.p), dot(ask_N, c.p), d_L * c.pk], dim=-1) * c.goes_on
    d_after = torch.cat([dot(read_S, c.q), dot(read_N, c.q), d_P * c.qk], dim=-1)
    d_after[..., -1, :] += torch.cat([d_keep[..., 0, :], (write_S * c.k).sum(-1)], dim=-1)
    d_end_N = torch.cat([d_keep[..., 1, 1:], (write_N * c.k).sum(-1)], dim=-1)
    d_log_alpha, d_log_mu, d_beta = _fading_gradients(c, d_before, d_after, d_end_N)
    return d_q, d_k, d_v, d_p, d_log_alpha, d_log_mu, d_beta, d_eta, d_first


def _fading_gradients(c: _Chunks, d_before: Tensor, d_after: Tensor, d_end_N: Tensor) -> tuple[Tensor, ...]:
    """Of log alpha, log mu and beta [n, N, C], from those of `before`, `after` and the last row of U.

    Entries that are 0 by order or document get a gradient here too; it meets the zeros of A and U and goes no further.
    """
    pad = torch.nn.functional.pad
    d_seen = pad(d_before, (0, 0, 0, 1)) + pad(d_after, (0, 0, 1, 0))
    d_G = d_seen[..., 1:]
    d_A = torch.cat([d_seen[..., :1], _product(d_G, (c.beta * c.U).mT)], dim=-1) * c.A
    d_BU = _product(c.A[..., 1:].mT, d_G)
    d_beta = (d_BU * c.U).sum(-1)
    d_U = c.beta * d_BU
    d_U[..., -1, :] += d_end_N
    return _spanned(d_A), _spanned(d_U * c.U), d_beta


def _spanned(d_log: Tensor) -> Tensor:
    """Gradient of log decays from j to i [.., rows up to i = C, j from 0] -> of a token's: all j < t <= i. [.., C]

    (As a difference of row sums and column sums, the large entries of weak decays would drown those of strong ones.)
    """
    rows, columns = d_log.shape[-2:]
    return d_log.cumsum(-1)[..., :-1].tril(columns - rows - 1).sum(-2)
