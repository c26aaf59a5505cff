"""Rows that a batch has read from the store for itself, kept current while it waits for its slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ReadRows:
    """Rows by table (local ids, on the CPU).

    Args:
        widths: bytes of a row of each table.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        self._ids = [torch.empty(0, dtype=torch.int64) for _ in widths]
        self._rows = [torch.empty(0, width, dtype=torch.uint8) for width in widths]

    def lacks(self, wanted: Sequence[Tensor]) -> list[Tensor]:
        """For each table the ids among `wanted` [N], ascending, that have not been read."""
        return [ids[~self._find(table, ids)[1]] if ids.numel() else ids for table, ids in enumerate(wanted)]

    def add(self, table: int, ids: Tensor, rows: Tensor) -> None:
        """`ids` [N], ascending and not there yet, and their rows."""
        if self._ids[table].numel():
            merged, order = torch.cat([self._ids[table], ids]).sort()
            ids, rows = merged, torch.cat([self._rows[table], rows])[order]
        self._ids[table], self._rows[table] = ids, rows

    def refresh(self, table: int, ids: Tensor, rows: Tensor) -> None:
        """Newer rows of distinct ids [N]; those that have not been read are passed over."""
        at, found = self._find(table, ids)
        if bool(found.any()):
            self._rows[table][at[found]] = rows[found]

    def rows(self, table: int, ids: Tensor) -> Tensor:
        """Rows of `ids` [N], all read: [N, row_bytes] uint8."""
        if ids.numel() == self._ids[table].numel():
            # Both ascending and distinct: the same.
            return self._rows[table]
        return self._rows[table][self._find(table, ids)[0]]

    @property
    def counts(self) -> list[int]:
        """How many rows of each table were read."""
        return [ids.numel() for ids in self._ids]

    def _find(self, table: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        have = self._ids[table]
        if not have.numel():
            return torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
        at = torch.searchsorted(have, ids).clamp_(max=have.numel() - 1)
        return at, have[at] == ids


__all__ = ["ReadRows"]
