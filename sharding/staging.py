"""State dicts that stand still while training goes on: what `torch.distributed.checkpoint.async_save` saves."""

from __future__ import annotations

import glob
import shutil
import uuid
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.staging import AsyncStager, BlockingAsyncStager

from torchrec_turbossd.errors import UnsupportedError
from torchrec_turbossd.sharding.lazy_rows import LazyRows
from torchrec_turbossd.sharding.lazy_sharded import LazyShardedTensor
from torchrec_turbossd.sharding.row_columns import LiveRows, RowColumns
from torchrec_turbossd.store.contract import RowStore
from torchrec_turbossd.store.known_rows import KnownRowsStore
from torchrec_turbossd.store.rocks import RocksOptions, RocksRowStore
from torchrec_turbossd.store.write_back import WriteBackStore
from torchrec_turbossd.tables import TableShard
from torchrec_turbossd.tbe.stored import stored_rows

_ALIVE: set[Path] = set()
"""Directories of checkpoints that this process still reads."""


class _Checkpoint:
    """A store as it was, in hard links beside the live one; they go when nobody needs them any more."""

    def __init__(self, live: RowStore) -> None:
        # The live store of training answers from memory what its database has yet to take, or cannot have.
        source = live
        while isinstance(source, WriteBackStore | KnownRowsStore):
            source = source.inner
        if not isinstance(source, RocksRowStore):
            raise UnsupportedError(f"rows in a {type(live).__name__} cannot be staged; save with dcp.save instead")
        name = f".{source.path.name}.staged-"
        _remove_stale(source.path.parent, name)
        path = source.path.with_name(name + uuid.uuid4().hex[:12])
        _ALIVE.add(path)
        try:
            live.checkpoint(path)
            self.store = RocksRowStore(
                path, live.row_bytes, create=False, read_only=True, options=RocksOptions(block_cache_bytes=1 << 20)
            )
        except BaseException:
            _remove(path)
            raise
        self.remove = weakref.finalize(self, _close, self.store, path)


def _close(store: RocksRowStore, path: Path) -> None:
    store.close()
    _remove(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    _ALIVE.discard(path)


def _remove_stale(parent: Path, name: str) -> None:
    """Remove what a process left that ended while it saved: nobody else stages here, because stores are locked."""
    for found in parent.glob(f"{glob.escape(name)}*"):
        if found not in _ALIVE:
            shutil.rmtree(found, ignore_errors=True)


@dataclass(frozen=True)
class StagedRows:
    """The rows of a shard as they were when they were staged."""

    shard: TableShard
    checkpoint: _Checkpoint

    def read(self, ids: Tensor) -> Tensor:
        return stored_rows(self.checkpoint.store, self.shard, ids)

    def write(self, ids: Tensor, rows: Tensor) -> None:
        raise UnsupportedError(f"table {self.shard.table.name!r}: staged rows cannot be written; load into the model")


class TurboSSDStager(AsyncStager):
    """Stages tables on SSD for `dcp.async_save(state, async_stager=TurboSSDStager(), ...)` by hard links.

    `stage` writes changed rows to SSD and links the files, so that it takes about as long as a flush, and no memory;
    the save then reads rows window by window beside training. TorchRec's and torch's own stagers copy whole shards to
    memory instead. Other tensors are copied to memory, as those do. Links hold disk space of rows that training
    overwrites until the save has ended.

    One stager serves any number of saves, in threads (not `AsyncCheckpointerType.PROCESS`). `async_save` needs a
    process group of its own that works on the CPU, as its documentation says.
    """

    _synchronize_after_execute = False

    def __init__(self) -> None:
        self._staged: weakref.WeakSet[_Checkpoint] = weakref.WeakSet()
        self._others = BlockingAsyncStager()

    def stage(self, state_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """`state_dict` as it is now: a copy that later training does not change.

        Raises `StoreError` when a disk fails; then nothing is left behind.
        """
        live = [rows._columns.source for rows in _lazy_rows(state_dict)]
        sources = [source for source in live if isinstance(source, LiveRows)]
        for tbe in {id(source.tbe): source.tbe for source in sources}.values():
            tbe.flush()
        stores = {id(store): store for store in map(_store_of, sources)}
        checkpoints = {key: _Checkpoint(store) for key, store in stores.items()}
        self._staged.update(checkpoints.values())

        def staged(rows: LazyRows) -> LazyRows:
            source = rows._columns.source
            if not isinstance(source, LiveRows):
                return rows
            kept = StagedRows(source.shard, checkpoints[id(_store_of(source))])
            return LazyRows(RowColumns(kept, rows._columns.part), rows._rows, rows._cols)

        made: dict[str, Any] = self._copy(state_dict, staged)
        return made

    def _copy(self, value: Any, staged: Any) -> Any:
        if isinstance(value, LazyShardedTensor):
            return value.with_rows(staged)
        if isinstance(value, LazyRows):
            return staged(value)
        if isinstance(value, Mapping):
            return {key: self._copy(part, staged) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(part, staged) for part in value)
        return self._others.stage({"": value})[""]

    def synchronize_staging(self) -> None:
        """Nothing: `stage` has ended when it returns."""

    def close(self) -> None:
        """Let go of everything staged; call it when no save is running any more."""
        for checkpoint in list(self._staged):
            checkpoint.remove()


def _store_of(source: LiveRows) -> RowStore:
    """The store that really holds the rows."""
    store = source.tbe.rows.store
    return next(s for s in getattr(store, "distinct", [store]) if source.shard.key in s.row_bytes)


def _lazy_rows(value: Any) -> Iterator[LazyRows]:
    if isinstance(value, LazyRows):
        yield value
    elif isinstance(value, LazyShardedTensor):
        for shard in value.local_shards():
            yield from _lazy_rows(shard.tensor)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _lazy_rows(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _lazy_rows(part)


__all__ = ["StagedRows", "TurboSSDStager"]
