"""Snapshots of any plan load under any other: shards of columns, of rows and of both, on SSD and in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType

from tests.ranks import run_ranks
from tests.sharding import plans
from tests.sharding.models import DIM, ROWS, Model, SequenceModel, make_dmp, sparse_of, train
from tests.sharding.shards import Held, check_loaded, held, whole
from torchrec_turbossd import TurboSSDInferenceModule
from torchrec_turbossd.sharding import load_snapshot, save_snapshot

ROW_WISE, ELEMENT_WISE = EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_ADAGRAD
TIERS: dict[str, dict[str, int]] = {"ssd": {"big": 120, "wide": 60}, "memory": {}}
Snapshot = tuple[str, EmbOptimType, str]
"""(sharding of the saved model, optimizer, tier)."""


SAVERS = {"column_wise": 2, "grid_shard": 4, "table_wise": 1}
"""Ranks that save, by sharding."""

LOADS: list[tuple[Snapshot, str]] = [
    *(((sharding, ROW_WISE, "ssd"), "ssd") for sharding in SAVERS),
    *(((sharding, ELEMENT_WISE, "memory"), "memory") for sharding in SAVERS),
    (("column_wise", ROW_WISE, "memory"), "ssd"),
    (("grid_shard", ELEMENT_WISE, "ssd"), "memory"),
]
"""Snapshots, each with the tier that it is loaded into."""


def _path(directory: Path, snapshot: Snapshot) -> Path:
    sharding, optimizer, tier = snapshot
    return directory / f"{sharding}-{optimizer.name}-{tier}"


def _save(rank: int, world: int, sharding: str, directory: Path) -> dict[Snapshot, list[Held]]:
    saved = {}
    for snapshot in (s for s, _ in LOADS if s[0] == sharding):
        _, optimizer, tier = snapshot
        dmp = make_dmp(world, sharding, optimizer, directory / "live", TIERS[tier])
        train(dmp, rank, range(6))
        save_snapshot(dmp, _path(directory, snapshot))
        saved[snapshot] = held(dmp)
        if (optimizer, tier) == (ROW_WISE, "ssd"):
            save_snapshot(dmp, directory / f"{sharding}-served", kind="serving", data_types=SparseType.FP32)
        sparse_of(dmp).close()
    return saved


def _load(rank: int, world: int, sharding: str, columns: int, directory: Path) -> dict[Snapshot, list[Held]]:
    plans.COLUMNS = columns
    found = {}
    for snapshot, tier in LOADS:
        dmp = make_dmp(world, sharding, snapshot[1], directory / "other", TIERS[tier])
        train(dmp, rank, range(20, 21))
        load_snapshot(dmp, _path(directory, snapshot))
        found[snapshot] = held(dmp)
        train(dmp, rank, range(22, 23))
        sparse_of(dmp).close()
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Snapshot, list[list[Held]]]]:
    """Where the snapshots are, and what each rank held as they were taken."""
    directory = tmp_path_factory.mktemp("saved")
    found: dict[Snapshot, list[list[Held]]] = {}
    for sharding, world in SAVERS.items():
        by_rank = run_ranks(world, _save, sharding, directory, local=min(world, 2))
        found |= {snapshot: [shards[snapshot] for shards in by_rank] for snapshot in by_rank[0]}
    return directory, found


@pytest.mark.parametrize(
    ("sharding", "world", "columns"),
    [
        ("table_wise", 1, 4),
        ("row_wise", 2, 4),
        ("column_wise", 2, 4),
        ("column_wise", 2, 8),
        ("grid_shard", 4, 4),
    ],
)
def test_any_plan_after_any_other(
    saved: tuple[Path, dict[Snapshot, list[list[Held]]]], sharding: str, world: int, columns: int
) -> None:
    directory, wanted = saved
    by_rank = run_ranks(world, _load, sharding, columns, directory, local=min(world, 2))
    for snapshot, _ in LOADS:
        check_loaded(wanted[snapshot], [shards[snapshot] for shards in by_rank], ROWS)
    assert not [p.name for p in directory.iterdir() if p.name.startswith(".")], "a load left something behind"


@pytest.mark.parametrize("sharding", SAVERS)
def test_a_server_takes_it(saved: tuple[Path, dict[Snapshot, list[list[Held]]]], sharding: str, tmp_path: Path) -> None:
    directory, wanted = saved
    trained = wanted[sharding, ROW_WISE, "ssd"]
    specs = [(name, rows, DIM * (2 if name == "wide" else 1), SparseType.FP32) for name, rows in ROWS.items()]
    with TurboSSDInferenceModule.from_embedding_specs(
        specs, ssd_directory=tmp_path, device="cpu", output_dtype=SparseType.FP32
    ) as server:
        server.load_snapshot(directory / f"{sharding}-served")
        ids = torch.cat([torch.arange(900) % rows for rows in ROWS.values()])
        out = server(ids, torch.arange(ids.numel() + 1))
    tables = [whole(trained, name).weights[torch.arange(900) % rows] for name, rows in ROWS.items()]
    assert torch.equal(out, torch.cat(tables, dim=1))


def _sequences(rank: int, world: int, directory: Path) -> tuple[list[Held], list[Held], list[Any]]:
    optimizer, slots = ROW_WISE, TIERS["ssd"]
    first = make_dmp(world, "column_wise", optimizer, directory / "first", slots, SequenceModel())
    train(first, rank, range(6))
    save_snapshot(first, directory / "saved")
    kept = held(first)
    second = make_dmp(world, "row_wise", optimizer, directory / "second", slots, SequenceModel())
    same = make_dmp(world, "column_wise", optimizer, directory / "same", slots, SequenceModel())
    for dmp in (second, same):
        load_snapshot(dmp, directory / "saved")
    dense = [p for n, p in first.named_parameters() if "linear" in n]
    for theirs, ours in zip([p for n, p in same.named_parameters() if "linear" in n], dense, strict=True):
        theirs.data.copy_(ours.data)
    loaded, trained = held(second), [train(dmp, rank, range(6, 9)) for dmp in (first, same)]
    for dmp in (first, second, same):
        sparse_of(dmp).close()
    return kept, loaded, trained


def test_sequences_are_saved_and_loaded(tmp_path: Path) -> None:
    by_rank = run_ranks(2, _sequences, tmp_path)
    check_loaded([kept for kept, _, _ in by_rank], [loaded for _, loaded, _ in by_rank], ROWS)
    for _, _, (first, same) in by_rank:
        assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True)), "training went on otherwise"


def _several(rank: int, world: int, directory: Path) -> tuple[list[Held], list[Held]]:
    """Tables of several modules, of which some ranks have none on SSD."""
    first = make_dmp(world, "table_wise", ROW_WISE, directory / "first", {"big": 50}, Model())
    train(first, rank, range(4))
    save_snapshot(first, directory / "saved")
    second = make_dmp(world, "table_wise", ROW_WISE, directory / "second", {"wide": 50, "small": 9}, Model())
    load_snapshot(second, directory / "saved")
    found = held(first), held(second)
    for dmp in (first, second):
        sparse_of(dmp).close()
    return found


def test_ranks_without_a_table_on_ssd(tmp_path: Path) -> None:
    by_rank = run_ranks(2, _several, tmp_path)
    check_loaded([kept for kept, _ in by_rank], [loaded for _, loaded in by_rank], ROWS)
