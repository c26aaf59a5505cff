"""What a snapshot says of itself: tables, parts, files and their digests, in one JSON file with its own digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from torchrec_turbossd.errors import CorruptError, FormatVersionError, SnapshotError
from torchrec_turbossd.tables import TableShard, TableSpec

FORMAT = "torchrec_turbossd.snapshot"
FORMAT_VERSION = 2
MANIFEST_FILE = "MANIFEST.json"
KINDS = ("training", "serving")
HOT = "hot"
STORES = ("rocks", "layered", HOT)

FileDigest = tuple[int, str]
"""(bytes of a file, its SHA-256 in hexadecimal)."""

_OLD_STATE_NAMES = {"momentum2": "exp_avg_sq"}
"""What format 1 called the second state of Adam and LAMB, and what TorchRec and format 2 do."""


@dataclass(frozen=True, kw_only=True)
class ShardRange:
    """The rows [row_offset, row_offset + rows) and columns [col_offset, col_offset + cols) of `table`."""

    table: str
    row_offset: int = 0
    rows: int
    col_offset: int = 0
    cols: int

    @classmethod
    def of(cls, shard: TableShard) -> ShardRange:
        return cls(
            table=shard.table.name,
            row_offset=shard.row_offset,
            rows=shard.rows,
            col_offset=shard.col_offset,
            cols=shard.cols,
        )


@dataclass(frozen=True, kw_only=True)
class Part:
    """One row store of a snapshot, or its hot rows.

    directory: its folder, directly under the snapshot's. shards: what each of its tables (by store key) holds.
    store: the kind of row store, "rocks" or "layered"; or "hot" for copies of rows in use, without shards.
    """

    directory: str
    shards: Mapping[str, ShardRange]
    store: str = "rocks"


@dataclass(frozen=True, kw_only=True)
class OptimizerProgress:
    """How far the fused optimizer of a table is.

    iter: its step count, which optimizers such as Adam compute with. learning_rate: what its kernel updates rows with.
    next_learning_rate: what its parameter group says, which its next `zero_grad` or `step` gives to the kernel.
    """

    iter: int
    learning_rate: float
    next_learning_rate: float


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that is known of a snapshot before a row of it is read.

    kind: "training" (weights and state) or "serving" (weights in their final type).
    id: a UUID in hexadecimal. version: a number that rises from one snapshot of a model to the next.
    files: of each file, by its path under the snapshot with "/" between names, bytes and SHA-256.
    optimizer: of each table by name, in training snapshots from format 2 on.
    extra: what the writer wants to find again; anything JSON holds.
    """

    kind: str
    id: str
    version: int
    tables: tuple[TableSpec, ...]
    parts: tuple[Part, ...]
    files: Mapping[str, FileDigest]
    optimizer: Mapping[str, OptimizerProgress] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Raises `SnapshotError` for parts, files or a kind that no snapshot has."""
        if self.kind not in KINDS:
            raise SnapshotError(f"a snapshot's kind is {' or '.join(KINDS)}, got {self.kind!r}")
        known = {t.name: t for t in self.tables}
        if len(known) < len(self.tables) or not known:
            raise SnapshotError("a snapshot names each of its tables once, and at least one")
        directories = [p.directory for p in self.parts]
        if len(set(directories)) < len(directories):
            raise SnapshotError(f"a snapshot's parts need folders of their own, got {directories}")
        for name in (*directories, *self.files):
            _check_path(name)
        unknown = sorted(set(self.optimizer) - set(known))
        if unknown:
            raise SnapshotError(f"a snapshot has no optimizer of a table that it lacks, got {unknown}")
        for part in self.parts:
            if part.store not in STORES:
                raise SnapshotError(f"a part's store is {' or '.join(STORES)}, got {part.store!r}")
            for key, shard in part.shards.items():
                _check_range(part.directory, key, shard, known.get(shard.table))

    def table(self, name: str) -> TableSpec:
        """A table by name; raises `SnapshotError` where the snapshot has none of that name."""
        for table in self.tables:
            if table.name == name:
                return table
        raise SnapshotError(
            f"the snapshot has no table {name!r}; its tables are {', '.join(repr(t.name) for t in self.tables)}"
        )

    @property
    def stores(self) -> tuple[Part, ...]:
        """The parts that are row stores."""
        return tuple(p for p in self.parts if p.store != HOT)

    def files_of(self, part: Part) -> dict[str, FileDigest]:
        """Files of one part, by their path under its folder."""
        prefix = part.directory + "/"
        return {name[len(prefix) :]: digest for name, digest in self.files.items() if name.startswith(prefix)}

    def to_json(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "format_version": self.format_version,
            "kind": self.kind,
            "id": self.id,
            "version": self.version,
            "tables": [t.to_json() for t in self.tables],
            "parts": [
                {
                    "directory": p.directory,
                    "store": p.store,
                    "shards": {key: vars(shard) for key, shard in p.shards.items()},
                }
                for p in self.parts
            ],
            "files": {name: list(digest) for name, digest in self.files.items()},
            "optimizer": {name: vars(progress) for name, progress in self.optimizer.items()},
            "extra": dict(self.extra),
        }

    def dumps(self) -> str:
        """The manifest file's text: `to_json` and `digest`, the SHA-256 of all else."""
        # Through JSON once, so that the digest is of what a reader gets, whatever types `extra` held.
        body = json.loads(json.dumps(self.to_json()))
        return json.dumps({**body, "digest": _digest(body)}, indent=1, sort_keys=True)

    @classmethod
    def loads(cls, text: str | bytes, where: str) -> Manifest:
        """Read `dumps`.

        Raises:
            SnapshotError: another kind of file, or parts that no snapshot has.
            FormatVersionError: a newer release wrote it.
            CorruptError: not JSON, or its digest does not fit.
        """
        try:
            body: Any = json.loads(text)
        except ValueError as error:
            raise CorruptError(f"{where} is not JSON ({error}); restore the snapshot from a copy") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise SnapshotError(f"{where} is not a snapshot manifest of {FORMAT}")
        stated = body.pop("digest", None)
        version = body.get("format_version")
        # Asked before the digest, whose rule a later format may change.
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise FormatVersionError(
                f"{where} has snapshot format {version}, this release reads up to {FORMAT_VERSION}; use a newer release"
            )
        if stated != _digest(body):
            raise CorruptError(f"{where} does not match its own digest; restore the snapshot from a copy")
        try:
            return cls._from_json(body)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CorruptError(f"{where} lacks a field of a manifest ({error!r}); write the snapshot again") from error

    @classmethod
    def _from_json(cls, body: dict[str, Any]) -> Manifest:
        parts = [
            Part(
                directory=p["directory"],
                shards={key: ShardRange(**shard) for key, shard in p["shards"].items()},
                store=p.get("store", "rocks"),
            )
            for p in body["parts"]
        ]
        tables = [TableSpec.from_json(t) for t in body["tables"]]
        is_old = body["format_version"] < 2
        return cls(
            kind=body["kind"],
            id=body["id"],
            version=int(body["version"]),
            tables=tuple(map(_with_new_names, tables) if is_old else tables),
            parts=tuple(parts),
            files={name: (int(size), str(digest)) for name, (size, digest) in body["files"].items()},
            optimizer={} if is_old else _optimizer_from(body["optimizer"]),
            extra=body["extra"],
            format_version=body["format_version"],
        )


