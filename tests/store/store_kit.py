"""Stores of every kind, each with a way to open again what was written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import torchrec_turbossd.store
from torchrec_turbossd.store import (
    KnownRowsStore,
    LayeredRowStore,
    MemoryRowStore,
    RocksOptions,
    RocksRowStore,
    RowStore,
    WriteBackStore,
)
from torchrec_turbossd.store.directory import FORMAT_FILE
from torchrec_turbossd.store.layered_writer import LayeredWriter

SIZES = {"users": 12, "items@0+4": 7}
KINDS = (
    "memory",
    "rocks",
    "rocks without log",
    "write-back over memory",
    "write-back over rocks",
    "known rows",
    "layered",
)
TABLE_ROWS = 1000
"""Rows of each table of a layered store; ids beyond are written too."""
BASE_SALT = 77


def rows_of(ids: Tensor, width: int, salt: int = 0) -> Tensor:
    """Rows that tell which id and salt they are of: [N, width] uint8."""
    columns = torch.arange(width, dtype=torch.int64)
    return ((ids[:, None] * 31 + columns * 7 + salt * 101) % 251).to(torch.uint8)


def batch_of(ids: list[int], salt: int = 0, sizes: Mapping[str, int] = SIZES) -> dict[str, tuple[Tensor, Tensor]]:
    """A write of `ids` to every table."""
    index = torch.tensor(ids, dtype=torch.int64)
    return {table: (index, rows_of(index, width, salt)) for table, width in sizes.items()}


@dataclass
class Maker:
    """Makes stores of one kind in one directory, and closes them."""

    kind: str
    root: Path
    made: list[RowStore] = field(default_factory=list)

    def make(self, name: str = "store", sizes: Mapping[str, int] = SIZES) -> RowStore:
        store: RowStore
        if self.kind.endswith("memory"):
            store = MemoryRowStore(sizes)
        elif self.kind == "layered":
            store = layered(self.root / name, sizes)
        else:
            options = RocksOptions(hash_write_buffers=self.kind == "hashed rocks")
            store = RocksRowStore(self.root / name, sizes, wal="without log" not in self.kind, options=options)
        if self.kind == "known rows":
            store = KnownRowsStore(store, dict.fromkeys(sizes, TABLE_ROWS), empty=True)
        if self.kind.startswith("write-back"):
            store = WriteBackStore(store, max_pending_bytes=1 << 20)
        self.made.append(store)
        return store

    def open_checkpoint(self, path: Path, sizes: Mapping[str, int] = SIZES) -> RowStore:
        store: RowStore
        if self.kind == "layered":
            store = layered(path, sizes, create=False)
        elif self.kind.endswith("memory"):
            store = MemoryRowStore.open(path)
        else:
            store = RocksRowStore(path, sizes, create=False)
        self.made.append(store)
        return store


def layered(path: Path, sizes: Mapping[str, int] = SIZES, *, create: bool = True) -> LayeredRowStore:
    """A layered store of tables of `TABLE_ROWS` rows."""
    return LayeredRowStore(path, sizes, dict.fromkeys(sizes, TABLE_ROWS), create=create)


def based(path: Path, ids: Tensor) -> Path:
    """A closed store whose base has `ids` in every table."""
    with LayeredWriter(path, SIZES, dict.fromkeys(SIZES, TABLE_ROWS)) as writer:
        for table, width in SIZES.items():
            writer.append(table, ids, rows_of(ids, width, BASE_SALT))
        writer.finish()
    return path


def made(path: Path, count: int = 10) -> Path:
    """A closed store with `count` rows in each table."""
    store = RocksRowStore(path, SIZES)
    store.write(batch_of(list(range(count))))
    store.flush()
    store.close()
    return path


def count_in(store: RocksRowStore, table: str = "users") -> int:
    return sum(ids.numel() for ids, _ in store.scan(table))


def edit_format(path: Path, **changes: object) -> None:
    body = json.loads((path / FORMAT_FILE).read_text())
    (path / FORMAT_FILE).write_text(json.dumps({**body, **changes}))


def child_environment() -> dict[str, str]:
    """Lets a child process import the package that runs here."""
    return {**os.environ, "PYTHONPATH": str(Path(torchrec_turbossd.store.__file__).parents[2])}


def run_child(code: str) -> str:
    """What a Python process prints that runs `code`."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        env=child_environment(),
    )
    return done.stdout
