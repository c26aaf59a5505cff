"""Timing two things side by side, so that a noisy machine disturbs both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p999": 99.9, "max": 100.0}


@dataclass(frozen=True)
class Pair:
    """Seconds, or rates, of ours and of the peer's, round by round."""

    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def our_median(self) -> float:
        return statistics.median(self.ours)

    @property
    def their_median(self) -> float:
        """Such that the ratio of the medians is the median of the rounds' ratios: what disturbs a whole round
        disturbs both of it."""
        return self.our_median / self.ratio

    @property
    def ratio(self) -> float:
        return statistics.median(a / b for a, b in zip(self.ours, self.theirs, strict=True))

    def details(self) -> dict[str, Any]:
        return {"ours by round": list(self.ours), "theirs by round": list(self.theirs)}


def interleave(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> Pair:
    """Measure both `rounds` times, in turns and the first alternating; each call returns its figure."""
    mine: list[float] = []
    others: list[float] = []
    for turn in range(rounds):
        order = [(mine, ours), (others, theirs)]
        for held, measure in order if turn % 2 == 0 else reversed(order):
            held.append(measure())
    return Pair(tuple(mine), tuple(others))


def seconds_of(call: Callable[[int], object], count: int) -> float:
    """Mean seconds of `call(0)` to `call(count - 1)`."""
    start = time.perf_counter()
    for i in range(count):
        call(i)
    return (time.perf_counter() - start) / count


def percentiles(seconds: Sequence[float] | npt.NDArray[np.float64]) -> dict[str, float]:
    """Percentiles of latencies in milliseconds, and how many there were."""
    array = np.asarray(seconds) * 1e3
    if not array.size:
        return {"count": 0}
    return {name: float(np.percentile(array, q)) for name, q in PERCENTILES.items()} | {"count": int(array.size)}


__all__ = ["PERCENTILES", "Pair", "interleave", "percentiles", "seconds_of"]
