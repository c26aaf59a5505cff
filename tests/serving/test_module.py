"""What the serving module promises besides right answers: its arguments, its errors, its folder."""

from __future__ import annotations

import gc
import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode

from tests.serving.serving_kit import SPECS, every_row, ids
from torchrec_turbossd.cache import BYTES_PER_SLOT
from torchrec_turbossd.errors import (
    BudgetError,
    ClosedError,
    ConfigError,
    ForeignDirectoryError,
    FormatVersionError,
    InputError,
    SnapshotError,
    StoreLockedError,
    UnknownTableError,
    UnsupportedError,
)
from torchrec_turbossd.rows import quantise
from torchrec_turbossd.serving import TurboSSDInferenceModule
from torchrec_turbossd.serving.sizing import GIB
from torchrec_turbossd.sizing import AccessProfile, HitRateCurve
from torchrec_turbossd.sizing.memory import DEVICE_BYTES_PER_SLOT
from torchrec_turbossd.tables import InitRule

build = TurboSSDInferenceModule.from_embedding_specs


def test_updates_are_checked_before_tensors_are_changed(module: TurboSSDInferenceModule) -> None:
    rows, where = torch.randn(3, 8), ids(4, 4, 5)
    given = rows.clone(), where.clone()
    module.streaming_update(where, rows, "a")
    assert torch.equal(rows, given[0]) and torch.equal(where, given[1])


def test_last_of_repeated_ids_and_every_width(module: TurboSSDInferenceModule) -> None:
    rows = torch.randn(3, 8)
    want = quantise(rows, SparseType.INT8)
    module.streaming_update(ids(7, 3, 7), rows, "a")
    expected = every_row(module)
    for width in (12, 16, module.max_D_cache):
        padded = torch.full((3, width), 77, dtype=torch.uint8)
        padded[:, :12] = want
        module.streaming_update(ids(7, 3, 7), torch.zeros(3, 8), "a")
        module.streaming_update(ids(7, 3, 7), padded, "a")
        assert torch.equal(every_row(module), expected)


def test_empty_updates(module: TurboSSDInferenceModule) -> None:
    before = every_row(module)
    assert module.streaming_update(ids(), torch.empty(0, 8), "a", 4)
    assert module.streaming_update(ids(), torch.empty(0, 8))
    assert module.version == 4
    assert torch.equal(every_row(module), before)


def test_ids_beyond_int32(tmp_path: Path) -> None:
    """A table of two billion rows opens at once, on a disk that holds none of them."""
    rows = 2**31 + 10
    with build([("a", rows, 4, SparseType.INT8)], tmp_path, device="cpu", cache_hit_rate=0.01) as module:
        far = ids(rows - 1, 5, 2**31)
        module.streaming_update(far, torch.tensor([[1.0] * 4, [2.0] * 4, [3.0] * 4]), "a")
        assert module(far, ids(0, 1, 2, 3))[:, 0].tolist() == [1.0, 2.0, 3.0]
        assert module(ids(9, rows - 2), ids(0, 1, 2)).abs().sum() == 0


def test_upstreams_order_of_arguments(tmp_path: Path) -> None:
    ours = list(inspect.signature(build).parameters)
    if importlib.util.find_spec("fbgemm_gpu.tbe.ssd.inference_serving"):
        from fbgemm_gpu.tbe.ssd.inference_serving import TurboSSDInferenceModule as Upstream

        theirs = list(inspect.signature(Upstream.from_embedding_specs).parameters)
        assert ours[: len(theirs)] == theirs
    options = (str(tmp_path), 1.0, 0.5, PoolingMode.MEAN, 2, 1 << 22, 3, 50, True)
    with build(SPECS, *options, device="cpu") as module:
        rocks = module.config.rocks_options
        assert (rocks.write_buffer_bytes, rocks.max_write_buffers) == (1 << 22, 3)
        assert rocks.rate_limit_bytes_per_s == 50 << 20
        assert module.tbe.options.pooling_mode == PoolingMode.MEAN
    with pytest.raises(TypeError, match="nonsense"):
        build(SPECS, tmp_path, nonsense=1)


