"""Files of a snapshot: their digests, and making them durable."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from torchrec_turbossd.errors import CorruptError, SnapshotError, StoreError, StoreFullError, TurboSSDError
from torchrec_turbossd.snapshot.manifest import FileDigest

_CHUNK = 16 << 20
_THREADS, _NICE = 2, 10
_FULL = (errno.ENOSPC, errno.EDQUOT)
_SPARE_BYTES = 4 << 20


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the body into a `StoreError` about `path`."""
    try:
        yield
    except TurboSSDError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise StoreFullError(f"no space left for {path}: {error}; free some space and try again") from error
        raise StoreError(f"{path}: {error}") from error


def list_files(directory: Path) -> list[str]:
    """Paths of all files under `directory`, "/" between names, sorted; raises `SnapshotError` for a link."""
    found = []
    for folder, folders, names in os.walk(directory):
        for name in (*folders, *names):
            path = Path(folder) / name
            if path.is_symlink():
                raise SnapshotError(f"{path} is a link; a snapshot holds only files of its own")
        found += [(Path(folder) / name).relative_to(directory).as_posix() for name in names]
    return sorted(found)


def digest_file(path: Path) -> FileDigest:
    """(bytes, SHA-256) of a file, read in pieces."""
    digest, size = hashlib.sha256(), 0
    # Large pieces: Python's global lock is wanted but once for each, and lookups may be waiting for it.
    piece = memoryview(bytearray(min(_CHUNK, max(path.stat().st_size, 1))))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
            size += count
    return size, digest.hexdigest()


def digest_files(directory: Path, names: list[str]) -> dict[str, FileDigest]:
    """Digests of files under `directory`, several at a time, in time that nobody else wants."""
    with ThreadPoolExecutor(_THREADS, initializer=_yield_to_others) as pool:
        return dict(zip(names, pool.map(lambda name: digest_file(directory / name), names), strict=True))


def _yield_to_others() -> None:
    # Safe for a thread that hardly ever holds Python's global lock.
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def check_files(directory: Path, files: dict[str, FileDigest], *, deep: bool = True) -> None:
    """Compare the files under `directory` with their manifest; with `deep` every byte is read.

    Raises:
        SnapshotError: a file is missing or was added.
        CorruptError: a file has another size, or other bytes.
    """
    found = set(list_files(directory))
    missing, extra = sorted(set(files) - found), sorted(found - set(files))
    if missing:
        raise SnapshotError(f"{directory} lacks {_some(missing)}; restore the snapshot from a copy")
    if extra:
        raise SnapshotError(
            f"{directory} holds {_some(extra)}, which its manifest does not name; it was opened or changed after it "
            "was written: move what was added away"
        )
    for name, (size, _) in files.items():
        there = (directory / name).stat().st_size
        if there != size:
            raise CorruptError(
                f"{directory / name} has {there} bytes, its manifest says {size}; restore the snapshot from a copy"
            )
    if not deep:
        return
    for name, digest in digest_files(directory, sorted(files)).items():
        if digest != tuple(files[name]):
            raise CorruptError(f"{directory / name} does not match its digest; restore the snapshot from a copy")


def check_space(directory: Path, need: int) -> None:
    """Raise `StoreFullError` unless `need` bytes can be written under `directory`, which exists, and some are spare."""
    with file_errors(directory):
        free = shutil.disk_usage(directory).free
    if free < need + _SPARE_BYTES:
        raise StoreFullError(
            f"no space left at {directory}: {need} bytes are to be written and {_SPARE_BYTES} to stay spare, {free} "
            "are free; free some space and try again"
        )


def sync_file(path: Path) -> None:
    """Make a file's bytes durable, or a directory's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(directory: Path) -> None:
    """Make all files and folders under `directory` durable."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            sync_file(Path(folder) / name)
        sync_file(Path(folder))


def write_durably(path: Path, text: str) -> None:
    """Write a small file as a whole: after a crash it is there with this text, or as it was before."""
    temp = path.with_name(f".{path.name}.tmp")
    with temp.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temp.replace(path)
    sync_file(path.parent)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more files" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


__all__ = [
    "check_files",
    "check_space",
    "digest_file",
    "digest_files",
    "file_errors",
    "list_files",
    "sync_file",
    "sync_tree",
    "write_durably",
]
