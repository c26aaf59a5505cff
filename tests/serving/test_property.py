"""Random lookups, updates, swaps, flushes and restarts give what whole tables in memory give."""

from __future__ import annotations

import random
from pathlib import Path

import fbgemm_gpu
import pytest
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode

from tests.serving.serving_kit import OUTPUTS, POOLINGS, TYPES, World, tables_for
from torchrec_turbossd.errors import StoreError
from torchrec_turbossd.tables import TableSpec

STEPS = 80
FEATURES = ([0, 1, 2, 3], [0, 0, 1, 2, 1, 3], [3, 1, 0, 2, 0], [2, 3, 2, 0, 1, 2])
ACTIONS = ["look_up"] * 60 + ["update"] * 25 + ["take_counts"] * 3 + ["flush", "save", "load", "load", "reopen", "fail"]


@pytest.fixture(autouse=True)
def few_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of a few rows, so that every batch evicts and some do not fit."""
    monkeypatch.setattr("torchrec_turbossd.serving.sizing.LEAST_SLOTS", 6)


def features_for(place: int, tables: list[TableSpec]) -> list[int]:
    """Features with repeats and out of order."""
    features = FEATURES[place % len(FEATURES)]
    # FBGEMM 1.6 cannot look FP8 tables up on a CPU unless features come in the order of their tables.
    in_order = fbgemm_gpu.__version__.startswith("1.6.") and SparseType.FP8 in {t.data_type for t in tables}
    return sorted(features) if in_order else features


def fail(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update that the store refuses changes nothing."""

    def refuse(batch: object) -> None:
        raise StoreError("planted")

    before = dict(world.written)
    with monkeypatch.context() as patch:
        patch.setattr(world.module.tbe.rows.store, "commit", refuse)
        with pytest.raises(StoreError, match="planted"):
            while True:
                world.update()
    world.written = before


def types_for(output: SparseType, device: str) -> list[SparseType]:
    """What is served with an output type; INT2 in FP32 is refused on CUDA, see test_bad_input."""
    return [t for t in TYPES if device == "cpu" or output is not SparseType.FP32 or t is not SparseType.INT2]


CASES = [
    pytest.param(data_type, output, device, marks=marks, id=f"{data_type.name}-{output.name}-{device}")
    for device, marks in (("cpu", ()), ("cuda:0", pytest.mark.gpu))
    for output in OUTPUTS
    for data_type in types_for(output, device)
]


@pytest.mark.filterwarnings("ignore:a batch did not fit")
@pytest.mark.parametrize(("data_type", "output", "device"), CASES)
@pytest.mark.parametrize("pooling", POOLINGS, ids=lambda p: p.name)
def test_random_actions(
    data_type: SparseType,
    pooling: PoolingMode,
    output: SparseType,
    device: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = TYPES.index(data_type), POOLINGS.index(pooling), OUTPUTS.index(output)
    seed = 100 * place[0] + 10 * place[1] + place[2]
    chooser = random.Random(seed)
    tables = tables_for(seed, pooling, data_type, device, types_for(output, device))
    world = World(seed, tmp_path, tables, features_for(sum(place), tables), pooling, output, device)
    try:
        for _ in range(STEPS):
            action = chooser.choice(ACTIONS)
            if action == "fail":
                fail(world, monkeypatch)
            else:
                getattr(world, action)()
            world.check()
    finally:
        world.close()
