"""One bit for each row of a table, in memory."""

from __future__ import annotations

import numpy as np
from torch import Tensor


class RowBits:
    """The bits of one table. Any number of threads may ask while one at a time sets.

    Memory: an eighth of a byte for each row, of which the system gives what is touched.

    Args:
        rows: rows of the table. Ids beyond have no bit: they count as set.
        nbytes: of the bits; at least an eighth of `rows`.
    """

    def __init__(self, rows: int, nbytes: int | None = None) -> None:
        self.rows = rows
        self._bits = np.zeros(-(-rows // 8) if nbytes is None else nbytes, dtype=np.uint8)
        self._any = False

    def may_hold(self, ids: Tensor) -> np.ndarray | None:
        """Which of `ids` [N] int64 are set, [N] bool; None when none of them."""
        wanted = ids.numpy()
        beyond = wanted >= self.rows
        if not self._any:
            return beyond if beyond.any() else None
        inside = np.where(beyond, 0, wanted)
        bits = self._bits[inside >> 3] >> (inside & 7).astype(np.uint8)
        held: np.ndarray = (bits & 1).astype(np.bool_) | beyond
        return held if held.any() else None

    def set(self, ids: Tensor) -> np.ndarray:
        """Set the bits of `ids` [N] int64; returns the distinct bytes that hold them."""
        distinct = np.unique(ids.numpy())
        distinct = distinct[distinct < self.rows]
        places: np.ndarray = distinct >> 3
        if not distinct.size:
            return places
        starts = np.flatnonzero(np.diff(places, prepend=-1))
        values = np.left_shift(1, distinct & 7).astype(np.uint8)
        places, new = places[starts], np.bitwise_or.reduceat(values, starts)
        self._bits[places] |= new
        self._any = True
        return places


__all__ = ["RowBits"]