def _optimizer_from(found: Mapping[str, Mapping[str, Any]]) -> dict[str, OptimizerProgress]:
    return {
        name: OptimizerProgress(
            iter=int(progress["iter"]),
            learning_rate=float(progress["learning_rate"]),
            next_learning_rate=float(progress["next_learning_rate"]),
        )
        for name, progress in found.items()
    }


def _with_new_names(table: TableSpec) -> TableSpec:
    return replace(table, state=tuple(replace(s, name=_OLD_STATE_NAMES.get(s.name, s.name)) for s in table.state))


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_path(name: str) -> None:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or str(path) != name:
        raise SnapshotError(f"a snapshot's files lie under it, but its manifest names {name!r}")


def _check_range(directory: str, key: str, shard: ShardRange, table: TableSpec | None) -> None:
    where = f"part {directory!r}, {key!r}"
    if table is None:
        raise SnapshotError(f"{where}: the snapshot has no table {shard.table!r}")
    rows, cols = shard.row_offset + shard.rows, shard.col_offset + shard.cols
    if min(shard.row_offset, shard.col_offset) < 0 or min(shard.rows, shard.cols) < 1:
        raise SnapshotError(f"{where}: a shard has offsets >= 0 and at least one row and column, got {shard}")
    if rows > table.rows or cols > table.dim:
        raise SnapshotError(f"{where}: {shard} is not within the table's {table.rows} rows x {table.dim} columns")


__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "HOT",
    "KINDS",
    "MANIFEST_FILE",
    "STORES",
    "FileDigest",
    "Manifest",
    "OptimizerProgress",
    "Part",
    "ShardRange",
]
