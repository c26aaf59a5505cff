"""A serving snapshot from rows that a user has: arrays in memory or on disk, or a stream of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from torchrec_turbossd.errors import ConfigError, InputError, UnknownTableError
from torchrec_turbossd.rows import as_row_bytes
from torchrec_turbossd.snapshot.convert import Progress, Window, commit_rows, serving_table, write_rows
from torchrec_turbossd.snapshot.in_order import in_order
from torchrec_turbossd.snapshot.manifest import Manifest
from torchrec_turbossd.snapshot.write import staging_directory
from torchrec_turbossd.store.contract import Rows
from torchrec_turbossd.tables import TableSpec, specs_from

_WINDOW_BYTES = 8 << 20

_Given = tuple[Any, Any]
"""(ids, rows) as a user gives them."""


def write_serving_snapshot(
    path: Path | str,
    tables: Sequence[Any],
    rows: Mapping[str, Any],
    *,
    version: int = 0,
    progress: bool | Progress | None = None,
) -> Manifest:
    """Write a serving snapshot of the given rows to `path`, for `TurboSSDInferenceModule.load_snapshot`.

    Rows are quantised in windows on all cores and written once, one after the other; no whole table is in memory but
    what the caller holds there.

    Args:
        path: must not exist, or be an empty directory.
        tables: `TableSpec`, `(name, rows, dim, SparseType)` or TorchRec configs; their types are the snapshot's.
        rows: for each table by name a tensor, array or memory map [rows, dim] floating or [rows, row bytes] uint8 in
            FBGEMM's inference layout; or an iterable of (ids [N] integers, rows [N, ...] of either kind) in which ids
            ascend, each once, for tables of which some rows were never written.
        version: a number that rises from one snapshot of a model to the next.
        progress: True shows a bar; a function is called after each window with (row ids passed, rows of all tables).

    Raises:
        ConfigError, UnsupportedError: a declaration that cannot be served, or a `version` that is none.
        UnknownTableError, InputError: rows of a table that was not declared, or none of one that was; a shape, dtype,
            order or id that does not fit; numbers that are not finite.
        SnapshotError: `path` is taken. StoreError: the file system refuses. On any of them nothing is left at `path`.
    """
    targets = [serving_table(t, t.data_type) for t in specs_from(tables)]
    _check_names(targets, rows)
    if isinstance(version, bool) or not isinstance(version, int) or version < 0:
        raise ConfigError(f"a version is an int of 0 or more, got {version!r}")
    windows = [_windows(table, rows[table.name]) for table in targets]
    with staging_directory(path) as staging, _shown(progress, sum(t.rows for t in targets)) as told:
        write_rows(staging, targets, _in_turn(targets, windows), told)
        return commit_rows(staging, path, targets, version=version, extra={})


def _check_names(tables: Sequence[TableSpec], rows: Mapping[str, Any]) -> None:
    names = [t.name for t in tables]
    unknown = sorted(set(rows) - set(names))
    if unknown:
        raise UnknownTableError(
            f"rows are given of {', '.join(map(repr, unknown))}; the tables are {', '.join(map(repr, names))}"
        )
    missing = [n for n in names if n not in rows]
    if missing:
        raise InputError(f"no rows are given of {', '.join(map(repr, missing))}; an empty list is a table without rows")


def _windows(table: TableSpec, given: Any) -> Iterator[_Given]:
    """(ids, rows) of a table as they were given; checks at once what can be."""
    if isinstance(given, Tensor | np.ndarray):
        if given.ndim != 2 or given.shape[0] != table.rows:
            raise InputError(
                f"table {table.name!r} has {table.rows} rows of {table.dim} values, got an array of shape "
                f"{tuple(given.shape)}"
            )
        return _slices(given)
    if not isinstance(given, Iterable):
        raise InputError(
            f"rows of table {table.name!r} are a tensor, an array or an iterable of (ids, rows), got "
            f"{type(given).__name__}"
        )
    return iter(given)


def _slices(whole: Any) -> Iterator[_Given]:
    itemsize = whole.element_size() if isinstance(whole, Tensor) else whole.itemsize
    window = max(1, _WINDOW_BYTES // max(1, whole.shape[1] * itemsize))
    for first in range(0, whole.shape[0], window):
        part = whole[first : first + window]
        yield torch.arange(first, first + part.shape[0]), part


def _in_turn(tables: Sequence[TableSpec], given: Sequence[Iterator[_Given]]) -> Iterator[Window]:
    before = 0
    for table, windows in zip(tables, given, strict=True):
        last = -1
        for ids, data in in_order(partial(_as_rows, table), windows):
            last = _check_order(table, ids, last)
            yield before + last + 1, table.name, (ids, data)
        before += table.rows
        yield before, table.name, (torch.empty(0, dtype=torch.int64), torch.empty(0, table.row_bytes).byte())


def _as_rows(table: TableSpec, given: _Given) -> Rows:
    """Ids, and rows in the table's type."""
    try:
        ids, rows = map(_as_tensor, given)
    except (TypeError, ValueError) as error:
        raise InputError(f"table {table.name!r}: a window is a pair of arrays (ids, rows): {error}") from error
    if ids.dim() != 1 or rows.dim() != 2 or ids.shape[0] != rows.shape[0] or ids.dtype.is_floating_point:
        raise InputError(
            f"table {table.name!r}: a window has ids [N] and rows [N, width], got {tuple(ids.shape)} {ids.dtype} and "
            f"{tuple(rows.shape)}"
        )
    return ids.to(device="cpu", dtype=torch.int64), as_row_bytes(table, rows)


def _as_tensor(values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values
    # A copy, because a memory map may be read-only; this is where one is read, in as many threads as there are.
    return torch.from_numpy(np.array(values))


def _check_order(table: TableSpec, ids: Tensor, last: int) -> int:
    """The last id after `ids`, which follow `last`."""
    if ids.numel() == 0:
        return last
    if int(ids[0]) <= last or not bool((ids[1:] > ids[:-1]).all()) or int(ids[-1]) >= table.rows:
        raise InputError(
            f"table {table.name!r}: ids of windows ascend from 0 to {table.rows - 1}, each once; sort the rows, got "
            f"{int(ids[0])} to {int(ids[-1])} after {last}"
        )
    return int(ids[-1])


@contextmanager
def _shown(progress: bool | Progress | None, total: int) -> Iterator[Callable[[int, int], None] | None]:
    if progress is not True:
        yield progress or None
        return
    with tqdm(total=total, unit=" rows", unit_scale=True) as bar:
        yield lambda passed, _: bar.update(passed - bar.n)


__all__ = ["write_serving_snapshot"]
