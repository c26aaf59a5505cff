"""How popular a table's rows are, estimated from a sample of its lookups."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from torchrec_turbossd.sizing.sample import AccessSample, Ints

_SURE_COUNT = 16

Floats = npt.NDArray[np.float64]


def popularity(sample: AccessSample) -> tuple[Ints, Floats]:
    """Groups of equally popular rows, the most popular first: their sizes [G], which add up to the table's rows, and
    the weight of each row [G].

    Rows seen often in the window of all rows count as there; the rest of the weight goes to the other rows as the
    window that spans the whole sample has them, each standing for those that were left out.

    Rows that the sample lacks are not impossible. Every row seen gives up the same part d of its count to them,
    d = n1 / (n1 + 2 n2) with n1 and n2 rows seen once and twice, so that hot rows keep their chance and cold ones
    do not look hotter than they are (absolute discounting: H. Ney, U. Essen, R. Kneser, "On structuring
    probabilistic dependences in stochastic language modelling", 1994). d stays small enough that no row unseen
    becomes likelier than one seen once.
    """
    windows = sample.windows()
    latest, longest = windows[0], windows[-1]
    if latest.whole:
        return _discounted(*_counted(latest.ids), sample.rows)
    ids, counts = np.unique(latest.ids, return_counts=True)
    sure = counts >= _SURE_COUNT
    hot, hot_counts = ids[sure], np.sort(counts[sure])[::-1]
    others = longest.ids[~np.isin(longest.ids, hot)]
    rest = 1.0 - hot_counts.sum() / counts.sum()
    if not len(others) or not rest:
        return _discounted(*_counted(latest.ids), sample.rows)
    seen, times = _counted(others)
    stood_for = _stand_for(seen, longest.share, sample.rows - len(hot))
    sizes, weights = _discounted(stood_for, times, sample.rows - len(hot))
    scaled = weights * (rest / float(sizes @ weights))
    sizes, weights = np.append(np.ones(len(hot), np.int64), sizes), np.append(hot_counts / counts.sum(), scaled)
    order = np.argsort(-weights, kind="stable")
    return sizes[order], weights[order]


def _counted(ids: Ints) -> tuple[Ints, Ints]:
    """How many rows were seen how often, the most often first."""
    counts, sizes = np.unique(np.unique(ids, return_counts=True)[1], return_counts=True)
    return sizes[::-1].astype(np.int64), counts[::-1].astype(np.int64)


def _stand_for(sizes: Ints, share: float, rows: int) -> Ints:
    """Rows of each count in the whole table, of which a share was sampled: at least as many as were seen."""
    scaled = np.maximum((sizes / share).round().astype(np.int64), 1)
    over = int(scaled.sum()) - rows
    # The coldest are the most, and those of which least is known.
    for group in reversed(range(len(scaled))):
        if over <= 0:
            break
        less = min(over, int(scaled[group] - sizes[group]))
        scaled[group] -= less
        over -= less
    return scaled


def _discounted(sizes: Ints, counts: Ints, rows: int) -> tuple[Ints, Floats]:
    """The groups, and behind them one of the rows unseen."""
    seen = int(sizes.sum())
    unseen = rows - seen
    if not unseen:
        return sizes, counts.astype(np.float64)
    once, twice = (int(sizes[counts == times].sum()) for times in (1, 2))
    part = min(once / max(1, once + 2 * twice), unseen / rows)
    return np.append(sizes, unseen), np.append(counts - part, part * seen / unseen)


__all__ = ["popularity"]
