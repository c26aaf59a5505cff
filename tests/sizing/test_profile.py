"""Access profiles keep the mass where it belongs, in little space, through files too."""

from __future__ import annotations

import copy
import json
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.sizing.streams import zipf_chances, zipf_ids
from torchrec_turbossd.errors import ConfigError, CorruptError, FormatVersionError, InputError, RowIndexError
from torchrec_turbossd.sizing import DEFAULT_ZIPF_ALPHA, AccessProfile, HitRateCurve

BILLIONS = 1_600_000_000


CURVE = {"policy": "s3_fifo", "slots": [1, 2], "hit_rates": [0.1, 0.2]}


def by_row(profile: AccessProfile) -> np.ndarray[Any, Any]:
    return np.repeat(profile.chances, profile.sizes)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0, 1.05, 1.4])
@pytest.mark.parametrize("rows", [1, 2, 511, 513, 20_000])
def test_zipf_keeps_the_mass_of_every_rank(rows: int, alpha: float) -> None:
    profile = AccessProfile.zipf(rows, alpha)
    got = np.cumsum(by_row(profile))
    assert got.size == rows
    assert np.abs(got - np.cumsum(zipf_chances(rows, alpha))).max() < 2e-5


def test_zipf_is_exact_on_the_first_ranks() -> None:
    profile = AccessProfile.zipf(5000, 1.2)
    assert by_row(profile)[:500] == pytest.approx(zipf_chances(5000, 1.2)[:500], rel=1e-4)


def test_a_billion_rows_take_milliseconds_and_little_space() -> None:
    start = time.perf_counter()
    profile = AccessProfile.zipf(BILLIONS, DEFAULT_ZIPF_ALPHA)
    rate = HitRateCurve(profile).hit_rate(BILLIONS // 100)
    assert time.perf_counter() - start < 1.0
    assert len(profile) < 2000 and profile.rows == BILLIONS
    assert sum(size for size, _ in profile) == BILLIONS
    assert sum(size * chance for size, chance in profile) == pytest.approx(1.0)
    assert 0.6 < rate < 0.9


def test_counts_become_chances_hottest_first() -> None:
    profile = AccessProfile.from_counts(torch.tensor([0, 6, 1, 1, 0, 2]))
    assert list(profile) == [(1, 0.6), (1, 0.2), (2, 0.1), (2, 0.0)]
    assert profile == AccessProfile.from_counts(np.array([1.0, 1.0, 6.0, 2.0, 0.0, 0.0]))


def test_many_different_counts_are_merged_without_losing_mass() -> None:
    counts = np.random.default_rng(3).pareto(1.1, 50_000) + 1
    profile = AccessProfile.from_counts(counts)
    assert len(profile) < 1200 and profile.rows == 50_000
    exact = np.cumsum(np.sort(counts)[::-1]) / counts.sum()
    assert np.abs(np.cumsum(by_row(profile)) - exact).max() < 2e-3


def test_a_trace_leaves_room_for_rows_it_lacks() -> None:
    # Two rows seen once, one twice: d = 2 / 4, and five rows give it up to the five not seen.
    profile = AccessProfile.from_trace(torch.tensor([5, 5, 5, 5, 1, 1, 1, 2, 3, 4, 4]), rows=10)
    assert list(profile) == [
        (size, pytest.approx(count / 11)) for size, count in [(1, 3.5), (1, 2.5), (1, 1.5), (2, 0.5), (5, 0.5)]
    ]


def test_a_trace_with_every_row_is_taken_as_it_is() -> None:
    profile = AccessProfile.from_trace(np.array([[0, 1], [1, 2]]), rows=3)
    assert list(profile) == [(1, 0.5), (2, 0.25)]


def test_a_trace_of_single_lookups_never_makes_unseen_rows_likelier() -> None:
    profile = AccessProfile.from_trace(np.arange(50), rows=60)
    assert profile.chances[0] >= profile.chances[-1] > 0


def test_a_trace_predicts_traffic_it_has_not_seen() -> None:
    ids = zipf_ids(4000, 1.0, 12_000, seed=4)
    true = HitRateCurve(AccessProfile.zipf(4000, 1.0))
    seen = HitRateCurve(AccessProfile.from_trace(np.array(ids), 4000))
    for slots in (40, 400, 2000):
        assert abs(seen.hit_rate(slots) - true.hit_rate(slots)) < 0.03


def test_distinct_counts_rows_not_lookups() -> None:
    uniform = AccessProfile.zipf(100, 0.0)
    assert uniform.distinct(0) == 0
    assert uniform.distinct(1) == pytest.approx(1)
    assert uniform.distinct(300) == pytest.approx(100 * (1 - 0.99**300))
    assert AccessProfile.zipf(1, 1.0).distinct(5) == 1


def test_equal_profiles_are_equal_and_copies_too() -> None:
    profile = AccessProfile.zipf(3000, 1.1)
    for twin in (AccessProfile.zipf(3000, 1.1), copy.deepcopy(profile), pickle.loads(pickle.dumps(profile))):
        assert twin == profile and hash(twin) == hash(profile)
    assert profile != AccessProfile.zipf(3000, 1.2) and profile != AccessProfile.zipf(3001, 1.1)
    with pytest.raises(ValueError, match="read-only"):
        profile.chances[0] = 0


def test_a_file_gives_back_the_same_profile(tmp_path: Path) -> None:
    profile = AccessProfile.from_counts(torch.arange(700))
    profile.save(tmp_path / "p.json")
    assert AccessProfile.load(tmp_path / "p.json") == profile
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"rows": 5},
        {"rows": 10**30},
        {"sizes": [1]},
        {"sizes": [-1, 4]},
        {"sizes": [1.9, 2.1]},
        {"sizes": ["1", "2"]},
        {"sizes": [True, 2]},
        {"sizes": [float("inf"), 2]},
        {"sizes": [10**30, 2]},
        {"sizes": [2**63 - 1, 2**63 - 1, 5], "chances": [0.1, 0.1, 0.1]},
        {"chances": None},
        {"chances": [0.5, 0.9]},
        {"chances": ["0.5", "0.25"]},
        {"chances": [10**400, 0.25]},
        {"chances": [True, 0]},
        {"lookups": -1},
        {"lookups": 10**30},
        {"colour": "red"},
        {"curves": {}},
        {"curves": [1]},
        {"curves": [{**CURVE, "policy": "oracle"}]},
        {"curves": [{**CURVE, "policy": "\ud800"}]},
        {"curves": [{**CURVE, "colour": "red"}]},
        {"curves": [{**CURVE, "slots": [1, 4]}]},
        {"curves": [{**CURVE, "slots": [1, 10**30]}]},
        {"curves": [{**CURVE, "slots": [1.0, 2.0]}]},
        {"curves": [{**CURVE, "hit_rates": ["0.1", "0.2"]}]},
        {"curves": [CURVE, CURVE]},
        {"version": 0},
        {"version": -1},
        {"version": 1.5},
        {"version": True},
        {"version": float("nan")},
        {"version": "1"},
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "p.json"
    AccessProfile.from_counts(torch.tensor([2, 1, 1])).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CorruptError, match=r"p\.json"):
        AccessProfile.load(path)


