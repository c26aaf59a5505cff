"""Several row stores as one: each table's rows in the store that its directory names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from torchrec_turbossd.store.contract import Rows, RowStore


class RoutedStore(RowStore):
    """Tables spread over stores, for ranks with several SSDs.

    A `write` is atomic within each store, not across them. Closing it closes them all.

    Args:
        stores: the store of each table key.
    """

    def __init__(self, stores: Mapping[str, RowStore]) -> None:
        super().__init__({key: store.row_bytes[key] for key, store in stores.items()})
        self._stores = dict(stores)

    def replace(self, stores: Mapping[str, RowStore]) -> None:
        """Use other stores for the same tables from now on; the old ones are the caller's to close."""
        self._stores = dict(stores)

    @property
    def distinct(self) -> list[RowStore]:
        """The stores, each once, in the order of their first table."""
        return list({id(store): store for store in self._stores.values()}.values())

    def read(self, table: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        self.check_ids(table, ids)
        return self._stores[table].read(table, ids)

    def write(self, batch: Mapping[str, Rows]) -> None:
        self.check_batch(batch)
        for store in self.distinct:
            part = {table: rows for table, rows in batch.items() if self._stores[table] is store}
            if part:
                store.write(part)

    def scan(self, table: str, start: int = 0, window: int = 65536) -> Iterator[Rows]:
        return self._stores[table].scan(table, start, window)

    def flush(self) -> None:
        for store in self.distinct:
            store.flush()

    def checkpoint(self, path: Path) -> None:
        """One copy for each store, in the sub-directories `0`, `1`, ... of `path`."""
        path.mkdir()
        for number, store in enumerate(self.distinct):
            store.checkpoint(path / str(number))

    def close(self) -> None:
        for store in self.distinct:
            store.close()


__all__ = ["RoutedStore"]
