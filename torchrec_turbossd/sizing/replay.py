"""Hit rates measured by replaying sampled lookups through the cache itself, made smaller by as much.

A cache of S slots that serves a share R of the rows, chosen at random, is hit like one of S R slots that serves all of
them (C. Waldspurger, T. Saemundsson, I. Ahmad, N. Park, "Cache Modeling and Optimization using Miniature Simulations",
USENIX ATC 2017). Unlike a formula this knows what the order of lookups does: sessions, drift, rows new every day.
"""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchrec_turbossd.cache.slot_cache import SlotCache
from torchrec_turbossd.errors import CacheFullError
from torchrec_turbossd.sizing.sample import AccessSample, Ints, Window

_LEAST_SLOTS, _MOST_SCALED_SLOTS = 16, 512
_GROWTH = 2.0**0.5
_BETWEEN = 4
_STEPS_A_CACHE, _LONGEST_STEP, _MOST_STEPS = 16, 4096, 8192

Floats = npt.NDArray[np.float64]


def replayed(sample: AccessSample, policy: str) -> tuple[Ints, Floats]:
    """Cache sizes in slots, rising, and the hit rate per lookup of each, not falling.

    Each size is tried on the window with the most rows in which it makes a cache of 512 slots or fewer, over which it
    starts empty and counts from the middle on. That cache then sees more than a hundred lookups for each of its slots.
    As everywhere, a row that a batch asks for several times and that is absent is one miss. Misses are divided by the
    share of all lookups that the sampled rows have on average, not by how many they happen to have: whether some of the
    hottest rows are among them, which hardly ever miss, makes no difference then (SHARDS-adj).
    """
    sizes: list[float] = []
    rates: list[float] = []
    for window in sample.windows():
        trace = _Trace(window, sample.lookups)
        for size in _sizes(sizes[-1] if sizes else 0.0, trace.rows / window.share + len(window.left_out), window):
            sizes.append(size)
            rates.append(trace.hit_rate(max(1, round(size * window.share)), policy))
    if not sizes:
        return np.empty(0, dtype=np.int64), np.empty(0)
    return _finer(np.minimum(sizes, sample.rows), np.maximum.accumulate(rates))


def _sizes(before: float, rows: float, window: Window) -> list[float]:
    """Sizes to try on a window of `rows` rows after those tried `before`, each larger by the same factor: as far as the
    window goes, or to a slot for each row where there is no longer one, or no larger one."""
    most = _MOST_SCALED_SLOTS / window.share
    last = rows if window.whole else min(most, rows)
    sizes = []
    size = before * _GROWTH or float(_LEAST_SLOTS)
    while size < last:
        sizes.append(size)
        size *= _GROWTH
    return [*sizes, last] if last > before and (window.whole or rows <= most) and len(window.ids) else sizes


def _finer(sizes: Floats, rates: Floats) -> tuple[Ints, Floats]:
    """The points, and more between them, on straight lines over the logarithm of the size, as hit rates nearly are."""
    logs = np.log(sizes)
    between = np.interp(np.arange((len(logs) - 1) * _BETWEEN + 1) / _BETWEEN, np.arange(len(logs)), logs)
    slots = np.unique(np.exp(between).round().astype(np.int64))
    return slots, np.interp(np.log(slots), logs, rates)


class _Trace:
    """The lookups of a window, its rows numbered from 0, out of so many lookups of all rows."""

    def __init__(self, window: Window, lookups: int) -> None:
        distinct, ids = np.unique(window.ids, return_inverse=True)
        self.rows = len(distinct)
        self._window, self._lookups = window, lookups
        self._ids = torch.from_numpy(ids.astype(np.int64))

    def hit_rate(self, slots: int, policy: str) -> float:
        """Of the second half, with so many slots."""
        cache = SlotCache([self.rows], [slots], policy=policy)
        edges = self._steps(max(1, min(slots // _STEPS_A_CACHE, _LONGEST_STEP))).tolist()
        counted = edges[(len(edges) - 1) // 2]
        missed = 0
        for first, stop in itertools.pairwise(edges):
            absent = _serve(cache, self._ids[first:stop])
            missed += absent if first >= counted else 0
        expected = (self._lookups - int(self._window.places[counted])) * self._window.share
        return float(np.clip(1.0 - missed / max(1.0, expected), 0.0, 1.0))

    def _steps(self, least: int) -> Ints:
        """Where the latest steps begin, and the end: batches, small ones taken together to `least` lookups and more."""
        batches = self._window.batches
        count = len(batches)
        starts = np.append(np.flatnonzero(np.diff(batches, prepend=-1)), count)
        far_enough = starts[np.searchsorted(starts, np.arange(0, count, least))]
        return np.unique(np.append(far_enough, [0, count]))[-_MOST_STEPS - 1 :]


def _serve(cache: SlotCache, ids: Tensor) -> int:
    """One batch, as training and serving do it; returns its misses."""
    found = cache.lookup(ids)
    absent = torch.unique(ids[found == 0])
    if absent.numel():
        here = found[found > 0].to(torch.int64)
        cache.pin(here, 1)
        # What does not fit is read past the slots.
        with contextlib.suppress(CacheFullError):
            cache.commit(cache.reserve(0, absent))
        cache.pin(here, -1)
    # What a batch brings in was not read before.
    cache.touch(0, found)
    return absent.numel()


__all__ = ["replayed"]