def test_what_is_written_is_read_with_its_curves(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    AccessProfile.from_counts(torch.tensor([2, 1, 1])).save(path)
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "curves": [CURVE]}))
    assert [c.slots.tolist() for c in AccessProfile.load(path).curves] == [[1, 2]]
    # Of the first version.
    path.write_text(json.dumps({k: whole[k] for k in ("format", "rows", "sizes", "chances")} | {"version": 1}))
    assert AccessProfile.load(path).rows == 3
    # A link stays one.
    (tmp_path / "link").symlink_to(path)
    AccessProfile.zipf(7).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and AccessProfile.load(path).rows == 7


@pytest.mark.parametrize("sizes", [[1.0, 2.0], ["1", "2"], [10**30, 1], [True, False]])
def test_sizes_are_not_made_to_fit(sizes: list[Any]) -> None:
    with pytest.raises(ConfigError, match="sizes must be whole numbers of 64 bits"):
        AccessProfile(3, np.array(sizes), np.array([0.5, 0.25]))


def test_counts_of_other_kinds() -> None:
    assert AccessProfile.from_counts(torch.tensor([1, 3], dtype=torch.bfloat16)).chances[0] == 0.75
    for counts in (torch.tensor([1j, 1]), np.array([1, 2], dtype="m8[s]"), np.array(["1", "2"])):
        with pytest.raises(InputError, match="real numbers"):
            AccessProfile.from_counts(counts)


def test_files_that_are_not_profiles_or_newer_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    for text in ("", "[]", '{"rows": 1', 100_000 * "[" + 100_000 * "]", '{"format": ' + 5000 * "9" + "}"):
        path.write_text(text)
        with pytest.raises(CorruptError):
            AccessProfile.load(path)
    AccessProfile.zipf(3).save(path)
    path.write_text(path.read_text().replace('"version": 2', '"version": 3'))
    with pytest.raises(FormatVersionError, match="upgrade"):
        AccessProfile.load(path)
    with pytest.raises(FileNotFoundError):
        AccessProfile.load(tmp_path / "absent")


@pytest.mark.parametrize("rows", [0, -3, 2.5, True, float("nan"), 2**63])
def test_absurd_rows(rows: Any) -> None:
    with pytest.raises(ConfigError, match="rows must be a positive int"):
        AccessProfile.zipf(rows)


@pytest.mark.parametrize("alpha", [-0.1, float("nan"), float("inf")])
def test_absurd_exponents(alpha: float) -> None:
    with pytest.raises(ConfigError, match="exponent"):
        AccessProfile.zipf(10, alpha)


@pytest.mark.parametrize(
    "counts", [[], [[1, 2]], [0, 0], [1, -1], [1.0, float("nan")], [1.0, float("inf")], [True, False]]
)
def test_absurd_counts(counts: list[Any]) -> None:
    with pytest.raises(InputError, match="counts must be"):
        AccessProfile.from_counts(torch.tensor(counts))


def test_absurd_traces() -> None:
    for ids in (torch.tensor([]), torch.tensor([0.5]), torch.empty(0, dtype=torch.int64)):
        with pytest.raises(InputError, match="integer id"):
            AccessProfile.from_trace(ids, 4)
    for bad in (-1, 4):
        with pytest.raises(RowIndexError, match="rows 0 to 3"):
            AccessProfile.from_trace(torch.tensor([0, bad]), 4)
