"""Sizes, speeds and counts as people write them: "40 GiB", "3.35 TB/s", "1e9", 20."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

GIB = 2**30
_SIZES_END = 2**63
_SLOWEST, _FASTEST = 1.0, 1e18
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Commas only between thousands, and no zero in front, which means octal to some.
_NUMBER = r"\s*((?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9_]*|0)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+)\s*"
_SIZE = re.compile(_NUMBER + r"([KMGT]?)(i?)B?\s*", re.IGNORECASE)
_SPEED = re.compile(_NUMBER + r"([KMGT]?)(i?)B/s\s*", re.IGNORECASE)
_COUNT = re.compile(_NUMBER)


def parse_size(given: object) -> int:
    """Bytes of a number, which counts GiB, or of text such as "40 GiB", "80GB" or "512M" ("M" is MiB, as "MiB").

    Raises:
        ValueError: anything else, less than a byte, or 8 EiB and more.
    """
    if not isinstance(given, str):
        return _whole_bytes(_number(given) * GIB)
    found = _SIZE.fullmatch(given)
    if found is None:
        raise ValueError
    digits, unit, binary = found.groups()
    if not unit:
        # A bare number is GiB wherever it is written; bytes say so.
        return _whole_bytes(_digits(digits) * (1 if given.rstrip().upper().endswith("B") else GIB))
    decimal = not binary and given.rstrip().upper().endswith("B")
    return _whole_bytes(_digits(digits) * (_UNITS if decimal else _BINARY)[unit.upper()])


def parse_speed(given: object) -> float:
    """Bytes per second of a number, which counts GB/s, or of text such as "3.35 TB/s" or "600 GiB/s".

    Raises:
        ValueError: anything else, or nothing from a byte to 1e18 bytes a second.
    """
    if not isinstance(given, str):
        return _between(_number(given) * 1e9)
    if _COUNT.fullmatch(given):
        return _between(_digits(given.strip()) * 1e9)
    found = _SPEED.fullmatch(given)
    if found is None:
        raise ValueError
    digits, unit, binary = found.groups()
    return _between(_digits(digits) * (_BINARY if binary and unit else _UNITS)[unit.upper()])


def parse_count(given: object) -> int:
    """A whole number above 0, also written as 1e9, which YAML takes for text.

    Raises:
        ValueError: anything else.
    """
    value = _digits(given.strip()) if isinstance(given, str) and _COUNT.fullmatch(given) else _number(given)
    if value < 1 or value != int(value):
        raise ValueError
    return int(value)


def parse_number(given: object) -> float:
    """A finite number that is not negative.

    Raises:
        ValueError: anything else.
    """
    value = _digits(given.strip()) if isinstance(given, str) and _COUNT.fullmatch(given) else _number(given)
    if value < 0:
        raise ValueError
    return value


def human_size(size: float) -> str:
    """Bytes in the largest unit of which there is at least one, in three digits or more."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= scale:
            return f"{_three(size / scale)} {unit}"
    return f"{size:,.0f} B"


def human_speed(speed: float) -> str:
    """Bytes per second."""
    for unit, scale in (("TB/s", 1e12), ("GB/s", 1e9), ("MB/s", 1e6)):
        if speed >= scale:
            return f"{_three(speed / scale)} {unit}"
    return f"{speed:,.0f} B/s"


def human_count(count: float) -> str:
    """A count in three digits: 812, 4.1 k, 25.6 M, 1.60 G."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{_three(count / scale)} {unit}"
    return f"{count:,.0f}" if count == int(count) else _three(count)


def human_ms(ms: float) -> str:
    """Milliseconds in three digits."""
    return "0" if ms == 0 else _three(ms) if ms >= 0.01 else f"{ms:.1g}"


def human_ranks(ranks: Sequence[int]) -> str:
    """Ranks as ranges: 0-3,8."""
    spans: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _three(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _number(given: object) -> float:
    # isfinite has an OverflowError of its own for the largest integers.
    if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
        raise ValueError
    return given


def _digits(text: str) -> float:
    bare = text.replace("_", "").replace(",", "")
    # Whole numbers stay exact.
    return int(bare) if bare.isdigit() else _number(float(bare))


def _between(speed: float) -> float:
    if not _SLOWEST <= speed <= _FASTEST:
        raise ValueError
    return float(speed)


def _whole_bytes(size: float) -> int:
    if not 1 <= size < _SIZES_END:
        raise ValueError
    return int(size)


__all__ = [
    "GIB",
    "human_count",
    "human_ms",
    "human_ranks",
    "human_size",
    "human_speed",
    "parse_count",
    "parse_number",
    "parse_size",
    "parse_speed",
]
