"""What a row store says of rows, or the rule where it says nothing."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from torchrec_turbossd.rows import initial_rows
from torchrec_turbossd.tables import TableShard


class ReadableStore(Protocol):
    """The part of a row store that reading needs."""

    def read(self, table: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of `ids`: (rows, found)."""


def stored_rows(store: ReadableStore, shard: TableShard, ids: Tensor) -> Tensor:
    """Rows of local `ids` [N] int64 of a shard: the store's, or the rule's where none was ever written."""
    row_ids = ids + shard.row_offset
    rows, found = store.read(shard.key, row_ids)
    if not bool(found.all()):
        rows[~found] = initial_rows(shard, row_ids[~found])
    return rows


__all__ = ["ReadableStore", "stored_rows"]
