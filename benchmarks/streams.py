"""Streams of row ids: Zipf, Zipf whose hot rows change, and traces from files."""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.figures import SkipRow

Ints = npt.NDArray[np.int64]


class Zipf:
    """Ids of a table of `rows` rows, the row of rank r asked for in proportion to r ** -alpha.

    `seed` decides which row has which rank; `draw_seed` what is drawn, where one popularity has several streams.
    """

    def __init__(self, rows: int, alpha: float, seed: int, draw_seed: int | None = None) -> None:
        self._random = np.random.default_rng(seed)
        self._edges = np.cumsum(np.arange(1, rows + 1, dtype=np.float64) ** -alpha)
        self._edges /= self._edges[-1]
        self.ids = self._random.permutation(rows)
        if draw_seed is not None:
            self._random = np.random.default_rng([seed, draw_seed])

    def ranks(self, count: int) -> Ints:
        """Ranks from 0, most popular first."""
        return np.searchsorted(self._edges, self._random.random(count)).astype(np.int64)

    def draw(self, count: int) -> Ints:
        """[count] int64 ids."""
        drawn: Ints = self.ids[self.ranks(count)]
        return drawn

    def shuffle(self, share: float) -> None:
        """Let a random `share` of the rows exchange their ranks."""
        moved = np.flatnonzero(self._random.random(self.ids.size) < share)
        self.ids[moved] = self.ids[self._random.permutation(moved)]


def drifting(rows: int, alpha: float, seed: int, count: int) -> Ints:
    """Zipf ids of which a tenth of all ranks change hands twenty times."""
    stream = Zipf(rows, alpha, seed)
    parts = []
    for _ in range(20):
        parts.append(stream.draw(count // 20))
        stream.shuffle(0.1)
    return np.concatenate(parts)


def read_trace(path: Path) -> Ints:
    """The ids in a file, in order and renumbered from 0: the last whole number of each line; `.xz` is unpacked.

    Lines that end in anything else (headers, comments) are left out.
    """
    if not path.is_file():
        raise SkipRow(f"no trace at {path}")
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        last = (line.split()[-1:] for line in file)
        ids = np.array([int(word[0]) for word in last if word and word[0].isdigit()], dtype=np.int64)
    if not ids.size:
        raise SkipRow(f"{path} holds no line that ends in a whole number")
    renumbered: Ints = np.unique(ids, return_inverse=True)[1].astype(np.int64)
    return renumbered


def bag_offsets(tables: int, bags: int, length: int) -> Tensor:
    """TBE offsets of `tables` x `bags` bags of `length` ids each."""
    return torch.arange(0, tables * bags * length + 1, length)


def zipf_batches(
    rows: list[int], alpha: float, seed: int, *, count: int, bags: int, length: int, draw_seed: int | None = None
) -> Iterator[Tensor]:
    """`count` batches of ids in TBE convention, one feature for each table."""
    streams = [Zipf(n, alpha, seed + place, draw_seed) for place, n in enumerate(rows)]
    for _ in range(count):
        yield torch.from_numpy(np.concatenate([stream.draw(bags * length) for stream in streams]))


__all__ = ["Zipf", "bag_offsets", "drifting", "read_trace", "zipf_batches"]
