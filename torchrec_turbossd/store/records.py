"""Rows with a checksum each, over the row's bytes and its id, for many rows at once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_SERIAL_ITEMS = 32_000
"""Torch shares the work on more items than 32,768 between threads."""
_WINDOW_BYTES = 1 << 20
_SPREAD = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1


def _multipliers(count: int) -> Tensor:
    """Odd 32-bit numbers, one for each word: the upper halves of a SplitMix64 sequence (Steele, Lea, Flood 2014)."""
    values = []
    for i in range(1, count + 1):
        z = (i * _SPREAD) & _MASK64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
        value = ((z ^ (z >> 31)) >> 32) | 1
        values.append(value - (1 << 32) if value >= 1 << 31 else value)
    return torch.tensor(values, dtype=torch.int32)


class RecordForm:
    """A record is a row, zeros up to whole 32-bit words, and its checksum, one word; all little-endian.

    The checksum is the sum of (w ^ w >> 15) * m over the row's words and the two of its id, plus 1, modulo 2**32, with
    an odd multiplier m for each place: it changes with any one word, and differs between ids that share their upper
    half. The shift keeps flips of the same high bit in two words from cancelling.

    Args:
        row_bytes: bytes of one row.

    Attributes:
        words: 32-bit words of a row. stride: bytes of a record.
        chunk: records to check at once: few enough that torch does it in the calling thread, since many threads read
            at once, and within its core's cache. window: records to write at once.
    """

    def __init__(self, row_bytes: int) -> None:
        self.row_bytes = row_bytes
        self.words = -(-row_bytes // 4)
        self.stride = 4 * (self.words + 1)
        self.chunk = max(1, _SERIAL_ITEMS // (self.words + 1))
        self.window = max(1, _WINDOW_BYTES // self.stride)
        multipliers = _multipliers(self.words + 2)
        # The id's first, so that they are the same for rows of every width.
        self._of_id, self._of_row = multipliers[:2], multipliers[2:]

    def checksums(self, ids: Tensor, words: Tensor) -> Tensor:
        """Of rows [N, words] int32 of `ids` [N] int64: [N] int32."""
        of_ids = _mixed(ids.contiguous().view(torch.int32).view(-1, 2), self._of_id)
        return _mixed(words, self._of_row).add_(of_ids).add_(1)

    def pack(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Records [N, words + 1] int32 of rows [N, row_bytes] uint8."""
        records = np.zeros((ids.numel(), self.words + 1), dtype=np.int32)
        records.view(np.uint8)[:, : self.row_bytes] = rows.numpy()
        packed = torch.from_numpy(records)
        for first in range(0, ids.numel(), self.chunk):
            part = slice(first, first + self.chunk)
            packed[part, -1] = self.checksums(ids[part], packed[part, :-1])
        return packed

    def unpack(self, records: Tensor, ids: Tensor, rows: Tensor) -> int | None:
        """Copy rows out of records [N, words + 1] into `rows` [N, row_bytes] uint8.

        Returns the id of a row that is not what was written for it, or None.
        """
        right = self.checksums(ids, records[:, :-1]) == records[:, -1]
        if not bool(right.all()):
            return int(ids[~right][0])
        rows.numpy()[:] = records.numpy().view(np.uint8)[:, : self.row_bytes]
        return None


def _mixed(words: Tensor, multipliers: Tensor) -> Tensor:
    mixed = words >> 15
    # The shift repeats the sign; only the bits that came down count.
    mixed.bitwise_and_(0x1FFFF).bitwise_xor_(words).mul_(multipliers)
    return mixed.sum(1, dtype=torch.int32)


__all__ = ["RecordForm"]
