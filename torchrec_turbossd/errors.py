"""Every exception that this package raises on purpose.

TurboSSDError
├── ConfigError (ValueError)          a declaration or an argument that cannot be honoured
│   ├── UnsupportedError              a valid TorchRec or FBGEMM option that is not built here
│   └── BudgetError                   memory that is too small, or absurd
├── InputError (ValueError)           a tensor given to a call: dtype, shape, device, offsets
│   └── RowIndexError (IndexError)    a row id below zero or beyond its table
├── UnknownTableError (KeyError)      a table name that was never declared
├── CacheFullError (RuntimeError)     batches in flight hold rows that another batch needs changed
├── ClosedError (RuntimeError)        a call after close()
├── StoreError (OSError)              the row store on disk
│   ├── ForeignDirectoryError         a directory that this package did not make
│   ├── FormatVersionError            made by a newer release
│   ├── StoreLockedError              another process has it open
│   ├── ReadOnlyStoreError            no permission to write
│   ├── StoreFullError                no space left
│   └── CorruptError                  bytes that fail their checksum
└── SnapshotError                     a directory that is not a whole snapshot of these tables
"""

from __future__ import annotations


class TurboSSDError(Exception):
    """Base of every exception below."""


class ConfigError(TurboSSDError, ValueError):
    """A declaration or an argument that cannot be honoured."""


class UnsupportedError(ConfigError):
    """A valid TorchRec or FBGEMM option that this package refuses."""


class BudgetError(ConfigError):
    """A memory budget that is too small, or absurd."""


class InputError(TurboSSDError, ValueError):
    """A tensor given to a call that has the wrong dtype, shape, device or contents."""


class RowIndexError(InputError, IndexError):
    """A row id below zero or beyond its table."""


class UnknownTableError(TurboSSDError, KeyError):
    """A table name that was never declared."""

    def __str__(self) -> str:
        # KeyError prints its argument quoted, which hides a sentence.
        return str(self.args[0]) if self.args else ""


class CacheFullError(TurboSSDError, RuntimeError):
    """Rows that a batch needs are held by other batches in flight."""


class ClosedError(TurboSSDError, RuntimeError):
    """A call after close()."""


class StoreError(TurboSSDError, OSError):
    """The row store on disk could not do what was asked."""


class ForeignDirectoryError(StoreError):
    """A directory that this package did not make."""


class FormatVersionError(StoreError):
    """A directory that a newer release made."""


class StoreLockedError(StoreError):
    """A store that another process or object has open."""


class ReadOnlyStoreError(StoreError):
    """A directory that may not be written."""


class StoreFullError(StoreError):
    """No space left on the device."""


class CorruptError(StoreError):
    """Bytes on disk that fail their checksum."""


class SnapshotError(TurboSSDError):
    """A directory that is not a whole snapshot, or not one of these tables."""


__all__ = [
    "BudgetError",
    "CacheFullError",
    "ClosedError",
    "ConfigError",
    "CorruptError",
    "ForeignDirectoryError",
    "FormatVersionError",
    "InputError",
    "ReadOnlyStoreError",
    "RowIndexError",
    "SnapshotError",
    "StoreError",
    "StoreFullError",
    "StoreLockedError",
    "TurboSSDError",
    "UnknownTableError",
    "UnsupportedError",
]
