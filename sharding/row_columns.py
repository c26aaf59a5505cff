"""One part of the rows of a shard, weights or a state tensor, read and written a window of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from torchrec_turbossd.sharding.windows import step_rows, windows
from torchrec_turbossd.tables import TRAINING_TYPES, TableShard, weight_bytes
from torchrec_turbossd.tbe.training import TurboSSDTableBatchedEmbeddingBags


class RowSource(Protocol):
    """Rows of one shard as bytes, by local id."""

    @property
    def shard(self) -> TableShard:
        """What the rows are."""

    def read(self, ids: Tensor) -> Tensor:
        """Bytes of local `ids` [N] int64: [N, row_bytes] uint8 on the CPU."""

    def write(self, ids: Tensor, rows: Tensor) -> None:
        """Overwrite distinct local `ids` [N]."""


@dataclass(frozen=True)
class LiveRows:
    """The rows of table number `table` of a TBE, as training leaves them."""

    tbe: TurboSSDTableBatchedEmbeddingBags
    table: int

    @property
    def shard(self) -> TableShard:
        return self.tbe.shards[self.table]

    def read(self, ids: Tensor) -> Tensor:
        return self.tbe.read_rows(self.table, ids)

    def write(self, ids: Tensor, rows: Tensor) -> None:
        self.tbe.write_rows(self.table, ids, rows)


class RowColumns:
    """The weights (part 0) or an optimizer state tensor (part 1 and on) of a shard's rows.

    `row_shape` is `()` where the part is one number a row, else `(columns,)`.
    """

    def __init__(self, source: RowSource, part: int = 0) -> None:
        shard = source.shard
        widths = [weight_bytes(shard.cols, shard.table.data_type)]
        widths += [state.row_bytes(shard.cols) for state in shard.table.state]
        self.source, self.part = source, part
        self.rows = shard.rows
        self.dtype = TRAINING_TYPES[shard.table.data_type] if part == 0 else torch.float32
        flat = part > 0 and shard.table.state[part - 1].per_row
        self.row_shape: tuple[int, ...] = () if flat else (shard.cols,)
        self._start, self._row_bytes = sum(widths[:part]), shard.row_bytes

    @property
    def name(self) -> str:
        """The part in words."""
        table = self.source.shard.table
        return f"{table.state[self.part - 1].name if self.part else 'weights'} of table {table.name!r}"

    def _bytes_of(self, cols: range) -> slice:
        """Where these columns are in a row's bytes."""
        width = self.dtype.itemsize
        return slice(self._start + cols.start * width, self._start + cols.stop * width)

    def _shape(self, count: int, cols: range) -> list[int]:
        return [count, len(cols)] if self.row_shape else [count]

    def read(self, ids: Tensor | range, cols: range) -> Tensor:
        """Columns `cols` of local `ids` [N]: [N, columns], or [N], on the CPU."""
        out = torch.empty(self._shape(len(ids), cols), dtype=self.dtype)
        for first, count in windows(len(ids), step_rows(self._row_bytes)):
            part = ids[first : first + count]
            wanted = torch.arange(part.start, part.stop) if isinstance(part, range) else part
            rows = self.source.read(wanted)[:, self._bytes_of(cols)]
            out[first : first + count] = rows.contiguous().view(self.dtype).view(self._shape(count, cols))
        return out

    def write(self, first: int, cols: range, values: Callable[[int, int], Tensor], count: int) -> None:
        """Overwrite columns `cols` of rows [first, first + count); the row's other bytes are kept.

        Rows that have these values already are left alone: those never written go on taking no disk.

        Args:
            values: called with (place among these rows, number of rows) for each window.
        """
        where = self._bytes_of(cols)
        for at, size in windows(count, step_rows(self._row_bytes)):
            ids = torch.arange(first + at, first + at + size)
            body = values(at, size).detach().to(device="cpu", dtype=self.dtype).reshape(size, -1).contiguous()
            rows = self.source.read(ids)
            changed = (rows[:, where] != body.view(torch.uint8)).any(1)
            rows[:, where] = body.view(torch.uint8)
            if bool(changed.any()):
                self.source.write(ids[changed], rows[changed])


__all__ = ["LiveRows", "RowColumns", "RowSource"]
