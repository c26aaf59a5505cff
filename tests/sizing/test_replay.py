"""Curves of traces are what the cache then does, also where the order of lookups matters."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.sizing.streams import lru_hit_rate
from tests.sizing.test_sample import zipf
from torchrec_turbossd.cache import SlotCache
from torchrec_turbossd.errors import ConfigError
from torchrec_turbossd.sizing import AccessProfile, HitRateCurve
from torchrec_turbossd.sizing.sample import Ints

ROWS, LOOKUPS, BATCH = 20_000, 280_000, 200
SHARES = (0.01, 0.05, 0.1, 0.25)


def drifting() -> Ints:
    """Half of the ranks change hands forty times."""
    rng = np.random.default_rng(7)
    ranks = zipf(LOOKUPS, seed=6).reshape(40, -1)
    who = np.arange(ROWS)
    parts = []
    for part in ranks:
        moved = rng.random(ROWS) < 0.5
        who[moved] = rng.permutation(who[moved])
        parts.append(who[part])
    return np.concatenate(parts)


def sessions() -> Ints:
    """Every row is asked for a few times within a short while, and hardly ever again."""
    rng = np.random.default_rng(8)
    starts = np.sort(rng.random(LOOKUPS // 4))
    times = (starts[:, None] + rng.exponential(1e-3, size=(len(starts), 4))).ravel()
    rows = np.repeat(rng.integers(0, ROWS, size=len(starts)), 4)
    return rows[np.argsort(times)]


def measured(trace: Ints, slots: int, policy: str = "s3_fifo") -> float:
    cache = SlotCache([ROWS], [slots], policy=policy)
    missed = 0
    for start in range(0, LOOKUPS, BATCH):
        ids = torch.from_numpy(trace[start : start + BATCH])
        found = cache.lookup(ids)
        absent = torch.unique(ids[found == 0])
        here = found[found > 0].to(torch.int64)
        cache.pin(here, 1)
        cache.commit(cache.reserve(0, absent))
        cache.pin(here, -1)
        cache.touch(0, found)
        missed += absent.numel() if start >= LOOKUPS // 2 else 0
    return 1 - missed / (LOOKUPS // 2)


@pytest.mark.parametrize(
    "stream", [lambda: zipf(LOOKUPS, seed=5), drifting, sessions], ids=["zipf", "drift", "sessions"]
)
def test_a_sampled_trace_predicts_within_three_points(stream: Callable[[], Ints]) -> None:
    trace = stream()
    profile = AccessProfile.from_trace(trace, ROWS, batch=BATCH, events=1 << 14)
    curve = HitRateCurve(profile)
    assert profile.lookups == LOOKUPS
    for share in SHARES:
        slots = int(ROWS * share)
        assert abs(curve.hit_rate(slots) - measured(trace, slots)) < 0.03


def test_popularity_alone_would_not_know_about_sessions() -> None:
    trace = sessions()
    profile = AccessProfile.from_trace(trace, ROWS, batch=BATCH, events=1 << 14)
    bare = AccessProfile(ROWS, profile.sizes, profile.chances)
    slots = ROWS // 10
    assert abs(HitRateCurve(bare).hit_rate(slots) - measured(trace, slots)) > 0.3


def test_a_policy_is_replayed_by_name() -> None:
    trace = zipf(LOOKUPS // 4, seed=9)
    profile = AccessProfile.from_trace(trace, ROWS, batch=32, policies=("lru", "sieve"))
    assert [curve.policy for curve in profile.curves] == ["lru", "sieve"]
    assert HitRateCurve(profile, "lru").hit_rate(1000) == pytest.approx(lru_hit_rate(trace.tolist(), 1000), abs=0.01)
    # SIEVE has no formula, but this trace was replayed with it.
    assert HitRateCurve(profile, "sieve").hit_rate(1000) > HitRateCurve(profile, "lru").hit_rate(1000)
    with pytest.raises(ConfigError, match="no hit-rate model"):
        HitRateCurve(AccessProfile.zipf(10), "sieve")
    with pytest.raises(ConfigError, match="no eviction policy 'belady'"):
        AccessProfile.from_trace(trace, ROWS, policies=("belady",))


def test_a_curve_ends_in_one_and_comes_back() -> None:
    profile = AccessProfile.from_trace(zipf(LOOKUPS // 4, seed=10), ROWS, batch=BATCH)
    curve = HitRateCurve(profile)
    rates = curve.hit_rate(np.arange(ROWS + 1))
    assert rates[0] == 0 and rates[-1] == 1 and (np.diff(rates) >= 0).all()
    # The first lookup of a row is a miss however many slots there are, until every row has one.
    assert rates[-2] < 0.99
    for wanted in (0.1, 0.5, float(rates[-2]), 0.999):
        slots = curve.slots_for(wanted)
        assert curve.hit_rate(slots) >= wanted and (slots == 0 or curve.hit_rate(slots - 1) < wanted)


def test_a_short_trace_has_no_curve_of_its_own() -> None:
    assert AccessProfile.from_trace(np.arange(100), 200).curves == ()


def test_equal_traces_have_equal_profiles() -> None:
    trace = zipf(LOOKUPS // 4, seed=11)
    first, again = (AccessProfile.from_trace(trace, ROWS) for _ in range(2))
    assert first == again and first != AccessProfile(ROWS, first.sizes, first.chances)
