"""The row stores of a snapshot, opened to be read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from torchrec_turbossd.snapshot.manifest import Manifest, ShardRange
from torchrec_turbossd.snapshot.merge import Source
from torchrec_turbossd.store.checkpoint import clone_directory
from torchrec_turbossd.store.contract import RowStore
from torchrec_turbossd.store.layered import LayeredRowStore
from torchrec_turbossd.store.rocks import RocksRowStore


def open_parts(
    manifest: Manifest,
    path: Path,
    scratch: Path,
    stack: ExitStack,
    wanted: Callable[[ShardRange], bool] = lambda _: True,
) -> list[Source]:
    """The wanted shards of all parts, readable until `stack` ends.

    Parts are cloned to `scratch` first, because opening a store writes to its directory; parts without a wanted shard
    are left alone.

    Args:
        path: of the snapshot. scratch: an empty directory, best on the snapshot's file system, where clones are links.

    Raises:
        StoreFullError: too little space for a clone that cannot be links; found before it is copied.
        StoreError: a part cannot be cloned or opened.
    """
    sources = []
    for part in manifest.stores:
        shards = {key: shard for key, shard in part.shards.items() if wanted(shard)}
        if not shards:
            continue
        clone_directory(path / part.directory, scratch / part.directory)
        sizes = {key: manifest.table(s.table).row_bytes_of(s.cols) for key, s in part.shards.items()}
        store: RowStore
        if part.store == "layered":
            rows = {key: manifest.table(s.table).rows for key, s in part.shards.items()}
            store = LayeredRowStore(scratch / part.directory, sizes, rows, create=False)
        else:
            store = RocksRowStore(scratch / part.directory, sizes, create=False, read_only=True)
        stack.callback(store.close)
        sources += [Source(store=store, key=key, range=shard) for key, shard in shards.items()]
    return sources


__all__ = ["open_parts"]
