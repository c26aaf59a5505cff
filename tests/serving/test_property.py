"""Random lookups, updates, swaps, flushes and restarts give what whole tables in memory give."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode

from tests.serving.serving_kit import POOLINGS, TYPES, World, tables_for
from torchrec_turbossd.errors import StoreError

STEPS = 160
FEATURES = ([0, 1, 2], [0, 0, 1, 2, 1], [2, 0, 1, 0])
ACTIONS = ["look_up"] * 60 + ["update"] * 25 + ["flush", "save", "load", "load", "reopen", "fail"]


@pytest.fixture(autouse=True)
def few_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of a few rows, so that every batch evicts and some do not fit."""
    monkeypatch.setattr("torchrec_turbossd.serving.sizing.LEAST_SLOTS", 6)


def fail(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update whose store write fails changes nothing."""

    def refuse(batch: object) -> None:
        raise StoreError("planted")

    before = world.whole.copy()
    with monkeypatch.context() as patch:
        patch.setattr(world.module.tbe.rows.store, "write", refuse)
        with pytest.raises(StoreError, match="planted"):
            while True:
                world.update()
    world.whole.rows = before


@pytest.mark.filterwarnings("ignore:a batch did not fit")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("pooling", POOLINGS, ids=lambda p: p.name)
@pytest.mark.parametrize("data_type", TYPES, ids=lambda t: t.name)
def test_random_actions(
    data_type: SparseType, pooling: PoolingMode, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = 1000 * TYPES.index(data_type) + POOLINGS.index(pooling)
    chooser = random.Random(seed)
    world = World(seed, tmp_path, tables_for(seed, pooling, data_type), chooser.choice(FEATURES), pooling, device)
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