BAD_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"cache_hit_rate": 0.0}, ConfigError, "cache_hit_rate"),
    ({"cache_hit_rate": 1.1}, ConfigError, "cache_hit_rate"),
    ({"hbm_budget_gb": -1.0}, BudgetError, "hbm_budget_gb"),
    ({"hbm_budget_gb": 1e-7}, BudgetError, "more than the budget of 107"),
    ({"ssd_shards": 0}, ConfigError, "ssd_shards"),
    ({"ssd_write_buffer_size": 0}, ConfigError, "write_buffer_bytes"),
    ({"name": "a/b"}, ConfigError, "name"),
    ({"name": ".."}, ConfigError, "name"),
    ({"pooling_mode": 7}, ConfigError, "PoolingMode"),
    ({"pooling_mode": PoolingMode.NONE}, ConfigError, "one width"),
    ({"feature_table_map": [0]}, ConfigError, "each of the 2 tables"),
    ({"feature_table_map": [0, 1, 2]}, ConfigError, "each of the 2 tables"),
    ({"output_dtype": SparseType.INT8}, UnsupportedError, "output type"),
    ({"access": {"z": AccessProfile.zipf(50)}}, UnknownTableError, "'z'"),
    ({"access": {"a": AccessProfile.zipf(51)}}, ConfigError, "51"),
    ({"default_row": {"z": 1.0}}, UnknownTableError, "'z'"),
    ({"default_row": float("nan")}, ConfigError, "finite"),
]


