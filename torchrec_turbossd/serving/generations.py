"""A serving module's folder: a lock, generations of the row store, and which of them is the current one."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchrec_turbossd.errors import (
    ConfigError,
    CorruptError,
    ForeignDirectoryError,
    FormatVersionError,
    StoreLockedError,
)
from torchrec_turbossd.snapshot.files import file_errors, sync_file, write_durably
from torchrec_turbossd.tables import TableSpec

FORMAT = "torchrec_turbossd.generation"
FORMAT_VERSION = 1
LOCK_FILE, CURRENT_FILE, INFO_FILE = "LOCK", "CURRENT", "GENERATION.json"
ROWS, CONVERTED = "rows", "converted"
_NAME = re.compile(r"gen-(\d+)")
_TEMPORARY = re.compile(r"\..*\.(tmp|staging)")


@dataclass(frozen=True, kw_only=True)
class GenerationInfo:
    """What a generation holds.

    tables: all tables of its store, with the rule for rows never written.
    version: the newest version of rows in it, as far as `flush`, `close` or a load recorded it.
    base_version: the version of the snapshot that it began with; None where it began empty.
    """

    tables: tuple[TableSpec, ...]
    version: int = 0
    base_version: int | None = None

    def dumps(self) -> str:
        body = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "tables": [t.to_json() for t in self.tables],
            "version": self.version,
            "base_version": self.base_version,
        }
        return json.dumps(body, indent=1)

    @classmethod
    def loads(cls, text: bytes, where: Path) -> GenerationInfo:
        """Read `dumps`; raises `FormatVersionError` for a newer one, `CorruptError` for anything else."""
        try:
            body: dict[str, Any] = json.loads(text)
            if body["format"] != FORMAT:
                raise CorruptError(f"{where} is not a generation's description")
            if body["format_version"] > FORMAT_VERSION:
                raise FormatVersionError(
                    f"{where} has generation format {body['format_version']}, this release reads up to "
                    f"{FORMAT_VERSION}; use a newer release"
                )
            base = body["base_version"]
            return cls(
                tables=tuple(TableSpec.from_json(t) for t in body["tables"]),
                version=int(body["version"]),
                base_version=None if base is None else int(base),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptError(f"{where} is damaged ({error!r}); load a snapshot under a new name") from error


class Generations:
    """The folder of one module, locked as long as it is open.

    Args:
        root: where modules have their folders.
        name: the folder's name; None for a new one, which `close` removes.

    Raises:
        StoreLockedError: another module has it open.
        ForeignDirectoryError: a file, or a folder with other things in it.
        StoreError: it cannot be made or written.
    """

    def __init__(self, root: Path | str, name: str | None) -> None:
        self.kept = name is not None
        self.path = Path(root).absolute() / (name or f"turbossd-{uuid.uuid4().hex[:12]}")
        with file_errors(self.path):
            self._make()
            self._lock = self._take_lock()
        try:
            with file_errors(self.path):
                self._sweep()
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ForeignDirectoryError(f"{self.path} is a file; a serving module needs a folder of its own")
        self.path.mkdir(parents=True, exist_ok=True)
        others = [n for n in os.listdir(self.path) if not self._is_ours(self.path / n)]
        if others:
            raise ForeignDirectoryError(
                f"{self.path} is not a serving module's folder (it holds {', '.join(sorted(others)[:3])}); choose "
                "another name or ssd_directory"
            )

    @staticmethod
    def _is_ours(path: Path) -> bool:
        if _NAME.fullmatch(path.name) and path.is_dir():
            # Leftover generations are deleted: nothing else may be taken for one.
            return all(n in (INFO_FILE, ROWS, CONVERTED) or _is_temporary(n) for n in os.listdir(path))
        return path.name in (LOCK_FILE, CURRENT_FILE) or _is_temporary(path.name)

    def _take_lock(self) -> int:
        handle = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise StoreLockedError(
                f"{self.path} is open in another serving module; close that first, or choose another name"
            ) from error
        return handle

    def _sweep(self) -> None:
        """Remove what a crash left: generations that never became the current one."""
        current = self.current()
        for path in self.path.iterdir():
            if path.name not in (LOCK_FILE, CURRENT_FILE) and path != current:
                remove(path)

    def current(self) -> Path | None:
        """The current generation's folder; None in a new module's."""
        file = self.path / CURRENT_FILE
        if not file.exists():
            return None
        name = file.read_text(encoding="utf-8").strip()
        if not _NAME.fullmatch(name) or not (self.path / name).is_dir():
            raise CorruptError(f"{file} names {name!r}, which is not there; load a snapshot under a new name")
        return self.path / name

    def new(self) -> Path:
        """Make the folder of a new generation, which is not the current one yet."""
        taken = [int(m[1]) for m in map(_NAME.fullmatch, os.listdir(self.path)) if m]
        path = self.path / f"gen-{max(taken, default=0) + 1}"
        with file_errors(path):
            path.mkdir()
        return path

    def name_current(self, path: Path) -> None:
        """Make `path` the generation that a later open resumes; durable when it returns."""
        with file_errors(path):
            sync_file(path)
            write_durably(self.path / CURRENT_FILE, path.name + "\n")

    def close(self) -> None:
        """Give the lock back, and remove a folder that was not given a name. Closing twice is allowed."""
        if self._lock < 0:
            return
        if not self.kept:
            remove(self.path)
        # Unlocked by name: a forked process may still hold a copy of the handle.
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        os.close(self._lock)
        self._lock = -1


def read_info(path: Path) -> GenerationInfo:
    """What the generation at `path` holds."""
    file = path / INFO_FILE
    with file_errors(file):
        return GenerationInfo.loads(file.read_bytes(), file)


def write_info(path: Path, info: GenerationInfo) -> None:
    """Say, durably, what the generation at `path` holds."""
    with file_errors(path):
        write_durably(path / INFO_FILE, info.dumps())


def match_tables(held: Sequence[TableSpec], wanted: Sequence[TableSpec], where: str) -> list[TableSpec]:
    """`wanted` with the rules of the tables `held`; raises `ConfigError` where a table is missing or differs."""
    by_name = {t.name: t for t in held}
    matched, faults = [], []
    for table in wanted:
        found = by_name.get(table.name)
        if found is None:
            faults.append(f"{table.name!r} is not there")
        elif (found.rows, found.dim, found.data_type) != (table.rows, table.dim, table.data_type):
            faults.append(f"{table.name!r} is {_shape(found)} there and {_shape(table)} in the module")
        else:
            matched.append(replace(table, init=found.init))
    if faults:
        raise ConfigError(
            f"{where} does not hold the module's tables: {'; '.join(faults)}; declare them alike, or convert the "
            "snapshot with other data_types"
        )
    return matched


def remove(path: Path) -> None:
    """Delete a file or a folder as far as that goes; what stays is deleted when the module is opened again."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_temporary(name: str) -> bool:
    return _TEMPORARY.fullmatch(name) is not None


def _shape(table: TableSpec) -> str:
    return f"{table.rows} x {table.dim} {table.data_type.name}"


__all__ = [
    "CONVERTED",
    "CURRENT_FILE",
    "FORMAT",
    "FORMAT_VERSION",
    "INFO_FILE",
    "LOCK_FILE",
    "ROWS",
    "GenerationInfo",
    "Generations",
    "match_tables",
    "read_info",
    "remove",
    "write_info",
]
