"""A serving snapshot out of a training one: parts merged, state left out, rows in their final type."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import SparseType

from torchrec_turbossd.errors import ConfigError, UnknownTableError, UnsupportedError
from torchrec_turbossd.rows import quantise
from torchrec_turbossd.snapshot.in_order import in_order
from torchrec_turbossd.snapshot.manifest import Manifest, Part, ShardRange
from torchrec_turbossd.snapshot.merge import Source, check_cover, merged_rows
from torchrec_turbossd.snapshot.parts import open_parts
from torchrec_turbossd.snapshot.verify import verify
from torchrec_turbossd.snapshot.write import commit_snapshot, digest_part, staging_directory
from torchrec_turbossd.store.contract import Rows
from torchrec_turbossd.store.layered_writer import LayeredWriter
from torchrec_turbossd.tables import SERVING_TYPES, TRAINING_TYPES, TableShard, TableSpec, with_type

Progress = Callable[[int, int], None]
Window = tuple[int, str, Rows]
"""(row ids passed of all tables, table, rows)."""

_PART = "part-0"
_WIDTHS = {SparseType.INT4: 4, SparseType.INT2: 8}
"""FBGEMM quantises these types two bytes at a time."""


def convert_to_serving(
    training_path: Path | str,
    serving_path: Path | str,
    data_types: SparseType | Mapping[str, SparseType],
    *,
    progress: Progress | None = None,
) -> Manifest:
    """Write the serving snapshot of the snapshot at `training_path` to `serving_path`.

    The parts of all ranks become one layered row store of whole rows, without state. Only rows that were written are;
    the tables keep their rule for the others, so that these are answered as the trained ones would be. Windows of rows
    pass through memory, never a whole table. A serving snapshot of several parts, or of another kind of row store, is
    brought to this form in the same way.

    Args:
        training_path: verified first, and not changed.
        serving_path: must not exist, or be an empty directory.
        data_types: the final type of all tables, or of each; tables that a mapping does not name are left out.
        progress: called after each window with (row ids passed, rows of all tables).

    Raises:
        SnapshotError, FormatVersionError, CorruptError: `training_path` is not a whole snapshot, or its parts do not
            cover a table; or `serving_path` is taken.
        UnknownTableError: `data_types` names a table that the snapshot lacks.
        UnsupportedError, ConfigError: a type that cannot be served, or a quantised table in another type.
        StoreError: the file system refuses; nothing is left behind.
    """
    manifest = verify(training_path)
    pairs = [(manifest.table(name), data_type) for name, data_type in _types(manifest, data_types).items()]
    targets = [serving_table(table, data_type) for table, data_type in pairs]
    for table, _ in pairs:
        check_cover(manifest, table)
    with staging_directory(serving_path) as staging:
        scratch = staging / ".scratch"
        scratch.mkdir()
        with ExitStack() as stack:
            sources = open_parts(manifest, Path(training_path), scratch, stack)
            write_rows(staging, targets, _rows(pairs, targets, sources), progress)
        shutil.rmtree(scratch)
        return commit_rows(staging, serving_path, targets, version=manifest.version, extra=manifest.extra)


def write_rows(
    staging: Path,
    targets: Sequence[TableSpec],
    windows: Iterator[Window],
    progress: Progress | None,
) -> None:
    """Write windows of rows, table by table and ascending, to the one part of a serving snapshot in `staging`."""
    sizes, rows = {t.name: t.row_bytes for t in targets}, {t.name: t.rows for t in targets}
    total = sum(rows.values())
    with LayeredWriter(staging / _PART, sizes, rows) as writer:
        for passed, name, (ids, data) in windows:
            writer.append(name, ids, data)
            if progress is not None:
                progress(passed, total)
        writer.finish()


def commit_rows(
    staging: Path, path: Path | str, targets: Sequence[TableSpec], *, version: int, extra: Mapping[str, Any]
) -> Manifest:
    """Make what `write_rows` wrote the serving snapshot at `path`."""
    shards = {t.name: ShardRange.of(TableShard.whole(t)) for t in targets}
    manifest = Manifest(
        kind="serving",
        id=uuid.uuid4().hex,
        version=version,
        tables=tuple(targets),
        parts=(Part(directory=_PART, shards=shards, store="layered"),),
        files=digest_part(staging / _PART),
        extra=extra,
    )
    commit_snapshot(staging, path, manifest)
    return manifest


def check_data_types(data_types: Any) -> None:
    """Raise `ConfigError` unless these are a `SparseType`, or one for each of some tables by name."""
    if isinstance(data_types, SparseType):
        return
    if not isinstance(data_types, Mapping):
        raise ConfigError(
            "data_types must be a SparseType such as SparseType.INT8, or a mapping of table name to SparseType, got "
            f"{data_types!r}"
        )
    for name, found in data_types.items():
        if not isinstance(found, SparseType):
            raise ConfigError(f"data_types[{name!r}] must be a SparseType such as SparseType.INT8, got {found!r}")


def _types(manifest: Manifest, data_types: SparseType | Mapping[str, SparseType]) -> dict[str, SparseType]:
    check_data_types(data_types)
    names = [t.name for t in manifest.tables]
    if isinstance(data_types, SparseType):
        return dict.fromkeys(names, data_types)
    unknown = sorted(set(data_types) - set(names))
    if unknown:
        raise UnknownTableError(
            f"the snapshot has no table {', '.join(map(repr, unknown))}; its tables are {', '.join(map(repr, names))}"
        )
    if not data_types:
        raise ConfigError("data_types names no table; name at least one")
    return {name: data_types[name] for name in names if name in data_types}


def serving_table(table: TableSpec, data_type: SparseType) -> TableSpec:
    """The form of `table` in which it is served as `data_type`.

    Raises:
        UnsupportedError: a type that cannot be served. ConfigError: a quantised table in another type, or a width.
    """
    if data_type not in SERVING_TYPES:
        known = ", ".join(t.name for t in SERVING_TYPES)
        raise UnsupportedError(f"table {table.name!r} cannot be served as {data_type}; use one of {known}")
    if table.data_type not in TRAINING_TYPES and data_type != table.data_type:
        raise ConfigError(f"table {table.name!r} is {table.data_type} already and cannot become {data_type}")
    if table.dim % _WIDTHS.get(data_type, 1):
        raise ConfigError(
            f"table {table.name!r}: {data_type.name} rows have a width that is a multiple of {_WIDTHS[data_type]}, got "
            f"{table.dim}"
        )
    return with_type(table, data_type)


def _rows(
    pairs: list[tuple[TableSpec, SparseType]], targets: list[TableSpec], sources: list[Source]
) -> Iterator[Window]:
    """The windows of all tables in turn."""
    before = 0
    for (table, data_type), target in zip(pairs, targets, strict=True):
        # Without its state.
        whole = TableShard.whole(with_type(table, table.data_type))
        held = merged_rows(table, sources, whole)
        final = partial(_final_of, table, data_type)
        for ids, rows in in_order(final, held):
            yield before + int(ids[-1]) + 1, target.name, (ids, rows)
        before += table.rows
        yield before, target.name, (torch.empty(0, dtype=torch.int64), torch.empty(0, target.row_bytes).byte())


def _final_of(table: TableSpec, data_type: SparseType, held: Rows) -> Rows:
    ids, weights = held
    if data_type == table.data_type:
        return ids, weights.contiguous()
    return ids, quantise(weights.contiguous().view(TRAINING_TYPES[table.data_type]), data_type)


__all__ = ["Progress", "Window", "check_data_types", "commit_rows", "convert_to_serving", "serving_table", "write_rows"]
