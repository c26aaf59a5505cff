"""Hit-rate curves agree with caches run lookup by lookup, and invert exactly."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sizing.streams import clock_hit_rate, lru_hit_rate, s3_fifo_hit_rate, zipf_ids
from torchrec_turbossd.errors import ConfigError
from torchrec_turbossd.sizing import DEFAULT_POLICY, AccessProfile, HitRateCurve, ShardCurve

ROWS, LOOKUPS = 2000, 60_000
POLICIES = ("s3_fifo", "clock", "lru")


@pytest.mark.parametrize("alpha", [0.7, 1.05, 1.3])
@pytest.mark.parametrize("slots", [20, 100, 600, 1500])
def test_predicted_within_a_point_of_simulated(alpha: float, slots: int) -> None:
    ids = zipf_ids(ROWS, alpha, LOOKUPS, seed=slots)
    profile = AccessProfile.zipf(ROWS, alpha)
    assert abs(HitRateCurve(profile, "lru").hit_rate(slots) - lru_hit_rate(ids, slots)) < 0.012
    assert abs(HitRateCurve(profile, "clock").hit_rate(slots) - clock_hit_rate(ids, slots)) < 0.012
    assert abs(HitRateCurve(profile, "s3_fifo").hit_rate(slots) - s3_fifo_hit_rate(ids, slots)) < 0.012


def test_s3_fifo_is_the_default_and_beats_clock_which_beats_lru() -> None:
    profile = AccessProfile.zipf(ROWS, 1.05)
    default, s3_fifo, clock, lru = (HitRateCurve(profile, policy) for policy in (None, *POLICIES))
    assert default.policy == DEFAULT_POLICY == "s3_fifo" and default.hit_rate(100) == s3_fifo.hit_rate(100)
    assert s3_fifo.hit_rate(100) > clock.hit_rate(100) + 0.05
    assert clock.hit_rate(100) > lru.hit_rate(100) + 0.005


@pytest.mark.parametrize(
    ("alpha", "golden"),
    [
        (0.8, (0.2896, 0.4495, 0.5373, 0.6802)),
        (0.95, (0.4715, 0.6303, 0.7036, 0.8078)),
        (1.05, (0.6017, 0.7433, 0.8014, 0.8771)),
        (1.2, (0.7708, 0.8721, 0.9066, 0.9464)),
    ],
)
def test_golden_curves(alpha: float, golden: tuple[float, ...]) -> None:
    """A simulation of 600,000 lookups, the second half counted, is within 0.002 of each of these."""
    curve = HitRateCurve(AccessProfile.zipf(20_000, alpha))
    assert curve.hit_rate(np.array([200, 1000, 2000, 5000])) == pytest.approx(golden, abs=5e-4)


def test_a_curve_of_a_billion_rows_is_soon_there() -> None:
    started = time.perf_counter()
    HitRateCurve(AccessProfile.zipf(1_000_000_000)).hit_rate(10.0**8)
    assert time.perf_counter() - started < 2.0


def test_a_uniform_table_hits_in_proportion() -> None:
    slots = np.array([0, 1, 250, 999, 1000])
    for policy in POLICIES:
        curve = HitRateCurve(AccessProfile.zipf(1000, 0.0), policy)
        assert curve.hit_rate(slots) == pytest.approx(slots / 1000, abs=1e-3)


profiles = st.one_of(
    st.builds(AccessProfile.zipf, st.integers(1, 3000), st.floats(0, 2.5)),
    st.lists(st.integers(0, 50), min_size=1, max_size=60)
    .filter(any)
    .map(lambda counts: AccessProfile.from_counts(np.array(counts))),
)


@given(profiles, st.sampled_from(POLICIES), st.floats(0, 1))
def test_curves_rise_to_one_and_invert(profile: AccessProfile, policy: str, wanted: float) -> None:
    curve = HitRateCurve(profile, policy)
    rates = curve.hit_rate(np.arange(profile.rows + 1))
    assert rates[0] == 0 and rates[-1] == 1 and curve.hit_rate(profile.rows * 2) == 1
    assert (np.diff(rates) >= 0).all()
    slots = curve.slots_for(wanted)
    assert 0 <= slots <= profile.rows
    assert curve.hit_rate(slots) >= wanted
    assert slots == 0 or curve.hit_rate(slots - 1) < wanted


def test_rows_never_asked_for_need_no_slot() -> None:
    curve = HitRateCurve(AccessProfile.from_counts(np.array([4, 3, 0, 0, 0, 0])))
    assert curve.slots_for(1.0) == 2 and curve.hit_rate(2) == 1


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.3])
def test_slots_come_back_from_their_own_hit_rate(alpha: float) -> None:
    curve = HitRateCurve(AccessProfile.zipf(3000, alpha))
    slots = np.arange(3001)
    assert (curve.slots_for(curve.hit_rate(slots)) == slots).all()


def test_arrays_give_what_numbers_give() -> None:
    curve = HitRateCurve(AccessProfile.zipf(500))
    slots, rates = np.array([[1, 5], [50, 500]]), np.array([0.0, 0.3, 0.99, 1.0])
    assert curve.hit_rate(slots).tolist() == [[curve.hit_rate(1), curve.hit_rate(5)], [curve.hit_rate(50), 1.0]]
    assert curve.slots_for(rates).tolist() == [curve.slots_for(float(rate)) for rate in rates]
    assert isinstance(curve.hit_rate(3), float) and isinstance(curve.slots_for(0.3), int)


def test_a_shard_of_a_table_hits_like_the_table() -> None:
    whole = HitRateCurve(AccessProfile.zipf(8000))
    shard = ShardCurve(whole, 4.0)
    assert shard.hit_rate(np.array([0.0, 50.0, 2000.0])).tolist() == [0.0, whole.hit_rate(200), 1.0]
    with pytest.raises(ConfigError):
        ShardCurve(whole, 0.5)


def test_absurd_arguments() -> None:
    curve = HitRateCurve(AccessProfile.zipf(10))
    with pytest.raises(ConfigError, match="clock, lru, s3_fifo"):
        HitRateCurve(AccessProfile.zipf(10), "belady")
    for slots in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match="slots"):
            curve.hit_rate(slots)
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            curve.slots_for(rate)
