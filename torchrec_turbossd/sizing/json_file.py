"""Files of a known format: read strictly, so that what is damaged says so, and written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from torchrec_turbossd.errors import CorruptError, FormatVersionError

INT64_END = 1 << 63


def read_json(path: str | os.PathLike[str], *, format: str, newest: int) -> tuple[dict[str, Any], int]:
    """The fields of a file besides `format` and `version`, and the version.

    Args:
        path: the file.
        format: what it must say that it is.
        newest: the last version that this release reads; they count from 1.

    Raises:
        FileNotFoundError: no such file; or another OSError.
        FormatVersionError: a newer release wrote it.
        CorruptError: no JSON, or a file of something else.
    """
    with only_corrupt(path, format):
        whole = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_no_constant)
        # Halves of surrogate pairs, which no text may have alone.
        json.dumps(whole, ensure_ascii=False).encode("utf-8")
    if not isinstance(whole, dict) or whole.get("format") != format:
        raise CorruptError(f"{path} is not a {format}: its format is not {format!r}")
    version = whole.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise CorruptError(f"{path} is not a whole {format}: its version is no whole number above 0")
    if version > newest:
        raise FormatVersionError(f"{path} has version {version}; this release reads up to {newest}: upgrade")
    return {name: value for name, value in whole.items() if name not in ("format", "version")}, version


@contextmanager
def only_corrupt(path: str | os.PathLike[str], format: str) -> Iterator[None]:
    """Whatever values of a file lead to is a `CorruptError` that names it."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise CorruptError(f"{path} is not a whole {format}: {_short(error)}") from error


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file by a rename. Where it is a link, what it points to is replaced; a device or a pipe is written to.

    Raises:
        OSError: it cannot be written; the old one is as it was.
    """
    target = Path(path)
    if is_special(target):
        target.write_bytes(content)
        return
    part = part_beside(target)
    try:
        part.write_bytes(content)
        part.replace(os.path.realpath(target))
    finally:
        part.unlink(missing_ok=True)


def is_special(path: Path) -> bool:
    """A device or a pipe, which must never be replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


def part_beside(path: Path) -> Path:
    """Where a file is written before it is renamed: in the same folder, with a name that is short enough."""
    whole = Path(os.path.realpath(path))
    return whole.with_name(f"{whole.name[:40]}.{os.getpid()}.tmp")


def check_keys(found: object, wanted: set[str], what: str) -> None:
    """Raise ValueError unless `found` is an object with exactly the fields that are `wanted`."""
    if not isinstance(found, dict):
        raise ValueError(f"{what} is no object")
    for word, names in (("lacks", wanted - set(found)), ("has the unknown", set(found) - wanted)):
        if names:
            raise ValueError(f"{what} {word} {', '.join(sorted(names))}")


def check_numbers(values: object, what: str, *, whole: bool) -> None:
    """Raise ValueError unless `values` is a list of numbers, and of integers of 64 bits where they must be `whole`."""
    kinds = (int,) if whole else (int, float)
    if not isinstance(values, list) or not all(type(value) in kinds for value in values):
        raise ValueError(f"{what} must be a list of {'whole ' if whole else ''}numbers")
    if whole and not all(-INT64_END <= value < INT64_END for value in values):
        raise ValueError(f"{what} must be of 64 bits")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


__all__ = [
    "INT64_END",
    "check_keys",
    "check_numbers",
    "is_special",
    "only_corrupt",
    "part_beside",
    "read_json",
    "write_whole",
]
