"""How likely a row is in a slot, under each eviction policy, by its chance and the cache's size.

Lookups are independent draws. A row's life is then a renewal process whose pace is set by a few times that are the
same for all rows; the cache's size fixes them. x is the expected lookups of a row in such a time.

LRU (H. Che, Y. Tung, Z. Wang, "Hierarchical Web Caching Systems: Modeling, Design and Experimental Results", IEEE JSAC
20(7), 2002): a row is in if it was asked for within the last T, with probability 1 - exp(-x).

CLOCK: T is one sweep of the hand. A row that enters unmarked stays sweep after sweep while it is asked for in each,
exp(x) sweeps on average, and is then absent for 1/p: in for the share x exp(x) / (1 + x exp(x)) of the time.

S3-FIFO: a row enters the small queue and is at its end after a time S. Unread, it goes; if it is asked for again
before the ghost forgets it (after an exponential time of mean G, as its cells are overwritten at random) it enters the
main queue, as it does if it was read in S. There it stays N rounds of a time M each, on average, and is then absent for
1/p. N follows from the Markov chain of its counter: a round adds a Poisson number of reads, up to 3, and its end takes
one away or, at none, the row. The small queue holds a tenth of the rows in slots, which fixes M, given S; the ghost
forgets in as many departures as there are slots, ten times those of S, which fixes G.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_SMALL_PART = 0.1
_SOLVED_GROUPS = 256
_MOST_STEPS = 30


def present_lru(chances: Floats, sizes: Floats) -> Floats:
    """Presence of rows asked for with `chances` [G], not rising, `sizes` [G] of each: [K, G], by rising cache size."""
    return -np.expm1(-np.outer(_times(chances, 50.0, 400), chances))


def present_clock(chances: Floats, sizes: Floats) -> Floats:
    """The same under CLOCK."""
    x = np.outer(_times(chances, 50.0, 400), chances)
    # Divided through by exp(x), which would overflow.
    present: Floats = x / (x + np.exp(-x))
    return present


def present_s3_fifo(chances: Floats, sizes: Floats) -> Floats:
    """The same under S3-FIFO."""
    small = _times(chances, 1e3, 128)[:, None]
    in_small, in_main = _shares(small, *_solve(small, *_merged(chances, sizes)), chances)
    return in_small + in_main


def _times(chances: Floats, longest: float, count: int) -> Floats:
    """Times from a cache of hardly a row to one of all rows: `longest` is the coldest row's expected lookups."""
    times: Floats = np.geomspace(1e-2, longest / chances[-1], count)
    return times


def _merged(chances: Floats, sizes: Floats) -> tuple[Floats, Floats]:
    """A few hundred groups of like chances, with all their rows and lookups: the times need no finer ones."""
    depth = np.log(chances[0] / chances)
    bins = np.floor(depth / max(depth[-1], 1e-9) * _SOLVED_GROUPS)
    starts = np.flatnonzero(np.append(True, np.diff(bins) > 0))
    merged = np.add.reduceat(sizes, starts)
    return np.add.reduceat(sizes * chances, starts) / merged, merged


def _solve(small: Floats, chances: Floats, sizes: Floats) -> tuple[Floats, Floats]:
    """The times M and G that go with each S: all [K, 1].

    Newton's method on the logarithms of M and of the main queue's rows, which rise with M; a step back after a step
    forth, or the other way round, may be half as long as the last.
    """
    main, ghost = np.clip(small, 0.1 / chances[0], 1 / chances[-1]), small / _SMALL_PART
    step, longest = np.zeros(len(small)), np.full(len(small), 2.0)
    for _ in range(_MOST_STEPS):
        in_small, in_main = _shares(small, main, ghost, chances)
        grows = 1 + _growth(main * chances)
        rows_small, rows_main = in_small @ sizes, in_main @ sizes
        growth = in_main * grows
        slope = (growth * (1 - in_main)) @ sizes / rows_main + (growth * in_small) @ sizes / rows_small
        before, step = step, np.log(rows_small / rows_main * (1 / _SMALL_PART - 1)) / slope
        longest = np.where(step * before < 0, np.minimum(longest, np.abs(before) / 2), longest)
        step = np.clip(step, -longest, longest)
        main = main * np.exp(step)[:, None]
        unread = (in_small * np.exp(-small * chances)) @ sizes / rows_small
        # Where all rows fit none depart unread, and how long they would be remembered does not matter.
        ghost = small / _SMALL_PART / np.maximum(unread, 1e-9)[:, None]
        if np.abs(step).max() < 1e-3:
            break
    return main, ghost


def _shares(small: Floats, main: Floats, ghost: Floats, chances: Floats) -> tuple[Floats, Floats]:
    """Shares of its time that a row is in the small and in the main queue: [K, G] each.

    A cycle runs from one entry into the small queue to the next. Its times are in units of 1/p and, so that a hot row's
    endless stay does not overflow, in units of the rounds' denominator.
    """
    rounds, unit = _rounds(main * chances)
    unread = np.exp(-small * chances)
    comes_back = unread / (1 + 1 / (ghost * chances))
    in_small = small * chances * unit
    in_main = (1 - unread + comes_back) * rounds * main * chances
    cycle = in_small + in_main + (1 + comes_back) * unit
    return in_small / cycle, in_main / cycle


def _rounds(x: Floats) -> tuple[Floats, Floats]:
    """Expected rounds in the main queue, as numerator and denominator; `x` are a round's expected reads."""
    none, several, many = _poisson(x)
    return none * (none + many + several) + several**2, none**3


def _growth(x: Floats) -> Floats:
    """Derivative of the logarithm of the rounds by that of `x`."""
    none, several, many = _poisson(x)
    rounds = none * (none + many + several) + several**2
    change = none * (none * (x * x / 2 + x - 1) - (none + many + several) + 2 * x * several)
    growth: Floats = x * (3 + change / rounds)
    return growth


def _poisson(x: Floats) -> tuple[Floats, Floats, Floats]:
    """Chances of no, of two or more, and of three or more reads where `x` are expected."""
    none = np.exp(-x)
    several = np.maximum(-np.expm1(-x) - x * none, 0.0)
    return none, several, np.maximum(several - x * x / 2 * none, 0.0)


PRESENCE: dict[str, Callable[[Floats, Floats], Floats]] = {
    "clock": present_clock,
    "lru": present_lru,
    "s3_fifo": present_s3_fifo,
}
"""The policies that have a model."""

__all__ = ["PRESENCE", "present_clock", "present_lru", "present_s3_fifo"]
