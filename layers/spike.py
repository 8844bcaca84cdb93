"""Activations as adaptive spikes: counts, spike trains, firing statistics. Formulas and source: `kernels/spike`."""

from typing import Any

import torch
from torch import Tensor, nn

from seqzoo.kernels.spike import spike
from seqzoo.kernels.spike import spike_counts as spike_counts

CODES = ("binary", "ternary", "bitwise", "twos_complement", "unsigned")
MOST = 2**31 - 1  # the largest count that is encoded


class AdaptiveSpike(nn.Module):
    """x -> what its spike counts stand for, every row with a threshold of its own.

    Args:
        k: mean absolute value over threshold; the larger, the more spikes and the smaller the error.
        through_threshold: let the gradient see that the threshold moves with x; otherwise it is that of y = x.
    """

    def __init__(self, k: float = 3.0, through_threshold: bool = False) -> None:
        super().__init__()
        self.k, self.through_threshold = float(k), through_threshold

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> y [..., C], dtype of x."""
        return spike(x, k=self.k, through_threshold=self.through_threshold)

    def extra_repr(self) -> str:
        return f"k={self.k}, through_threshold={self.through_threshold}"


def encode(counts: Tensor, code: str, steps: int | None = None) -> Tensor:
    """Counts s as trains of spikes s_t over virtual time steps t = 1..T, without loss.

        code              s_t          T                        s
        binary            0, 1         max s                    sum_t s_t, which fires while some remain; s >= 0
        ternary           -1, 0, 1     max |s|                  sum_t s_t, in the direction of what remains
        bitwise           -1, 0, 1     ceil log2(max |s| + 1)   sum_t 2^(t-1) s_t, the bits of |s| with the sign of s
        twos_complement   0, 1         one more                 sum_t 2^(t-1) s_t, but the last step is -2^(T-1)
        unsigned          0, 1         ceil log2(max s + 1)     sum_t 2^(t-1) s_t; s >= 0

    Source: arXiv 2509.05276. A product W s is the sum of the products W s_t, weighed as s is.

    Args:
        counts: whole numbers, of any real dtype.
        steps: T; None is as many as these counts need. More are silent.

    Returns:
        int8 [T, *counts' shape].

    Raises:
        ValueError: no such code, counts that are not whole or beyond 31 bits, negative ones in a code without signs,
            or too few steps.
    """
    s = _whole(counts, code)
    most = int(s.abs().max()) if s.numel() else 0
    needed = most if code in ("binary", "ternary") else most.bit_length() + (code == "twos_complement")
    steps = needed if steps is None else steps
    if steps < needed:
        raise ValueError(f"steps: expected at least {needed} for counts up to {most}, got {steps}")
    t = torch.arange(steps, device=s.device).view(-1, *[1] * s.ndim)
    if code in ("binary", "ternary"):
        return (s.abs() > t) * s.sign().to(torch.int8)
    t = t.clamp(max=32)  # beyond that a number repeats its sign
    bits = s >> t if code == "twos_complement" else s.abs() >> t
    return ((bits & 1) * (s.sign() if code == "bitwise" else 1)).to(torch.int8)


def decode(trains: Tensor, code: str) -> Tensor:
    """The counts, int64, that `encode` made these trains [T, ...] of.

    Raises:
        ValueError: no such code, no steps to sum over, spikes that it does not have, or more than 63 steps where they
            are bits.
    """
    _known(code)
    if not trains.ndim:
        raise ValueError("trains: expected [steps, ...], got a single number")
    if trains.is_floating_point() and not (trains == trains.round()).all():
        raise ValueError("trains: expected whole numbers of spikes, got others")
    lowest = -1 if code in ("ternary", "bitwise") else 0
    if trains.numel() and not lowest <= int(trains.min()) <= int(trains.max()) <= 1:
        got = f"{int(trains.min())} to {int(trains.max())}"
        raise ValueError(f"trains: expected spikes of {lowest} to 1 in {code} code, got {got}")
    trains = trains.long()
    if code in ("binary", "ternary"):
        return trains.sum(0)
    if len(trains) > 63:
        raise ValueError(f"trains: expected at most 63 steps in {code} code, got {len(trains)}")
    weights = 1 << torch.arange(len(trains), device=trains.device)
    if code == "twos_complement":
        weights[-1:] *= -1
    return (trains * weights.view(-1, *[1] * (trains.ndim - 1))).sum(0)  # no matrix product: a GPU has none of int64


def _known(code: str) -> None:
    if code not in CODES:
        raise ValueError(f"code: expected one of {', '.join(CODES)}, got {code!r}")


def _whole(counts: Tensor, code: str) -> Tensor:
    _known(code)
    if counts.is_complex():
        raise ValueError(f"counts: expected real numbers, got {counts.dtype}")
    if counts.is_floating_point() and not ((counts == counts.round()) & (counts.abs() <= MOST)).all():
        raise ValueError(f"counts: expected whole numbers of at most {MOST}, got others")
    s = counts.long()
    low, high = map(int, s.aminmax()) if s.numel() else (0, 0)
    if max(-low, high) > MOST:  # as Python's numbers: the lowest int64 has no size of its own
        raise ValueError(f"counts: expected at most {MOST}, got {max(-low, high)}")
    if code in ("binary", "unsigned") and low < 0:
        raise ValueError(f"counts: expected none below 0 in {code} code, which has no sign, got {low}")
    return s


class FiringStatistics:
    """Sums over all counts that were added; nothing waits for a device before `summary`.

    Args:
        window: T, steps of the bitwise code, in which counts up to 2^T - 1 fit.

    Raises:
        ValueError: a window that is no whole number, 1 to 31.
    """

    def __init__(self, window: int = 3) -> None:
        if isinstance(window, bool) or not isinstance(window, int) or not 1 <= window <= 31:
            raise ValueError(f"window: expected 1 to 31 steps, got {window!r}")
        self.window, self._sums, self._largest = window, None, None

    @torch.no_grad()
    def add(self, counts: Tensor) -> None:
        """counts: whole numbers, any shape and any real dtype."""
        if not counts.numel():
            return
        size = counts.abs() if counts.is_floating_point() else counts.long().abs()
        ones = bits_set(size)
        fits = size < 2**self.window
        sums = [size == 0, ones, size, fits, ones * fits, torch.ones_like(size)]
        sums = torch.stack([x.sum(dtype=torch.float64) for x in sums])
        largest = size.max()
        self._sums = sums if self._sums is None else self._sums + sums
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def summary(self) -> dict[str, Any]:
        """Of the channels of all rows, as numbers:

        silent: the share that does not fire.
        spikes: per channel, in the bitwise code: the mean number of bits of |s|.
        ternary_spikes: per channel, in the ternary code: the mean of |s|.
        within: the share with |s| <= 2^T - 1, which T steps hold.
        sparsity: of those, the share of (channel, step) of the T steps without a spike.
        largest: |s|.
        channels: how many there were.

        Gaussian x at k = 3 has 0.106, 1.30, 2.99, 0.954 and 0.572; Laplace 0.154, 1.22, 2.99, 0.918 and 0.615. Which
        of the possible definitions arXiv 2509.05276 means is settled by numbers: `sparsity` is of the counts that fit,
        for over all of them, 1 - spikes / T, it would be 0.567 and 0.592.

        Raises:
            ValueError: nothing was added, or counts that are NaN or beyond 31 bits.
        """
        largest = None if self._largest is None else float(self._largest)
        if largest is None or not largest <= MOST:
            raise ValueError(f"FiringStatistics: expected counts of at most {MOST}, got {largest}")
        silent, ones, total, fits, ones_fit, channels = self._sums.tolist()
        return {
            "silent": silent / channels,
            "spikes": ones / channels,
            "ternary_spikes": total / channels,
            "within": fits / channels,
            "sparsity": 1 - ones_fit / (self.window * fits) if fits else 0.0,
            "largest": largest,
            "channels": int(channels),
        }


def bits_set(size: Tensor) -> Tensor:
    """How many bits of each whole number, 0 to 2^31 - 1, are 1."""
    x = size.long()
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101 >> 24) & 0x3F
