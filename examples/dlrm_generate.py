"""Makes a day of clicks like Criteo's: skewed as real tables are, in the order of time, with something to learn.

Every table is asked for once a sample. Its rows are reused as in `dlrm_popularity`, over the whole day; a table with
fewer rows than that takes has the same accesses, hashed to its rows. How far that is from the published histogram, as
the part of the distinct rows, and of the lookups, that would have to change buckets (`Reuse.distance`, which a test
repeats):

- a day of 2**20 samples, in tables with rows enough: 0.3 % and about 1 % (0.6 to 1.4 % over seeds). These are six of
  the 26, those of 286,181 rows and more; the published statistics are of as many lookups a table.
- shorter days lack the hottest rows: 0.3 % and about 8 % of 2**17 samples, 0.3 % and 16 % of 2**15.
- small tables are hotter, as they must be: all 26 together are 5 % and 38 % away.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from dlrm_day import CATEGORICAL, DENSE, DayWriter
from dlrm_popularity import Counts, fold, reuse_counts

CARDINALITIES = (
    *(1_460, 583, 10_131_227, 2_202_608, 305, 24, 12_517, 633, 3, 93_145, 5_683, 8_351_593, 3_194, 27, 14_992),
    *(5_461_306, 10, 5_652, 2_173, 4, 7_046_547, 18, 15, 286_181, 105, 142_572),
)
"""Distinct values of the 26 features of Criteo's Kaggle data set, as published with DLRM."""

_BLOCK = 1 << 17
_TRENDING, _TREND_DAYS, _TREND_PART = 0.5, 0.04, 1 / 64
"""Half of the rows are asked for within about two hours, those that take more than a part of the lookups excepted."""

_CLICKS = 0.26
"""Share of samples that are clicks, about that of Criteo's Kaggle data set."""
_OF_IDS, _OF_PAIRS, _OF_DENSE = 1.6, 0.5, 0.5
"""Standard deviations of the parts of the planted log-odds."""

Floats = npt.NDArray[np.float32]


def generate_day(directory: Path, samples: int, most_rows: tuple[int, ...], seed: int) -> None:
    """Write a day to `directory`, which must not exist.

    Labels are drawn from log-odds that add up an effect of every row, products of the effects of neighbouring
    features, and a linear function of the dense features.

    Args:
        samples: of the day, in the order of time.
        most_rows: of each table, [26]; it has as many as the feature has values, but at most these.
        seed: of everything; equal arguments make equal days.
    """
    rows = tuple(min(most, values) for most, values in zip(most_rows, CARDINALITIES, strict=True))
    ids = np.empty((CATEGORICAL, samples), dtype=np.int32)
    effects = np.empty((CATEGORICAL, samples), dtype=np.float32)
    unfolded = []
    # From the biggest on, so that those with rows enough share the hottest rows among them.
    for number, column in enumerate(sorted(range(CATEGORICAL), key=lambda c: -rows[c])):
        rng = np.random.default_rng((seed, column))
        counts = reuse_counts(samples, number, rng)
        if counts.size <= rows[column]:
            unfolded.append(column)
        ids[column] = _in_time(fold(counts, rows[column]), rows[column], rng)
        effects[column] = rng.standard_normal(rows[column], dtype=np.float32)[ids[column]]
    rng = np.random.default_rng((seed, CATEGORICAL))
    dense = _dense(samples, rng)
    labels = _labels(_log_odds(effects, dense, rng), rng)
    with DayWriter(directory) as writer:
        for first in range(0, samples, _BLOCK):
            block = slice(first, first + _BLOCK)
            writer.append(dense[block], ids[:, block].T, labels[block])
        writer.finish(rows, f"a generated day of {samples:,} samples, seed {seed}", tuple(sorted(unfolded)))


def _in_time(counts: Counts, rows: int, rng: np.random.Generator) -> npt.NDArray[np.int32]:
    """For every sample, the row asked for: [sum of counts] int32; which rows those are is a matter of chance."""
    asked = rng.permutation(rows)[: counts.size].astype(np.int32)
    trending = (rng.random(counts.size) < _TRENDING) & (counts <= _TREND_PART * counts.sum())
    around = np.repeat(np.where(trending, rng.random(counts.size, dtype=np.float32), np.nan), counts)
    near = (around + _TREND_DAYS * rng.standard_normal(around.size, dtype=np.float32)) % 1.0
    when = np.where(np.isnan(around), rng.random(around.size, dtype=np.float32), near)
    # Time above, row below: sorting such numbers is several times as fast as finding an order.
    keys = ((when * 2.0**31).astype(np.int64) << 32) | np.repeat(asked, counts)
    keys.sort()
    return (keys & 0xFFFFFFFF).astype(np.int32)


def _dense(samples: int, rng: np.random.Generator) -> Floats:
    """Counters as in Criteo's data: a part is missing, and they are seen on a logarithmic scale."""
    spread = 1.5 * rng.standard_normal((samples, DENSE), dtype=np.float32)
    counters = np.floor(np.exp(spread + np.linspace(0.0, 4.0, DENSE, dtype=np.float32)))
    missing = rng.random((samples, DENSE), dtype=np.float32) < np.linspace(0.0, 0.4, DENSE, dtype=np.float32)
    found: Floats = np.where(missing, np.float32(0.0), np.log1p(counters))
    return found


def _log_odds(effects: Floats, dense: Floats, rng: np.random.Generator) -> Floats:
    parts = (
        (_OF_IDS, rng.standard_normal(CATEGORICAL, dtype=np.float32) @ effects),
        (_OF_PAIRS, (effects[:-1] * effects[1:]).sum(0)),
        (_OF_DENSE, dense @ rng.standard_normal(DENSE, dtype=np.float32)),
    )
    return sum((scale * (part - part.mean()) / part.std() for scale, part in parts), np.zeros(1, np.float32))


def _labels(log_odds: Floats, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Clicks, as many as there are to be."""
    low, high = -20.0, 20.0
    for _ in range(40):
        shift = 0.5 * (low + high)
        chance = 1.0 / (1.0 + np.exp(-(log_odds + shift)))
        low, high = (shift, high) if chance.mean() < _CLICKS else (low, shift)
    return (rng.random(log_odds.size) < chance).astype(np.uint8)


__all__ = ["CARDINALITIES", "generate_day"]
