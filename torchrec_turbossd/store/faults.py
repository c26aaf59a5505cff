"""What the operating system or RocksDB says went wrong, as this package's errors."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchrec_turbossd.errors import (
    CorruptError,
    ReadOnlyStoreError,
    StoreError,
    StoreFullError,
    StoreLockedError,
    TurboSSDError,
)

_FULL = (errno.ENOSPC, errno.EDQUOT)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)

_LOCKED_WORDS = ("lock hold by current process", "While lock file", "Resource temporarily unavailable")
_FULL_WORDS = ("No space left on device", "os error 28", "Disk quota exceeded", "os error 122")
_READ_ONLY_WORDS = (
    "Read-only file system",
    "Permission denied",
    "Operation not permitted",
    "read only mode",
    "os error 30",
    "os error 13",
)


def full_error(path: Path, text: str) -> StoreFullError:
    """`StoreFullError` about `path`."""
    return StoreFullError(f"no space left for the row store at {path}: {text}; free some space and try again")


def read_only_error(path: Path, text: str) -> ReadOnlyStoreError:
    """`ReadOnlyStoreError` about `path`."""
    return ReadOnlyStoreError(
        f"the row store at {path} may not be written: {text}; give this user the right to write there, "
        f"or clone it to a place that may be written"
    )


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the body into a `StoreError` about `path`."""
    try:
        yield
    except TurboSSDError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise full_error(path, str(error)) from error
        if error.errno in _READ_ONLY:
            raise read_only_error(path, str(error)) from error
        raise StoreError(f"the row store at {path}: {error}") from error


def _translate(path: Path, text: str) -> StoreError:
    plain = text.replace(str(path), "")
    # RocksDB wraps the cause of a corruption in its text, so that word decides first. A file that it misses was lost.
    if "Corruption" in plain or "No such file or directory" in plain:
        return CorruptError(f"the row store at {path} is damaged: {text}; restore it from a snapshot")
    if any(word in plain for word in _LOCKED_WORDS):
        if "current process" in plain:
            return StoreLockedError(
                f"the row store at {path} is open in this process already; close() what holds it (a store, a serving "
                "module, or a sharded module such as model.module.ebc), or use another directory"
            )
        return StoreLockedError(
            f"the row store at {path} is open in another process; end that, or give each job a directory of its own"
        )
    if any(word in plain for word in _FULL_WORDS):
        return full_error(path, text)
    if any(word in plain for word in _READ_ONLY_WORDS):
        return read_only_error(path, text)
    return StoreError(f"the row store at {path}: {text}")


@contextmanager
def rocks_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError`, or the bare `Exception` that rocksdict raises, into a `StoreError` about `path`."""
    try:
        with os_errors(path):
            yield
    except TurboSSDError:
        raise
    except Exception as error:
        # rocksdict raises Exception itself, whose subclasses are other people's.
        if type(error) is not Exception:
            raise
        raise _translate(path, str(error)) from error


__all__ = ["full_error", "os_errors", "read_only_error", "rocks_errors"]
