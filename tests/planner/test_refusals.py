"""What cannot be planned is refused with numbers and a way out."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner.types import ParameterConstraints, Topology
from torchrec.distributed.types import CacheParams

from tests.planner.models import GB, MB, Model, planner, sharders, topology
from torchrec_turbossd.errors import BudgetError, ConfigError, UnknownTableError
from torchrec_turbossd.planner import (
    TURBO_SSD,
    turbo_ssd_planner,
)
from torchrec_turbossd.sizing import AccessProfile

# 10 GB and 10 MB of float32 rows.
BIG, SMALL = ("big", 20_000_000, 128), ("small", 20_000, 128)
DEVICES = pytest.mark.parametrize("device", ["cpu", "cuda"])


def test_nothing_fits_in_fast_memory() -> None:
    made = planner(topology("cpu", fast=20 * MB))
    with pytest.raises(BudgetError) as caught:
        made.plan(Model(BIG, SMALL), sharders())
    text = str(caught.value)
    # 20 million rows of slot map alone are 76 MiB, and a bit for each is 2 more.
    assert "DRAM: the tables take at least" in text and "'big' 79." in text and "1,024 slots and slot map" in text
    assert "19.07 MiB free" in text and "short" in text
    assert "raise Topology(ddr_cap=...)" in text and "batches_in_flight" in text and "ssd_cap" not in text
    assert caught.value.__cause__ is not None


def without_ssd(device: str) -> Topology:
    where = topology(device)
    # One version reads ssd_cap=0 as its default capacity.
    for rank in where.devices:
        rank.storage.ssd = 0
    return where


@DEVICES
def test_no_room_on_ssd(device: str) -> None:
    with pytest.raises(BudgetError) as caught:
        planner(without_ssd(device)).plan(Model(BIG, SMALL), sharders())
    text = str(caught.value)
    # The small table needs none: it stays.
    assert "SSD: the tables take at least 9.54 GiB, the one rank has 0 bytes free" in text
    assert "'small'" not in text and "raise Topology(ssd_cap=...) to 9.54 GiB" in text
    assert "batch_size" not in text


def test_without_ssd_what_fits_is_planned() -> None:
    plan = planner(without_ssd("cpu")).plan(Model(SMALL), sharders())
    assert plan.plan["ebc"]["small"].compute_kernel == "fused"


def test_a_shard_that_fits_no_rank() -> None:
    constraints = {"big": ParameterConstraints(compute_kernels=["fused"], sharding_types=["table_wise"])}
    made = planner(topology("cuda", ranks=2, fast=6 * GB), constraints=constraints)
    with pytest.raises(
        BudgetError, match=r"HBM: a shard of 'big' takes at least 9\.54 GiB, the roomiest rank has 5\.59"
    ):
        made.plan(Model(BIG, SMALL), sharders())


def test_constraints_that_keep_a_table_in_memory_are_named() -> None:
    constraints = {"big": ParameterConstraints(compute_kernels=["fused"])}
    with pytest.raises(BudgetError, match=f"allow {TURBO_SSD!r} in the constraints of 'big'"):
        planner(topology("cpu"), constraints=constraints).plan(Model(BIG, SMALL), sharders())


def test_load_factors_that_are_too_large_are_named() -> None:
    constraints = {"big": ParameterConstraints(compute_kernels=[TURBO_SSD], cache_params=CacheParams(load_factor=0.5))}
    with pytest.raises(BudgetError, match="lower the load_factor of 'big'"):
        planner(topology("cpu"), constraints=constraints).plan(Model(BIG, SMALL), sharders())


def test_stock_sharders_are_found_out() -> None:
    stock: list[Any] = [EmbeddingBagCollectionSharder()]
    with pytest.raises(BudgetError, match=r"give the planner sharders of torchrec_turbossd\.sharding"):
        planner(topology("cpu")).plan(Model(BIG), stock)
    constraints = {"big": ParameterConstraints(compute_kernels=[TURBO_SSD])}
    with pytest.raises(ConfigError, match=r"need a sharder of torchrec_turbossd\.sharding"):
        planner(topology("cpu"), constraints=constraints).plan(Model(BIG), stock)


def test_a_reservation_that_takes_everything() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sparse, self.dense = Model(SMALL), nn.Linear(20_000, 20_000, device="meta")

    made = turbo_ssd_planner(topology("cuda"), 512)
    with pytest.raises(BudgetError, match="once the storage reservation is made"):
        made.plan(Dense(), sharders())


def test_profiles_must_match_the_tables() -> None:
    with pytest.raises(ConfigError, match=r"table 'small' has 20,000 rows, its access profile 7"):
        planner(topology("cpu"), access={"small": AccessProfile.zipf(7)}).plan(Model(SMALL), sharders())
    with pytest.raises(UnknownTableError, match="'smal', which the model lacks; its tables are 'small'"):
        planner(topology("cpu"), access={"smal": AccessProfile.zipf(7)}).plan(Model(SMALL), sharders())


@pytest.mark.parametrize("batch", [0, -5, 1.5, float("nan"), True, None])
def test_absurd_batches(batch: Any) -> None:
    with pytest.raises(ConfigError, match="batch_size must be a positive int"):
        turbo_ssd_planner(topology("cpu"), batch)
    with pytest.raises(ConfigError, match="batches_in_flight must be a positive int"):
        turbo_ssd_planner(topology("cpu"), 8, batches_in_flight=batch)


@pytest.mark.parametrize("kind", ["hbm", "ddr", "ssd"])
@pytest.mark.parametrize("size", [-1, float("nan"), float("inf")])
def test_absurd_capacities(kind: str, size: float) -> None:
    where = topology("cuda", ranks=2)
    setattr(where.devices[1].storage, kind, size)
    with pytest.raises(BudgetError, match=f"rank 1: {kind}_cap must be finite and not negative, got {size}"):
        turbo_ssd_planner(where, 8)


@DEVICES
def test_no_fast_memory_at_all(device: str) -> None:
    where = topology(device)
    setattr(where.devices[0].storage, "hbm" if device == "cuda" else "ddr", 0)
    with pytest.raises(BudgetError, match="_cap is 0 on a"):
        turbo_ssd_planner(where, 8)


def test_absurd_ssd_speed_and_load_factors() -> None:
    with pytest.raises(ConfigError, match="ssd_mem_bw"):
        turbo_ssd_planner(Topology(world_size=1, compute_device="cpu", ssd_mem_bw=0.0), 8)
    for factor in (0.0, -0.1, 1.1, float("nan")):
        constraints = {"t": ParameterConstraints(cache_params=CacheParams(load_factor=factor))}
        with pytest.raises(ConfigError, match="load factor is above 0 and at most 1"):
            turbo_ssd_planner(topology("cpu"), 8, constraints)
    with pytest.raises(ConfigError, match="load factor"):
        planner(topology("cpu")).plan(Model(SMALL), sharders(cache_load_factor=2.0))


def test_a_gpu_whose_host_has_no_memory_is_explained() -> None:
    model = Model(("big", 2_000_000, 64))
    on_ssd = {"big": ParameterConstraints(compute_kernels=[TURBO_SSD])}
    where = Topology(world_size=2, compute_device="cuda", hbm_cap=10**9, ddr_cap=1000, ssd_cap=10**12)
    with pytest.raises(BudgetError, match=r"DRAM: the tables take at least .* short\..* raise Topology\(ddr_cap="):
        planner(where, 64, on_ssd).plan(model, sharders())


def test_a_machine_is_no_speed() -> None:
    with pytest.raises(ConfigError, match=r"SsdSpeed, as `Machine.ssd` is one, got int"):
        turbo_ssd_planner(topology("cpu"), 64, ssd=400_000)  # type: ignore[arg-type]
