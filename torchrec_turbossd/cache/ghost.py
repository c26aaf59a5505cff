"""Ids of rows that left lately, kept as fingerprints: a table of one cell a slot, in which the newest id wins.

Of an id nothing but sixteen bits is kept, in the cell that its hash names, until another id takes that cell: on average
after as many ids as there are cells, which is the length of the list that this stands for. An id that never left is
taken for one that did about once in 65,000 times.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Odd factors of SplitMix64 (G. Steele, D. Lea, C. Flood, OOPSLA 2014).
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_HALF = np.uint64(32)


class Ghost:
    """Lately gone ids. Batches are [N] int64 and need not be distinct.

    Args:
        cells: 1 to 2**32.
    """

    def __init__(self, cells: int) -> None:
        self._cells = np.zeros(cells, dtype=np.uint16)
        self._count = np.uint64(cells)

    @property
    def nbytes(self) -> int:
        return self._cells.nbytes

    def add(self, ids: NDArray[np.int64]) -> None:
        """Remember ids."""
        at, prints = self._places(ids)
        self._cells[at] = prints

    def take(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of `ids` are remembered, and forget those: [N] bool."""
        at, prints = self._places(ids)
        known: NDArray[np.bool_] = self._cells[at] == prints
        self._cells[at[known]] = 0
        return known

    def _places(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.uint16]]:
        """Cells and fingerprints of ids, independent of each other; no fingerprint is 0."""
        mixed = ids.view(np.uint64) * _FIRST
        mixed ^= mixed >> _HALF
        mixed *= _SECOND
        prints = np.maximum(mixed.astype(np.uint16), 1)
        # The upper half as a fraction of the cells: no division.
        mixed >>= _HALF
        mixed *= self._count
        mixed >>= _HALF
        return mixed.view(np.int64), prints


__all__ = ["Ghost"]
