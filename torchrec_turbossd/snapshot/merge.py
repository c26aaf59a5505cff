"""The rows of a shard out of all parts of a snapshot, ascending, joined and cut by columns, a window at a time.

Weights and state of an element go where the element goes. A row-wise state, one number for each row of a column shard,
has no exact place in other columns: a shard takes the mean over the saved shards that it overlaps, weighted by the
columns that it shares with each. Row-wise Adagrad and row-wise Adam add up means of squared gradients over a shard's
columns, and the weighted mean of such sums is what a shard of those columns would have added up for the same gradients.
So joining gives the state of the whole row, cutting gives every piece that of the row, and where a range is as it was
saved the state is too.
"""

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


def merged_rows(table: TableSpec, sources: Sequence[Source], target: TableShard) -> Iterator[Rows]:
    """Written rows of `target`, put together from the shards that hold some of its cells.

    A row that one column shard holds and another lacks was never written there: the rule of such rows gives its value,
    and its state is zero.

    Args:
        table: as it was saved.
        sources: shards of it that together cover the target (`check_cover`); others are left alone.
        target: a shard of the same table, of which state is left out where its `table` has none.

    Yields:
        (global ids [N] int64 ascending, rows [N, row bytes of the target] uint8).
    """
    near = [s for s in sources if overlaps(s.range, target)]
    columns = sorted({(s.range.col_offset, s.range.cols) for s in near})
    streams = [_Stream(table, [s for s in near if s.range.col_offset == start], target) for start, _ in columns]
    while True:
        # Up to here every stream is complete in memory.
        ends = [s.last for s in streams if s.last is not None]
        if not ends:
            return
        end = min(ends)
        taken = [s.take(end) for s in streams]
        ids = taken[0][0] if len(taken) == 1 else torch.unique(torch.cat([each for each, _ in taken]))
        yield ids, _joined(streams, [s.spread(ids, *part) for s, part in zip(streams, taken, strict=True)], target)


def overlaps(saved: ShardRange, target: TableShard) -> bool:
    """Whether a saved shard holds cells of `target`."""
    rows = min(saved.row_offset + saved.rows, target.row_offset + target.rows) - max(
        saved.row_offset, target.row_offset
    )
    cols = min(saved.col_offset + saved.cols, target.col_offset + target.cols) - max(
        saved.col_offset, target.col_offset
    )
    return saved.table == target.table.name and rows > 0 and cols > 0


class _Stream:
    """Rows of one range of columns, ascending, of which a window is in memory."""

    def __init__(self, table: TableSpec, sources: Sequence[Source], target: TableShard) -> None:
        saved = sources[0].range
        self.shard = TableShard(table=table, rows=table.rows, col_offset=saved.col_offset, cols=saved.cols)
        window = max(1, _WINDOW_BYTES // self.shard.row_bytes)
        first, self._stop = target.row_offset, target.row_offset + target.rows
        ordered = sorted(sources, key=lambda s: s.range.row_offset)
        self._windows: Iterator[Rows] = (part for s in ordered for part in s.store.scan(s.key, first, window))
        self._ids, self._rows = torch.empty(0, dtype=torch.int64), torch.empty(0, self.shard.row_bytes).byte()

    @property
    def last(self) -> int | None:
        """The last id in memory, after reading on where there is none; None at the end of the stream."""
        while self._ids.numel() == 0:
            ids, rows = next(self._windows, (None, None))
            if ids is None or rows is None:
                return None
            inside = int(torch.searchsorted(ids, self._stop))
            if inside < ids.numel():
                self._windows = iter(())
            self._ids, self._rows = ids[:inside], rows[:inside]
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
        whole = initial_rows(self.shard, ids)
        whole[torch.searchsorted(ids, held)] = rows
        return whole


@dataclass(frozen=True)
class _Piece:
    """What a stream gives to a target: its columns [first, stop), counted within the stream, and its rows."""

    shard: TableShard
    first: int
    stop: int
    rows: Tensor

    def elements(self, start: int, size: int) -> Tensor:
        """The piece's columns of an array of elements of `size` bytes that starts at byte `start` of a row."""
        return self.rows[:, start + self.first * size : start + self.stop * size]


def _joined(streams: Sequence[_Stream], rows: Sequence[Tensor], target: TableShard) -> Tensor:
    """Rows of `target` out of those of the streams that it overlaps, in order of columns."""
    shards = [s.shard for s in streams]
    if len(shards) == 1 and (shards[0].col_offset, shards[0].cols) == (target.col_offset, target.cols):
        return rows[0][:, : target.row_bytes]
    pieces = []
    for shard, each in zip(shards, rows, strict=True):
        first = max(target.col_offset, shard.col_offset) - shard.col_offset
        stop = min(target.col_offset + target.cols, shard.col_offset + shard.cols) - shard.col_offset
        pieces.append(_Piece(shard, first, stop, each))
    element = weight_bytes(1, target.table.data_type)
    parts = [p.elements(0, element) for p in pieces]
    at = [weight_bytes(p.shard.cols, target.table.data_type) for p in pieces]
    for state in target.table.state:
        if state.per_row:
            parts.append(_mean(pieces, at))
        else:
            parts += [p.elements(start, 4) for p, start in zip(pieces, at, strict=True)]
        at = [start + state.row_bytes(p.shard.cols) for p, start in zip(pieces, at, strict=True)]
    return torch.cat(parts, dim=1)


def _mean(pieces: Sequence[_Piece], at: Sequence[int]) -> Tensor:
    """The float32 at byte `at` of each row, weighted by columns: [N, 4] uint8."""
    total = torch.zeros(pieces[0].rows.shape[0], dtype=torch.float64)
    for piece, start in zip(pieces, at, strict=True):
        values = piece.rows[:, start : start + 4].contiguous().view(torch.float32).flatten()
        # In float64, where equal numbers have exactly themselves as their mean.
        total += values.double() * (piece.stop - piece.first)
    return (total / sum(p.stop - p.first for p in pieces)).float().unsqueeze(1).contiguous().view(torch.uint8)


__all__ = ["Source", "check_cover", "merged_rows", "overlaps"]
