"""What a DRAM budget becomes: a tier behind the slots of a GPU, more slots on a CPU machine; and short memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType

from tests.serving.serving_kit import SPECS
from torchrec_turbossd.errors import BudgetError
from torchrec_turbossd.serving import TurboSSDInferenceModule
from torchrec_turbossd.serving import module as serving_module
from torchrec_turbossd.serving.config import ServingConfig
from torchrec_turbossd.serving.sizing import GIB, plan_dram_slots
from torchrec_turbossd.sizing import AccessProfile, HitRateCurve
from torchrec_turbossd.tables import TableSpec, specs_from

build = TurboSSDInferenceModule.from_embedding_specs


@pytest.mark.gpu
def test_a_gpu_has_a_dram_tier(tmp_path: Path) -> None:
    specs = [("a", 100_000, 16, SparseType.INT8), ("b", 20, 16, SparseType.INT8)]
    with build(specs, tmp_path, 0.0, 0.1, device="cuda") as module:
        assert module.dram_slots == {"a": 0, "b": 0}
    with build(specs, tmp_path, 0.0, 0.1, device="cuda", dram_budget_gb=500_000 / GIB) as module:
        # 20 bytes and a header are 32.
        assert module.dram_slots == {"a": 500_000 // 32 - 20, "b": 20}


def gpu_tables(*alphas: float) -> tuple[list[TableSpec], dict[str, AccessProfile]]:
    """Tables of 100,000 int8 rows, 20 bytes each, by the exponent of what is asked for."""
    access = {f"t{n}": AccessProfile.zipf(100_000, alpha) for n, alpha in enumerate(alphas)}
    return specs_from([(name, 100_000, 16, SparseType.INT8) for name in access]), access


def test_a_dram_budget_goes_where_it_hits_most_on_a_gpu() -> None:
    tables, access = gpu_tables(0.7, 0.9)
    slots, rows = [5_000, 9_000], 100_000
    config = ServingConfig(device="cuda", dram_budget_gb=rows * 32 / GIB, access=access)
    found = plan_dram_slots(tables, slots, config)
    assert found is not None and sum(found) == rows and min(found) > 20_000

    def hits(moved: int) -> float:
        counts = [slots[0] + found[0] + moved, slots[1] + found[1] - moved]
        return sum(HitRateCurve(p).hit_rate(count) for p, count in zip(access.values(), counts, strict=True))

    assert hits(0) > max(hits(moved) for moved in (-4_000, 4_000))


def test_the_tier_of_a_gpu_holds_rows_without_a_slot_or_copies_of_all() -> None:
    tables, access = gpu_tables(1.0, 1.0)
    # A table that is all in slots needs none but the rows that pass through.
    for rows, wanted in ((4096 + 99_000, [4096, 40_000]), (4096 + 100_000, [4096, 100_000])):
        config = ServingConfig(dram_budget_gb=rows * 32 / GIB, access=access)
        assert plan_dram_slots(tables, [100_000, 60_000], config) == wanted
    assert plan_dram_slots(tables, [5_000, 5_000], ServingConfig()) is None
    least = 2 * 4096 * 32
    with pytest.raises(BudgetError, match=f"dram_budget_gb.* take at least {least:,} bytes"):
        plan_dram_slots(tables, [5_000, 5_000], ServingConfig(dram_budget_gb=(least - 1) / GIB))


SHORT = [
    (
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore"),
        "cuda has no room.*hbm_budget_gb",
    ),
    (RuntimeError("CUDA error: out of memory"), "the DRAM tier.*; lower dram_budget_gb"),
]


@pytest.mark.parametrize(("error", "said"), SHORT)
def test_short_memory_names_the_budget(
    error: BaseException, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*args: Any, dram_slots: list[int], **kwargs: Any) -> None:
        assert dram_slots == [50, 20]
        raise error

    monkeypatch.setattr(serving_module, "TurboSSDIntNBitTableBatchedEmbeddingBags", fail)
    with pytest.raises(BudgetError, match=said) as caught:
        build(SPECS, tmp_path, device="cuda", dram_budget_gb=1.0)
    assert caught.value.__cause__ is error and list(tmp_path.iterdir()) == []


def test_a_dram_budget_adds_slots_on_a_cpu(tmp_path: Path) -> None:
    specs = [("hot", 100_000, 16, SparseType.INT8), ("cold", 100_000, 16, SparseType.INT8)]
    access = {"hot": AccessProfile.zipf(100_000, 1.3), "cold": AccessProfile.zipf(100_000, 0.3)}
    with build(specs, tmp_path, cache_hit_rate=0.5, access=access, device="cpu") as module:
        before, taken = module.slots, module.tbe.rows.nbytes
    more = 500_000
    with build(specs, tmp_path, 0.0, 0.5, access=access, device="cpu", dram_budget_gb=more / GIB) as module:
        assert all(module.slots[name] >= count for name, count in before.items())
        assert more - 100 < module.tbe.rows.nbytes - taken <= more
    with build(specs, tmp_path, 0.0, 0.5, access=access, device="cpu", dram_budget_gb=1.0) as module:
        assert module.slots == {"hot": 100_000, "cold": 100_000}
