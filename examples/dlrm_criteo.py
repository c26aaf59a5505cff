"""Reads click logs in Criteo's format: lines of a label, 13 integers and 26 hexadecimal values, between tabs."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from dlrm_day import CATEGORICAL, DENSE, DayWriter, Dense, Labels

from torchrec_turbossd.errors import InputError

Values = npt.NDArray[np.uint32]
Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]

FIELDS = 1 + DENSE + CATEGORICAL
ROOM = 4
"""Rows of a table for each value that occurs, so that few values share a row by chance."""

_BLOCK_BYTES = 8 << 20
_GZIP = b"\x1f\x8b"
_TAB, _NEWLINE, _MINUS = b"\t\n-"
_LABEL = "a label of 0 or 1"
_MOST_DIGITS = {10: 15, 16: 8}
_NO_DIGIT = 255
_DIGITS = np.full(256, _NO_DIGIT, dtype=np.uint8)
for _digit in range(16):
    _DIGITS[[ord(c) for c in {f"{_digit:x}", f"{_digit:X}"}]] = _digit


def read_criteo(path: Path, directory: Path, samples: int, most_rows: tuple[int, ...]) -> None:
    """Turn the first lines of a file into a day in `directory`.

    Integers x become log(1 + max(x, 0)), where none is given 0. A table has `ROOM` rows for each value that occurs, but
    at most those allowed; value v is row 1 + v mod (rows - 1), no value is row 0.

    Args:
        path: plain text, or compressed by gzip whatever its name.
        directory: must not exist.
        samples: most lines to read.
        most_rows: of each table, [26].

    Raises:
        InputError: a line that is not of this format, a file that breaks off, or no lines at all.
    """
    with DayWriter(directory) as writer:
        for block in _blocks(path):
            labels, dense, values = parse_lines(block, first_line=writer.samples + 1, path=path)
            left = samples - writer.samples
            writer.append(dense[:left], values[:left].view(np.int32), labels[:left])
            if writer.samples == samples:
                break
        if not writer.samples:
            raise InputError(f"{path} has no lines; wanted are lines of {FIELDS} fields between tabs")
        ids = writer.written_ids()
        rows = tuple(_hash(ids[:, column], most) for column, most in enumerate(most_rows))
        writer.finish(rows, f"the first {writer.samples:,} lines of {path.name}")


def parse_lines(block: bytes, first_line: int, path: Path) -> tuple[Labels, Dense, Values]:
    """Whole lines, each with its newline: (labels [N], dense [N, 13], values [N, 26], 0 where none is given).

    Raises:
        InputError: names the line, counting from `first_line`.
    """
    text = np.frombuffer(block, dtype=np.uint8)
    ends = np.flatnonzero((text == _TAB) | (text == _NEWLINE))
    lines = np.count_nonzero(text == _NEWLINE)
    if ends.size != FIELDS * lines or not (text[ends[FIELDS - 1 :: FIELDS]] == _NEWLINE).all():
        raise InputError(_miscounted(block, first_line, path))
    fields = _Fields(text, ends.reshape(lines, FIELDS), first_line, path)
    labels = fields.numbers(slice(0, 1), 10, _LABEL)[:, 0]
    odd = np.flatnonzero(fields.empty(0) | (labels < 0) | (labels > 1))
    if odd.size:
        raise fields.fault(int(odd[0]), 0, _LABEL)
    integers = fields.numbers(slice(1, 1 + DENSE), 10, "an integer or nothing")
    values = fields.numbers(slice(1 + DENSE, FIELDS), 16, "at most 8 hexadecimal digits")
    return labels.astype(np.uint8), np.log1p(np.maximum(integers, 0)).astype(np.float32), values.astype(np.uint32)


class _Fields:
    """The fields of some lines, by where they end in the text and how long they are: [N, 40] each."""

    def __init__(self, text: Bytes, ends: Numbers, first_line: int, path: Path) -> None:
        self._text, self._ends = text, ends
        self._lengths = np.diff(ends.reshape(-1), prepend=-1).reshape(ends.shape) - 1
        self._first_line, self._path = first_line, path

    def numbers(self, columns: slice, base: int, wanted: str) -> Numbers:
        """The numbers in some columns, 0 where there is none: [N, columns] int64."""
        ends, lengths = self._ends[:, columns], self._lengths[:, columns]
        negative = (lengths > 1) & (self._text[ends - lengths] == _MINUS) & (base == 10)
        digits_in = lengths - negative
        wrong = digits_in > _MOST_DIGITS[base]
        found = np.zeros_like(lengths)
        # All fields at once, place by place from the left; what stands before a shorter field counts for nothing.
        for place in range(min(int(digits_in.max(initial=0)), _MOST_DIGITS[base]), 0, -1):
            here = digits_in >= place
            digits = _DIGITS[self._text[ends - place]]
            wrong |= here & (digits >= base)
            found = found * base + here * digits
        if wrong.any():
            line, column = (int(n[0]) for n in np.nonzero(wrong))
            raise self.fault(line, column + columns.start, wanted)
        return np.where(negative, -found, found)

    def empty(self, column: int) -> npt.NDArray[np.bool_]:
        """Which lines have nothing in a column: [N] bool."""
        return self._lengths[:, column] == 0

    def fault(self, line: int, column: int, wanted: str) -> InputError:
        """What is wrong with a field."""
        end, length = int(self._ends[line, column]), int(self._lengths[line, column])
        got = self._text[end - length : end].tobytes()[:40].decode("utf-8", "replace")
        return InputError(
            f"{self._path}, line {self._first_line + line}, field {column + 1}: wanted {wanted}, got {got!r}"
        )


def _blocks(path: Path) -> Iterator[bytes]:
    """The file in pieces of whole lines."""
    rest = b""
    try:
        with path.open("rb") as file:
            compressed = file.read(len(_GZIP)) == _GZIP
            file.seek(0)
            source = gzip.GzipFile(fileobj=file) if compressed else file
            while block := source.read(_BLOCK_BYTES):
                whole, newline, rest = (rest + block.replace(b"\r", b"")).rpartition(b"\n")
                if newline:
                    yield whole + newline
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} breaks off or is damaged: {error}; fetch it again") from error
    if rest:
        yield rest + b"\n"


def _miscounted(block: bytes, first_line: int, path: Path) -> str:
    fields = [line.count(b"\t") + 1 for line in block.split(b"\n")[:-1]]
    place = next(n for n, count in enumerate(fields) if count != FIELDS)
    return (
        f"{path}, line {first_line + place}: wanted {FIELDS} fields between tabs (label, 13 integers, 26 values), got "
        f"{fields[place]}"
    )


def _hash(column: npt.NDArray[np.int32], most: int) -> int:
    """Replace the values of a feature by rows of its table, in place; returns the table's rows."""
    values = np.ascontiguousarray(column).view(np.uint32)
    occurring = 1 + int(np.count_nonzero(np.diff(np.sort(values))))
    rows = max(2, min(most, ROOM * occurring))
    column[:] = np.where(values == 0, 0, 1 + values % np.uint32(rows - 1)).astype(np.int32)
    return rows


__all__ = ["FIELDS", "ROOM", "parse_lines", "read_criteo"]
