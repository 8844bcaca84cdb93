"""The first chunk's slots on a GPU: a key head's whole choice in one program, in place of a launch per slot."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["C", "new"])
def assign_farthest(likeness, slot, C, new, BC: tl.constexpr):
    """likeness [heads, C, C] of a chunk's keys -> slot [heads, C] int64: the first token and, one by one, that which is
    least like all chosen begin the `new` slots; the rest joins what it is most like, the earlier one where two are."""
    i = tl.arange(0, BC)
    there = i < C
    at = likeness + tl.program_id(0).to(tl.int64) * C * C
    covered = tl.where(i == 0, float("inf"), tl.load(at + i, mask=there, other=float("inf")))
    best = tl.load(at + i * C, mask=there, other=0.0)
    joined, begun = tl.zeros((BC,), tl.int32), tl.where(i == 0, 0, -1)
    for n in range(1, new):
        pick = tl.argmin(covered, axis=0)
        to = tl.load(at + pick * C + i, mask=there, other=float("inf"))
        covered = tl.where(i == pick, float("inf"), tl.maximum(covered, to))
        of = tl.load(at + i * C + pick, mask=there, other=0.0)
        joined, best, begun = tl.where(of > best, n, joined), tl.maximum(of, best), tl.where(i == pick, n, begun)
    chosen = tl.where(begun >= 0, begun, joined)
    tl.store(slot + tl.program_id(0).to(tl.int64) * C + i, chosen.to(tl.int64), mask=there)
