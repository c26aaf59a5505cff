"""Rows on SSD as a tensor that reads and writes them a window at a time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, TensorProperties
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torch.utils._pytree import tree_map_only

from torchrec_turbossd.tables import TRAINING_TYPES, weight_bytes
from torchrec_turbossd.tbe.training import TurboSSDTableBatchedEmbeddingBags

_aten = torch.ops.aten
WINDOW_ROWS = 65536


class RowColumns:
    """One part of the rows of a shard: the weights (part 0) or an optimizer state tensor (part 1 and on)."""

    def __init__(self, tbe: TurboSSDTableBatchedEmbeddingBags, table: int, part: int = 0) -> None:
        shard = tbe.shards[table]
        widths = [weight_bytes(shard.cols, shard.table.data_type)]
        widths += [state.row_bytes(shard.cols) for state in shard.table.state]
        self.tbe, self.table = tbe, table
        self.start, self.stop = sum(widths[:part]), sum(widths[: part + 1])
        self.dtype = TRAINING_TYPES[shard.table.data_type] if part == 0 else torch.float32
        flat = part > 0 and shard.table.state[part - 1].per_row
        self.row_shape: tuple[int, ...] = () if flat else (shard.cols,)
        self.rows = shard.rows

    def read(self, first: int, count: int) -> Tensor:
        """Rows [first, first + count) as a plain tensor on the CPU."""
        rows = self.tbe.read_rows(self.table, torch.arange(first, first + count))
        return rows[:, self.start : self.stop].contiguous().view(self.dtype).view(count, *self.row_shape)

    def write(self, first: int, values: Tensor) -> None:
        """Overwrite rows from `first` on with `values` [N, ...]; the row's other parts are kept."""
        for at in range(0, values.shape[0], WINDOW_ROWS):
            part = values[at : at + WINDOW_ROWS]
            plain = part.materialise() if isinstance(part, LazyRows) else part.detach().cpu()
            ids = torch.arange(first + at, first + at + plain.shape[0])
            rows = self.tbe.read_rows(self.table, ids)
            body = plain.to(self.dtype).reshape(plain.shape[0], -1).contiguous()
            rows[:, self.start : self.stop] = body.view(torch.uint8)
            self.tbe.write_rows(self.table, ids, rows)


class LazyRows(Tensor):
    """Rows [first, first + count) of `RowColumns`, on the CPU.

    Slicing rows, `detach` and `copy_` into it stay lazy; any other operator reads the rows it is given. A window that
    is read does not follow later training.
    """

    _columns: RowColumns
    _first: int

    @staticmethod
    def __new__(cls, columns: RowColumns, first: int = 0, count: int | None = None) -> LazyRows:
        count = columns.rows - first if count is None else count
        made: LazyRows = torch.Tensor._make_wrapper_subclass(
            cls, [count, *columns.row_shape], dtype=columns.dtype, device=torch.device("cpu"), requires_grad=False
        )
        made._columns, made._first = columns, first
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        name = self._columns.tbe.shards[self._columns.table].table.name
        return f"LazyRows({name!r}, rows {self._first} to {self._first + self.shape[0] - 1}, {tuple(self.shape)})"

    def __deepcopy__(self, memo: Any) -> Tensor:
        # A copy must keep what the rows are now.
        return self.materialise()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialise().__reduce_ex__(protocol)

    def materialise(self) -> Tensor:
        """The rows as a plain tensor; the whole window is in memory then."""
        return self._columns.read(self._first, self.shape[0])

    def same_rows(self, other: Any) -> bool:
        """Whether `other` is a window on the very same rows."""
        if not isinstance(other, LazyRows) or self.shape != other.shape or self._first != other._first:
            return False
        mine, theirs = self._columns, other._columns
        return (mine.tbe, mine.table, mine.start) == (theirs.tbe, theirs.table, theirs.start)

    def _window(self, first: int, stop: int) -> LazyRows:
        return LazyRows(self._columns, self._first + first, max(0, stop - first))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else None
        if isinstance(target, LazyRows):
            if func is _aten.copy_.default:
                source = args[1]
                if not target.same_rows(source):
                    target._columns.write(target._first, source.expand(target.shape))
                return target
            if func in (_aten.detach.default, _aten.alias.default):
                return target._window(0, target.shape[0])
            if func is _aten.slice.Tensor and _is_row_slice(args):
                first, stop, _ = slice(args[2], args[3]).indices(target.shape[0]) if len(args) > 3 else (0, 0, 0)
                return target._window(first, stop)
            if func is _aten.view.default and _keeps_shape(target, args[1]):
                return target._window(0, target.shape[0])
            if func is _aten.is_pinned.default:
                return False
            if func._schema.is_mutable:
                return _in_windows(func, target, args, kwargs)
        plain = tree_map_only(LazyRows, LazyRows.materialise, (args, kwargs))
        return func(*plain[0], **plain[1])


def _is_row_slice(args: Sequence[Any]) -> bool:
    along_rows = len(args) < 2 or args[1] == 0
    return along_rows and len(args) > 3 and (len(args) < 5 or args[4] == 1)


def _keeps_shape(rows: LazyRows, shape: Sequence[int]) -> bool:
    wanted = list(shape)
    return wanted == list(rows.shape) or (rows.dim() == 2 and wanted == [-1, rows.shape[1]])


def _in_windows(func: Any, target: LazyRows, args: Any, kwargs: Any) -> LazyRows:
    """An in-place operator that works row by row (zero_, uniform_, fill_, ...), a window at a time."""
    plain_args, plain_kwargs = tree_map_only(LazyRows, LazyRows.materialise, (args[1:], kwargs))
    for first in range(0, target.shape[0], WINDOW_ROWS):
        window = target._window(first, min(first + WINDOW_ROWS, target.shape[0]))
        values = window.materialise()
        func(values, *plain_args, **plain_kwargs)
        window._columns.write(window._first, values)
    return target


def sharded_rows(
    local: Sequence[tuple[ShardMetadata, Tensor]],
    shards: Sequence[ShardMetadata],
    size: Sequence[int],
    dtype: torch.dtype,
    group: ProcessGroup | None,
) -> ShardedTensor:
    """A ShardedTensor over lazy rows.

    Args:
        local: this rank's (metadata, rows).
        shards: metadata of all shards; placements are taken to the CPU, where the rows are.
        size: of the whole tensor.
    """
    everywhere = [_on_cpu(shard) for shard in shards]
    held = [Shard(rows, next(m for m in everywhere if m.shard_offsets == mine.shard_offsets)) for mine, rows in local]
    metadata = EnumerableShardingSpec(everywhere).build_metadata(torch.Size(size), TensorProperties(dtype=dtype))
    return ShardedTensor._init_from_local_shards_and_global_metadata(held, metadata, process_group=group)


def _on_cpu(shard: ShardMetadata) -> ShardMetadata:
    copied = copy.deepcopy(shard)
    if copied.placement is not None:
        copied.placement._device = torch.device("cpu")
    return copied


__all__ = ["WINDOW_ROWS", "LazyRows", "RowColumns", "sharded_rows"]
