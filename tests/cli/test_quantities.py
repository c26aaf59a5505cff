"""Sizes, speeds and counts mean what people mean by them."""

from __future__ import annotations

import pytest

from torchrec_turbossd.cli.quantities import (
    human_count,
    human_ms,
    human_ranks,
    human_size,
    human_speed,
    parse_count,
    parse_number,
    parse_size,
    parse_speed,
)


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (40, 40 << 30),
        (0.5, 1 << 29),
        ("40 GiB", 40 << 30),
        ("40", 40 << 30),
        ("80GB", 80 * 10**9),
        ("80 gb", 80 * 10**9),
        ("1.5 TiB", 3 << 39),
        ("512M", 512 << 20),
        ("512 MB", 512 * 10**6),
        ("1_000 B", 1000),
        ("4096b", 4096),
    ],
)
def test_sizes(given: object, size: int) -> None:
    assert parse_size(given) == size


@pytest.mark.parametrize("given", ["", "x", "40 XB", "-1 GiB", 0, -1, True, None, [1], float("nan"), "0 GiB", "1e999"])
def test_what_is_no_size(given: object) -> None:
    with pytest.raises((ValueError, OverflowError)):
        parse_size(given)


@pytest.mark.parametrize(
    ("given", "speed"), [(2, 2e9), ("2", 2e9), ("3.35 TB/s", 3.35e12), ("1 GiB/s", 2.0**30), ("5 B/s", 5.0)]
)
def test_speeds(given: object, speed: float) -> None:
    assert parse_speed(given) == speed


@pytest.mark.parametrize("given", ["3 TB", 0, "fast", True, "0 GB/s"])
def test_what_is_no_speed(given: object) -> None:
    with pytest.raises(ValueError):
        parse_speed(given)


def test_counts_and_numbers() -> None:
    assert [parse_count(c) for c in (5, "1e9", "1_600_000_001", 2.0)] == [5, 10**9, 1_600_000_001, 2]
    assert [parse_number(c) for c in (0, "1e-3", 1.05)] == [0, 0.001, 1.05]
    for parse, wrong in ((parse_count, 0), (parse_count, 1.5), (parse_count, "five"), (parse_number, -1)):
        with pytest.raises(ValueError):
            parse(wrong)


def test_what_people_read() -> None:
    sizes = [human_size(s) for s in (0, 512, 2048, 3 << 20, 63.25 * 2**30, 3 << 40)]
    assert sizes == ["0 B", "512 B", "2.00 KiB", "3.00 MiB", "63.2 GiB", "3.00 TiB"]
    assert [human_speed(s) for s in (963e9, 3.35e12, 5e6, 7)] == ["963 GB/s", "3.35 TB/s", "5.00 MB/s", "7 B/s"]
    assert [human_count(c) for c in (0, 812, 4100, 25.6e6, 1.6e9, 0.5)] == [
        "0",
        "812",
        "4.10 k",
        "25.6 M",
        "1.60 G",
        "0.50",
    ]
    assert [human_ms(m) for m in (0, 0.004, 0.31, 12.34, 1234.5)] == ["0", "0.004", "0.31", "12.3", "1,234"]
    assert human_ranks([8, 0, 1, 2, 3, 3]) == "0-3,8"
