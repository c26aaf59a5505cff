"""Samples stay small, keep all lookups of the rows they keep, and join into one."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sizing.streams import zipf_chances
from torchrec_turbossd.errors import ConfigError, InputError, RowIndexError
from torchrec_turbossd.sizing import AccessProfile, AccessSample, HitRateCurve
from torchrec_turbossd.sizing.popularity import popularity
from torchrec_turbossd.sizing.sample import LEAST_EVENTS, Ints, row_hash, sample_trace

ROWS = 20_000


def zipf(count: int, seed: int, rows: int = ROWS, alpha: float = 0.9) -> Ints:
    rng = np.random.default_rng(seed)
    return rng.permutation(rows)[rng.choice(rows, size=count, p=zipf_chances(rows, alpha))]


def kept_of(trace: Ints, share: float) -> Ints:
    """Places of the lookups whose row is in a share of all rows."""
    hashes = row_hash(torch.from_numpy(trace)).numpy()
    return np.flatnonzero(hashes < share * 2**32)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=30), st.integers(0, 2**32))
def test_each_window_has_the_latest_lookups_of_its_rows(sizes: list[int], seed: int) -> None:
    trace = np.random.default_rng(seed).integers(0, 500, size=sum(sizes))
    sample = AccessSample(500, events=LEAST_EVENTS)
    numbers = np.repeat(np.arange(len(sizes)), sizes)
    for n in range(len(sizes)):
        sample.add(torch.from_numpy(trace[numbers == n]))
        if n % 7 == 3:
            # To look at a sample in between changes nothing.
            sample.windows()
    assert sample.lookups == len(trace) and sample.batches == len(sizes)
    windows = sample.windows()
    assert [w.share for w in windows] == [0.5**n for n in range(len(windows))]
    assert [w.whole for w in windows] == [False] * (len(windows) - 1) + [True]
    for window in windows:
        assert not window.left_out.size
        expected = kept_of(trace, window.share)[-LEAST_EVENTS:]
        assert np.array_equal(window.places, expected)
        assert np.array_equal(window.ids, trace[expected]) and np.array_equal(window.batches, numbers[expected])


def test_a_long_trace_takes_little_memory() -> None:
    sample = AccessSample(10**9, events=LEAST_EVENTS)
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        sample.add(torch.randint(10**9, (50_000,), generator=generator))
    assert sample.lookups == 10_000_000
    assert sample.nbytes < 16 * 2 * 24 * LEAST_EVENTS
    assert len(sample.windows()) == pytest.approx(np.log2(10_000_000 / LEAST_EVENTS), abs=2)


def test_regular_ids_do_not_make_regular_samples() -> None:
    for stride in (1, 2, 64, 1000, 2**20, 2**31):
        hashes = row_hash(torch.arange(10_000) * stride).numpy()
        for share in (0.5, 1 / 64):
            assert (hashes < share * 2**32).mean() == pytest.approx(share, rel=0.25)


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<u4", "<u8", ">u4", ">u8", ">i8", ">i2"])
def test_ids_may_be_unsigned_or_of_another_byte_order(dtype: str) -> None:
    sample = AccessSample(300)
    sample.add(np.array([[7, 200]], dtype=dtype))
    (window,) = sample.windows()
    assert window.ids.tolist() == [7, 200]


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_tensors_may_be_unsigned(dtype: torch.dtype) -> None:
    sample = AccessSample(300)
    sample.add(torch.tensor([7, 200]).to(dtype))
    (window,) = sample.windows()
    assert window.ids.tolist() == [7, 200]
    with pytest.raises(RowIndexError):
        sample.add(torch.tensor([300]).to(dtype))


def test_ids_that_no_table_has() -> None:
    with pytest.raises(RowIndexError, match="18446744073709551615"):
        AccessSample(300).add(np.array([2**64 - 1], dtype=np.uint64))
    for ids in (np.array(["a"]), np.array([1.0]), np.array([True]), torch.tensor([True]), torch.tensor([1j])):
        with pytest.raises(InputError, match="integer ids"):
            AccessSample(300).add(ids)


def test_batches_may_be_of_any_type_and_are_copied() -> None:
    sample = AccessSample(300)
    ids = torch.tensor([[1, 2], [3, 299]])
    sample.add(ids)
    ids.zero_()
    sample.add(torch.tensor([5], dtype=torch.int32))
    sample.add(np.array([7], dtype=np.uint8))
    sample.add(torch.empty(0, dtype=torch.int64))
    (window,) = sample.windows()
    assert window.ids.tolist() == [1, 2, 3, 299, 5, 7] and window.batches.tolist() == [0, 0, 0, 0, 1, 2]
    assert sample.batches == 4


def test_a_hot_row_takes_no_room_from_the_others() -> None:
    rng = np.random.default_rng(2)
    trace = rng.integers(1, 50_000, size=300_000)
    trace[rng.random(300_000) < 0.3] = 0
    trace[rng.random(300_000) < 0.1] = 9
    windows = sample_trace(trace, 50_000, batch=777, events=2048).windows()
    assert windows[0].left_out.size == 0 and set(windows[0].ids) >= {0, 9}
    assert windows[-1].whole and len(windows) <= 9
    for window in windows[1:]:
        assert window.left_out.tolist() == [0, 9]
        others = kept_of(trace, window.share)
        others = others[~np.isin(trace[others], [0, 9])][-2048:]
        assert np.array_equal(window.places, others)


@pytest.mark.parametrize(("live", "rows"), [(1, 1), (2, 2), (3, 3), (3, 10**6), (1, 10**6), (40, 41)])
def test_a_table_with_few_rows_in_use_needs_few_slots(live: int, rows: int) -> None:
    trace = np.random.default_rng(3).integers(0, live, size=80_000)
    profile = AccessProfile.from_trace(trace, rows, events=LEAST_EVENTS)
    curve = HitRateCurve(profile)
    assert curve.hit_rate(live) > 0.999 and curve.slots_for(0.9) <= live
    assert profile.chances[0] == pytest.approx(1 / live, abs=0.05) and profile.distinct(1000) <= live * 1.01


def test_batches_without_lookups_are_only_counted() -> None:
    sample = AccessSample(100)
    for number in range(1000):
        sample.add(torch.tensor([7] if number == 900 else [], dtype=torch.int64))
    assert sample.batches == 1000 and sample.nbytes < 30_000
    assert sample.windows()[0].batches.tolist() == [900]


def test_joined_shards_count_alike_however_large_a_batch_is() -> None:
    rng = np.random.default_rng(4)
    whole, shards = AccessSample(ROWS, events=2048), [AccessSample(ROWS, events=2048) for _ in range(2)]
    for _ in range(8):
        hot = rng.choice(ROWS // 2, size=5000, p=zipf_chances(ROWS // 2, 1.3))
        cold = rng.integers(ROWS // 2, ROWS, size=5000)
        for shard, ids in zip(shards, (hot, cold), strict=True):
            shard.add(ids)
        whole.add(rng.permutation(np.concatenate([hot, cold])))
    joined = AccessSample.merged(shards)
    assert joined.windows()[-1].whole
    assert (joined.windows()[0].ids < ROWS // 2).mean() == pytest.approx(0.5, abs=0.01)
    slots = np.array([100.0, 1000.0, 5000.0])
    ours, theirs = (HitRateCurve(AccessProfile.from_sample(s)).hit_rate(slots) for s in (joined, whole))
    assert ours == pytest.approx(theirs, abs=0.04)


def test_a_thinned_part_keeps_the_latest_of_each_window() -> None:
    sample = sample_trace(zipf(60_000, seed=6), ROWS, batch=100, events=8192)
    thin = sample.thinned(8)
    assert thin.lookups == sample.lookups and thin.nbytes < sample.nbytes / 2 and thin.windows()[-1].whole
    for ours, theirs in zip(thin.windows(), sample.windows(), strict=False):
        assert len(ours.ids) == min(2048, len(theirs.ids))
        assert np.array_equal(ours.places, theirs.places[-2048:]) and ours.left_out.tolist() == theirs.left_out.tolist()
    # Together, such parts make as much of a sample as one would have been.
    shards = [AccessSample(ROWS, events=8192) for _ in range(8)]
    for batch in np.split(zipf(60_000, seed=6), 60):
        for n, shard in enumerate(shards):
            shard.add(batch[batch % 8 == n])
    joined = AccessSample.merged([shard.thinned(8) for shard in shards])
    assert 6000 < len(joined.windows()[0].ids) <= 8192
    # A part that needs no less stays as it is.
    assert np.array_equal(sample.thinned(1).windows()[0].ids, sample.windows()[0].ids)


def test_row_shards_join_into_the_sample_of_the_table() -> None:
    trace = zipf(40_000, seed=3)
    whole = AccessSample(ROWS, events=2048)
    shards = [AccessSample(ROWS, events=2048) for _ in range(3)]
    for batch in np.split(trace, 80):
        whole.add(batch)
        for n, shard in enumerate(shards):
            shard.add(batch[batch % 3 == n])
    joined = AccessSample.merged([pickle.loads(pickle.dumps(shard)) for shard in shards])
    assert joined.lookups == whole.lookups and joined.batches == whole.batches
    for ours, theirs in zip(joined.windows(), whole.windows(), strict=False):
        assert min(len(ours.ids), len(theirs.ids)) > 1000
        # Each shard finds other rows hot.
        latest = [
            w.ids[(w.batches >= 78) & ~np.isin(w.ids, [*ours.left_out, *theirs.left_out])] for w in (ours, theirs)
        ]
        assert np.array_equal(*map(np.sort, latest)) and len(latest[0]) > 10
        assert (np.diff(ours.batches) >= 0).all() and (np.diff(ours.places) >= 0).all()
        # The time that it spans is told in lookups of the table.
        first = ours.batches[0]
        assert abs(int(ours.places[0]) - 500 * int(first)) <= 500
    assert joined.windows()[-1].whole


def test_samples_of_one_shard_are_that_sample() -> None:
    sample = sample_trace(zipf(9000, seed=4), ROWS, batch=100, events=LEAST_EVENTS)
    joined = AccessSample.merged([sample])
    for ours, theirs in zip(joined.windows(), sample.windows(), strict=True):
        assert np.array_equal(ours.ids, theirs.ids) and np.array_equal(ours.places, theirs.places)
        assert np.array_equal(ours.batches, theirs.batches) and ours.whole == theirs.whole


def test_popularity_of_a_sampled_trace_is_that_of_the_trace() -> None:
    trace = zipf(200_000, seed=5, alpha=1.1)
    for events in (1 << 14, 1 << 18):
        sizes, weights = popularity(sample_trace(trace, ROWS, batch=500, events=events))
        assert sizes.sum() == ROWS and (sizes > 0).all() and (np.diff(weights) <= 0).all()
        got = np.cumsum(np.repeat(weights, sizes) / (sizes @ weights))
        true = np.cumsum(zipf_chances(ROWS, 1.1))
        assert np.abs(got - true).max() < 0.04


def test_absurd_samples() -> None:
    for rows, events in ((0, 2000), (True, 2000), (5, 10), (5, 2000.0)):
        with pytest.raises(ConfigError):
            AccessSample(rows, events=events)  # type: ignore[arg-type]
    sample = AccessSample(4)
    with pytest.raises(InputError, match="integer ids"):
        sample.add(torch.tensor([0.5]))
    for bad in (-1, 4):
        with pytest.raises(RowIndexError, match="rows 0 to 3"):
            sample.add(torch.tensor([0, bad]))
    assert sample.lookups == sample.batches == 0
    with pytest.raises(ConfigError, match="one table"):
        AccessSample.merged([sample, AccessSample(5)])
    with pytest.raises(ConfigError, match="positive number of lookups"):
        sample_trace(np.arange(4), 4, batch=0)
