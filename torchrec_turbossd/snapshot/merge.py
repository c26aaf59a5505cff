"""The rows of one table out of all parts of a snapshot, ascending, joined by columns, a window at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_turbossd.errors import SnapshotError
from torchrec_turbossd.rows import initial_rows
from torchrec_turbossd.snapshot.manifest import Manifest, ShardRange
from torchrec_turbossd.store.contract import Rows, RowStore
from torchrec_turbossd.tables import TRAINING_TYPES, TableShard, TableSpec, weight_bytes

_WINDOW_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Source:
    """One shard of a table: where its rows are, and under which key."""

    store: RowStore
    key: str
    range: ShardRange


def check_cover(manifest: Manifest, table: TableSpec) -> None:
    """Raise `SnapshotError` unless the shards of all parts hold each cell of `table` exactly once.

    A quantised row has one scale for all of its columns, so that such a table must not be cut by columns.
    """
    shards = [s for part in manifest.parts for s in part.shards.values() if s.table == table.name]
    columns = sorted({(s.col_offset, s.cols) for s in shards})
    at = 0
    for start, cols in columns:
        if start != at:
            raise SnapshotError(f"table {table.name!r}: the snapshot's parts do not hold columns {at} to {start} once")
        at += cols
        _check_rows(table, [s for s in shards if s.col_offset == start])
    if at != table.dim:
        raise SnapshotError(f"table {table.name!r}: the snapshot's parts hold {at} of {table.dim} columns")
    if len(columns) > 1 and table.data_type not in TRAINING_TYPES:
        raise SnapshotError(f"table {table.name!r}: {table.data_type} rows cannot be joined from column shards")


def _check_rows(table: TableSpec, shards: Sequence[ShardRange]) -> None:
    at = 0
    for shard in sorted(shards, key=lambda s: s.row_offset):
        if shard.row_offset != at:
            raise SnapshotError(
                f"table {table.name!r}: the snapshot's parts do not hold rows {at} to {shard.row_offset} exactly once"
            )
        at += shard.rows
    if at != table.rows:
        raise SnapshotError(f"table {table.name!r}: the snapshot's parts hold {at} of {table.rows} rows")


def merged_weights(table: TableSpec, sources: Sequence[Source]) -> Iterator[Rows]:
    """Written rows of `table`: (global ids [N] ascending, weights [N, weight bytes] uint8), without state.

    A row that one column shard holds and another lacks was never written there: the rule of such rows gives its value.

    Args:
        sources: shards that together cover the table (`check_cover`).
    """
    columns = sorted({(s.range.col_offset, s.range.cols) for s in sources})
    streams = [
        _Stream(table, [s for s in sources if s.range.col_offset == start], start, cols) for start, cols in columns
    ]
    while True:
        # Up to here every stream is complete in memory.
        ends = [s.last for s in streams if s.last is not None]
        if not ends:
            return
        end = min(ends)
        taken = [s.take(end) for s in streams]
        ids = taken[0][0] if len(taken) == 1 else torch.unique(torch.cat([each for each, _ in taken]))
        yield ids, torch.cat([s.spread(ids, *part) for s, part in zip(streams, taken, strict=True)], dim=1)


class _Stream:
    """Weights of one range of columns, ascending by row, of which a window is in memory."""

    def __init__(self, table: TableSpec, sources: Sequence[Source], start: int, cols: int) -> None:
        self._shard = TableShard(table=table, rows=table.rows, col_offset=start, cols=cols)
        self._width = weight_bytes(cols, table.data_type)
        window = max(1, _WINDOW_BYTES // table.row_bytes_of(cols))
        ordered = sorted(sources, key=lambda s: s.range.row_offset)
        self._windows = (part for s in ordered for part in s.store.scan(s.key, window=window))
        self._ids, self._rows = torch.empty(0, dtype=torch.int64), torch.empty(0, self._width, dtype=torch.uint8)

    @property
    def last(self) -> int | None:
        """The last id in memory, after reading on where there is none; None at the end of the stream."""
        if self._ids.numel() == 0:
            ids, rows = next(self._windows, (None, None))
            if ids is None or rows is None:
                return None
            self._ids, self._rows = ids, rows[:, : self._width]
        return int(self._ids[-1])

    def take(self, end: int) -> Rows:
        """Take what is in memory up to id `end`."""
        count = int(torch.searchsorted(self._ids, end, right=True))
        taken = self._ids[:count], self._rows[:count]
        self._ids, self._rows = self._ids[count:], self._rows[count:]
        return taken

    def spread(self, ids: Tensor, held: Tensor, rows: Tensor) -> Tensor:
        """Rows of all `ids`, of which `held` have `rows`."""
        if held.numel() == ids.numel():
            return rows
        whole = initial_rows(self._shard, ids)[:, : self._width]
        whole[torch.searchsorted(ids, held)] = rows
        return whole


__all__ = ["Source", "check_cover", "merged_weights"]
