"""A serving module tells what it is asked for, and a cache sized by that hits as often as it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode

from tests.sizing.streams import zipf_chances
from torchrec_turbossd.errors import ClosedError, ConfigError
from torchrec_turbossd.serving import TurboSSDInferenceModule
from torchrec_turbossd.sizing import AccessProfile, HitRateCurve

ROWS, BATCHES, EACH = {"hot": 4000, "cold": 3000, "idle": 10}, 250, 400
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def module(directory: Path, device: str, access: dict[str, AccessProfile] | None = None) -> TurboSSDInferenceModule:
    specs = [(name, rows, 4, SparseType.INT8) for name, rows in ROWS.items()]
    # As many slots as half of the hot lookups need, but a thousand at the least.
    return TurboSSDInferenceModule.from_embedding_specs(
        specs, str(directory), cache_hit_rate=0.5, pooling_mode=PoolingMode.SUM, device=device, access=access
    )


def batches(seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    order = np.random.default_rng(0).permutation(ROWS["hot"])
    hot = order[rng.choice(ROWS["hot"], size=(BATCHES, EACH), p=zipf_chances(ROWS["hot"], 1.0))]
    return list(zip(hot, rng.integers(ROWS["cold"], size=(BATCHES, EACH // 4)), strict=True))


def serve(tested: TurboSSDInferenceModule, asked: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for hot, cold in asked:
        ids = torch.from_numpy(np.concatenate([hot, cold])).to(tested.config.resolved_device())
        offsets = torch.tensor([0, len(hot), ids.numel(), ids.numel()], device=ids.device)
        tested(ids, offsets)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_recorded_is_what_was_asked(tmp_path: Path, device: str) -> None:
    asked = batches(1)[:20]
    with module(tmp_path, device) as tested:
        serve(tested, asked[:5])
        with pytest.raises(ConfigError, match="record_access"):
            AccessProfile.from_cache(tested)
        tested.record_access()
        serve(tested, asked[5:])
        samples = tested.access_samples()
        for name, column in (("hot", 0), ("cold", 1)):
            (window,) = samples[name].windows()
            assert np.array_equal(window.ids, np.concatenate([batch[column] for batch in asked[5:]]))
            assert samples[name].batches == 15
        profiles = AccessProfile.from_cache(tested)
        assert set(profiles) == {"hot", "cold"} and profiles["hot"].lookups == 15 * EACH
        # A copy: what is recorded later does not change it.
        serve(tested, asked[:1])
        assert samples["hot"].batches == 15 and tested.access_samples()["hot"].batches == 16
        tested.record_access(False)
        with pytest.raises(ConfigError, match="record_access"):
            tested.access_samples()
    with pytest.raises(ClosedError):
        tested.record_access()


def test_batches_beyond_the_slots_are_recorded_too(tmp_path: Path) -> None:
    with module(tmp_path, "cpu") as tested:
        tested.record_access()
        ids = torch.arange(3500)
        with pytest.warns(RuntimeWarning, match="slots"):
            tested(ids, torch.tensor([0, 3500, 3500, 3500]))
        assert tested.access_samples()["hot"].lookups == 3500


def test_a_recorded_profile_sizes_the_next_cache(tmp_path: Path) -> None:
    with module(tmp_path / "first", "cpu") as tested:
        tested.record_access(events=1 << 13)
        serve(tested, batches(2))
        profiles = AccessProfile.from_cache(tested)
    assert profiles["hot"].curves and not profiles["cold"].curves
    with module(tmp_path / "next", "cpu", profiles) as sized:
        serve(sized, batches(3)[: BATCHES // 2])
        before = sized.read_stats()["hot"]
        serve(sized, batches(3)[BATCHES // 2 :])
        after = sized.read_stats()["hot"]
        hits = after.read_hit_count - before.read_hit_count
        rate = hits / (after.read_total_count - before.read_total_count)
        assert rate == pytest.approx(HitRateCurve(profiles["hot"]).hit_rate(sized.slots["hot"]), abs=0.03)


def test_a_budget_goes_where_the_lookups_were(tmp_path: Path) -> None:
    even = AccessProfile.zipf(50_000, 0.8)
    busy, quiet = (AccessProfile(even.rows, even.sizes, even.chances, lookups=count) for count in (9000, 1000))
    specs = [("busy", 50_000, 4, SparseType.INT8), ("quiet", 50_000, 4, SparseType.INT8)]

    def slots(name: str, **access: AccessProfile) -> dict[str, int]:
        with TurboSSDInferenceModule.from_embedding_specs(
            specs, str(tmp_path / name), 0.0012, device="cpu", access=access
        ) as tested:
            return dict(tested.slots)

    weighed = slots("weighed", busy=busy, quiet=quiet)
    assert weighed["busy"] > 3 * weighed["quiet"]
    # Where one profile does not say how many lookups it was made from, tables count alike.
    alike = slots("alike", busy=busy, quiet=even)
    assert alike["busy"] == pytest.approx(alike["quiet"], rel=0.1)


def test_slots_stop_where_more_do_nothing(tmp_path: Path) -> None:
    # Half of the lookups ask for a row that nobody asked for before.
    rng = np.random.default_rng(5)
    trace = np.where(rng.random(80_000) < 0.5, rng.integers(0, 2000, 80_000), np.arange(80_000))
    profile = AccessProfile.from_trace(trace, 80_000)
    specs = [("t", 80_000, 4, SparseType.INT8)]

    def slots(rate: float) -> int:
        with TurboSSDInferenceModule.from_embedding_specs(
            specs, str(tmp_path / str(rate)), cache_hit_rate=rate, device="cpu", access={"t": profile}
        ) as tested:
            return tested.slots["t"]

    with pytest.warns(RuntimeWarning, match=r"'t': 90.0% of lookups cannot be hit .* gets [\d,]+ slots, for 4\d"):
        assert 2000 <= slots(0.9) < 60_000
    assert slots(0.4) < 5000 and slots(1.0) == 80_000