@pytest.mark.parametrize(("options", "error", "said"), BAD_ARGUMENTS, ids=[str(o) for o, *_ in BAD_ARGUMENTS])
def test_bad_arguments_leave_nothing(
    options: dict[str, Any], error: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        build(SPECS, tmp_path, device="cpu", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "specs",
    [
        [],
        [("a", 5, 8, SparseType.INT8), ("a", 5, 8, SparseType.INT8)],
        [("a", 0, 8, SparseType.INT8)],
        [("a", 5, 8, SparseType.BF16)],
        [("a", 5, 4, SparseType.INT2)],
        [("a", 5, 8, "int8")],
        ["a"],
    ],
    ids=str,
)
def test_bad_tables(specs: list[Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        build(specs, tmp_path, device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_slots_follow_profile_and_budget(tmp_path: Path) -> None:
    specs = [("hot", 100_000, 16, SparseType.INT8), ("cold", 100_000, 16, SparseType.INT8)]
    access = {"hot": AccessProfile.zipf(100_000, 1.3), "cold": AccessProfile.zipf(100_000, 0.3)}
    with build(specs, tmp_path, cache_hit_rate=0.8, access=access, device="cpu") as module:
        wanted = {name: max(1024, HitRateCurve(profile).slots_for(0.8)) for name, profile in access.items()}
        assert module.slots == wanted
    budget = 3_000_000
    with build(specs, tmp_path, budget / GIB, 0.8, access=access, device="cpu") as module:
        slots = module.slots
        assert slots["hot"] == wanted["hot"] and 1024 <= slots["cold"] < wanted["cold"]
        taken = module.tbe.rows.nbytes
        assert budget - 100 < taken <= budget
    least = 2 * (1025 * (20 + BYTES_PER_SLOT) + 4 * 100_000)
    with pytest.raises(BudgetError, match=f"{least:,} bytes, {least - 500_000:,} more"):
        build(specs, tmp_path, 500_000 / GIB, device="cpu")


def test_estimate_counts_the_slot_map() -> None:
    specs = [("a", 1_600_000_000, 128, SparseType.INT8)]
    slots = HitRateCurve(AccessProfile.zipf(1_600_000_000)).slots_for(0.9)
    bytes_ = (slots + 1) * (144 + DEVICE_BYTES_PER_SLOT) + 4 * 1_600_000_000
    assert TurboSSDInferenceModule.estimate_hbm_gb(specs) == pytest.approx(bytes_ / GIB)
    assert TurboSSDInferenceModule.estimate_hbm_gb(specs, 0.5) < TurboSSDInferenceModule.estimate_hbm_gb(specs)


def test_what_a_module_says_of_itself(module: TurboSSDInferenceModule, tmp_path: Path) -> None:
    assert module.embedding_specs == SPECS
    assert module.max_D_cache == 16
    assert module.slots == {"a": 50, "b": 20} and module.dram_slots == {"a": 0, "b": 0}
    assert module.directory == tmp_path / "m"
    assert module.get_read_hit_rate_stats() == (0, 0, 0)
    module(ids(1, 1, 2, 3), ids(0, 3, 4))
    module(ids(1, 3), ids(0, 1, 2))
    assert module.get_read_hit_rate_stats() == (3, 3, 6)
    assert module.get_read_hit_rate_stats() == (0, 0, 0)
    stats = module.read_stats()
    assert (stats["a"].read_hit_count, stats["a"].read_miss_count, stats["a"].read_total_count) == (2, 2, 4)
    assert (stats["b"].read_hit_count, stats["b"].read_miss_count, stats["b"].read_total_count) == (1, 1, 2)


def test_nested_in_inference_mode(module: TurboSSDInferenceModule) -> None:
    with torch.inference_mode():
        first = every_row(module)
    module.streaming_update(ids(1), torch.ones(1, 8), "a")
    with torch.inference_mode():
        assert not torch.equal(every_row(module), first)
    assert not torch.equal(every_row(module), first)


def test_torchrec_configs(tmp_path: Path) -> None:
    modules = pytest.importorskip("torchrec.modules.embedding_configs")
    config = modules.EmbeddingBagConfig(
        name="a", num_embeddings=50, embedding_dim=8, feature_names=["x", "y"], pooling=modules.PoolingType.MEAN
    )
    with build([config, SPECS[1]], tmp_path, device="cpu", pooling_mode=PoolingMode.MEAN) as module:
        assert module(ids(1, 2, 3), ids(0, 1, 2, 3)).shape == (1, 20)
        assert module.embedding_specs == [("a", 50, 8, SparseType.FP32), SPECS[1]]
    with pytest.raises(ConfigError, match="'a' asks for MEAN pooling, pooling_mode is SUM"):
        build([config], tmp_path, device="cpu")


def test_weights_have_no_meaning_without_pooling(tmp_path: Path) -> None:
    with build(SPECS[:1], tmp_path, device="cpu", pooling_mode=PoolingMode.NONE) as module:
        assert module(ids(1, 2), ids(0, 2)).shape == (2, 8)
        with pytest.raises(InputError, match="without pooling"):
            module(ids(1, 2), ids(0, 2), torch.ones(2))


@pytest.mark.parametrize("weights_type", [torch.float16, torch.float64])
def test_weights_of_any_float_type(weights_type: torch.dtype, module: TurboSSDInferenceModule) -> None:
    weights = torch.tensor([0.5, 2.0])
    want = module(ids(1, 2), ids(0, 1, 2), weights)
    assert torch.equal(module(ids(1, 2), ids(0, 1, 2), weights.to(weights_type)), want)


def test_default_row(tmp_path: Path) -> None:
    rules = {"a": 0.5, "b": InitRule(seed=1, high=1.0)}
    options = {"device": "cpu", "name": "m", "output_dtype": SparseType.FP32}
    with build(SPECS, tmp_path, default_row=rules, **options) as module:
        first = every_row(module)
        assert (first[:50, :8] == 0.5).all() and len(first[:20, 8:].unique()) > 40
    with build(SPECS, tmp_path, **options) as module:
        assert torch.equal(every_row(module), first), "the rule is kept with the rows"
    with build(SPECS, tmp_path, default_row=2.0, **options) as module:
        assert (every_row(module) == 2.0).all()


def test_modules_share_a_directory(tmp_path: Path) -> None:
    with build(SPECS, tmp_path, device="cpu") as first, build(SPECS, tmp_path, device="cpu") as second:
        first.streaming_update(ids(1), torch.ones(1, 8), "a")
        assert float(second(ids(1), ids(0, 1, 1)).sum()) == 0.0
        assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == [], "modules without a name leave nothing"


def test_a_name_is_open_once(module: TurboSSDInferenceModule, tmp_path: Path) -> None:
    before = every_row(module)
    with pytest.raises(StoreLockedError, match="another name"):
        build(SPECS, tmp_path, device="cpu", name="m")
    assert torch.equal(every_row(module), before)


def test_a_name_holds_its_tables(module: TurboSSDInferenceModule, tmp_path: Path) -> None:
    module.close()
    other = [("a", 50, 4, SparseType.FP16), ("c", 20, 4, SparseType.FP32)]
    with pytest.raises(ConfigError, match=r"'a' is 50 x 8 INT8 there and 50 x 4 FP16 in the module; 'c' is not there"):
        build(other, tmp_path, device="cpu", name="m")
    build(SPECS[1:], tmp_path, device="cpu", name="m").close()


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "m" / "gen-3").mkdir(parents=True)
    (tmp_path / "m" / "gen-3" / "photos").touch()
    (tmp_path / "file").touch()
    for name in ("m", "file"):
        with pytest.raises(ForeignDirectoryError):
            build(SPECS, tmp_path, device="cpu", name=name)
    assert (tmp_path / "m" / "gen-3" / "photos").exists()


def test_a_folder_of_a_newer_release_is_refused_and_left_alone(module: TurboSSDInferenceModule, tmp_path: Path) -> None:
    before = every_row(module)
    module.close()
    (info,) = tmp_path.glob("m/gen-*/GENERATION.json")
    body = json.loads(info.read_text())
    info.write_text(json.dumps({**body, "format_version": body["format_version"] + 1}))
    with pytest.raises(FormatVersionError, match="newer release"):
        build(SPECS, tmp_path, device="cpu", name="m")
    info.write_text(json.dumps(body))
    with build(SPECS, tmp_path, device="cpu", name="m", output_dtype=module.config.output_dtype) as again:
        assert torch.equal(every_row(again), before)


def test_a_batch_beyond_the_slots_is_right_and_warns_once(tmp_path: Path) -> None:
    every = torch.arange(5000)
    options: dict[str, Any] = {"cache_hit_rate": 0.01, "output_dtype": SparseType.FP32}
    with build([("a", 5000, 4, SparseType.FP32)], tmp_path, device="cpu", **options) as module:
        module.streaming_update(every, every.float()[:, None].repeat(1, 4), "a")
        assert module.slots["a"] < 5000
        with pytest.warns(RuntimeWarning, match="raise the memory budget") as caught:
            for _ in range(2):
                assert torch.equal(module(every, torch.arange(5001))[:, 0], every.float())
        assert len(caught) == 1


def test_after_close(tmp_path: Path) -> None:
    module = build(SPECS, tmp_path, device="cpu", name="m")
    module.close()
    module.close()
    calls = [
        lambda: module(ids(1), ids(0, 1, 1)),
        lambda: module.streaming_update(ids(1), torch.ones(1, 8), "a"),
        lambda: module.save_snapshot(tmp_path / "s"),
        lambda: module.load_snapshot(tmp_path / "s"),
        module.flush,
    ]
    for call in calls:
        with pytest.raises(ClosedError):
            call()
    assert not (tmp_path / "s").exists()


def test_a_dropped_module_gives_its_folder_back(tmp_path: Path) -> None:
    module = build(SPECS, tmp_path, device="cpu")
    del module
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_snapshots_need_a_free_path(module: TurboSSDInferenceModule, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    with pytest.raises(SnapshotError, match="not empty"):
        module.save_snapshot(tmp_path / "taken")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "taken"]


KILLED = """
import os, sys, torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torchrec_turbossd.serving import TurboSSDInferenceModule
module = TurboSSDInferenceModule.from_embedding_specs(
    [("a", 50, 8, SparseType.FP32)], sys.argv[1], device="cpu", name="m")
for value in range(1, 6):
    module.streaming_update(torch.arange(50), torch.full((50, 8), float(value)), "a")
os.kill(os.getpid(), 9)
"""


def test_an_update_that_returned_survives_a_kill(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    with build([("a", 50, 8, SparseType.FP32)], tmp_path, device="cpu", name="m") as module:
        assert (module(torch.arange(50), torch.arange(51)) == 5.0).all()


def test_an_update_in_the_store_is_made_even_if_slots_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with build(SPECS, tmp_path, device="cpu", output_dtype=SparseType.FP32) as module:
        every_row(module)
        usual = module.tbe.rows.memory.write

        def fail(table: int, slots: torch.Tensor, rows: torch.Tensor) -> None:
            if table == 1:
                raise torch.OutOfMemoryError("planted")
            usual(table, slots, rows)

        both = torch.zeros(2, module.max_D_cache, dtype=torch.uint8)
        both[0, :12] = quantise(torch.ones(1, 8), SparseType.INT8)
        both[1, :16] = quantise(torch.ones(1, 4), SparseType.FP32)
        with monkeypatch.context() as patch:
            patch.setattr(module.tbe.rows.memory, "write", fail)
            module.streaming_update(ids(3, 50 + 3), both)
        out = module(ids(3, 3), ids(0, 1, 2))
        assert (out == 1.0).all(), "all of the update, or none of it"
        module.tbe.rows.cache.check()


def test_a_snapshot_within_the_own_folder_is_refused(tmp_path: Path) -> None:
    with build(SPECS, tmp_path, device="cpu", name="m") as module, pytest.raises(SnapshotError, match="own folder"):
        module.save_snapshot(module.directory / "snapshot")
    build(SPECS, tmp_path, device="cpu", name="m").close()
