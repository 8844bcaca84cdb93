"""Parts that are sums over heads: one with some of the heads of another gives a summand of what that one gives.

    y = sum over h of W_out[:, h] f_h(x)        f_h of head h; of an MLP, of a hidden unit

A part that is such a sum has a method

    heads() -> Heads | None      None: with these options it is none, for its heads are normed as one

and where its heads differ by more than their weights, attributes `first_head` and `all_heads`: where its heads stand
among those of the whole. Built with all of `arguments` divided by n it is the n-th of the whole; its parameters are
those of the whole, cut in the dimension in which their shape differs. (A bias behind W_out is no summand's own: it is
added once.) So parts can be dealt over processes; a part that is no such sum has nothing to say.
"""

from typing import NamedTuple


class Heads(NamedTuple):
    arguments: tuple[str, ...]  # of the part's, what is dealt: numbers of heads, widths
    sections: dict[str, list[int]] = {}  # parameters of several matrices, as q, k and v in one: the size of each, whole
