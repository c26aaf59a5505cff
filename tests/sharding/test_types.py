"""Updates, counts and sizes on every sharding type, of bags and of sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType

from tests.ranks import run_ranks
from tests.sharding.models import ROWS, Model, SequenceModel, batch, make_dmp, sparse_name, sparse_of, train

ADAGRAD = EmbOptimType.EXACT_ROWWISE_ADAGRAD
SLOTS = {"big": 120, "wide": 90}
CASES = [
    (Model, "table_wise", 2, 2),
    (Model, "row_wise", 2, 2),
    (Model, "column_wise", 2, 2),
    (Model, "table_column_wise", 2, 2),
    (Model, "table_row_wise", 4, 2),
    (Model, "grid_shard", 4, 2),
    (SequenceModel, "table_wise", 2, 2),
    (SequenceModel, "row_wise", 2, 2),
    (SequenceModel, "column_wise", 2, 2),
]


def _rows_of(dmp: Any, table: str, dim: int) -> torch.Tensor:
    """A whole table out of the state dict, on every rank."""
    whole = torch.zeros(ROWS[table], dim)
    container = "embedding_bags" if sparse_name(dmp.module) == "ebc" else "embeddings"
    for shard in dmp.state_dict()[f"{sparse_name(dmp.module)}.{container}.{table}.weight"].local_shards():
        (row, col), (rows, cols) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        whole[row : row + rows, col : col + cols] = shard.tensor + 0
    dist.all_reduce(whole)
    return whole


def _update(rank: int, world: int, made: type[Any], sharding: str, directory: Path) -> tuple[dict[str, int], int]:
    dmp = make_dmp(world, sharding, ADAGRAD, directory, SLOTS, made())
    sparse = sparse_of(dmp)
    train(dmp, rank, range(4))
    dim = sparse._spec("wide").dim
    before = _rows_of(dmp, "wide", dim)
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, ROWS["wide"] // world, (40,), generator=generator) * world + rank
    ids, rows = torch.cat([ids, ids[:3]]), torch.randn(43, dim, generator=generator)
    sparse.streaming_update(ids, rows, "wide", optimizer_state={"momentum1": torch.full((43,), 2.5)})
    after = _rows_of(dmp, "wide", dim)
    wanted = torch.zeros_like(before)
    for row_id, row in zip(ids.tolist(), rows, strict=True):
        wanted[row_id] = row
    touched = torch.zeros(ROWS["wide"])
    touched[ids] = 1
    dist.all_reduce(wanted)
    dist.all_reduce(touched)
    if not torch.equal(after[touched > 0], wanted[touched > 0]) or not torch.equal(
        after[touched == 0], before[touched == 0]
    ):
        raise AssertionError("an update did not reach its rows, or reached others")
    for table in sparse._local(["wide"]):
        here = torch.nonzero(touched[table.shard.row_offset : table.shard.row_offset + table.shard.rows])[:, 0]
        state = table.read(here)[:, -4:].contiguous().view(torch.float32)
        if not bool((state == 2.5).all()):
            raise AssertionError("an update's optimizer state did not reach every shard")
    sparse.flush()
    train(dmp, rank, range(4, 6))
    stats = sparse.read_stats()
    for name, reads in stats.items():
        if reads.read_hit_count + reads.read_miss_count != reads.read_total_count or not reads.read_miss_count:
            raise AssertionError(f"{name}: {reads}")
    lookups = sum(reads.read_total_count for reads in stats.values())
    sparse.close()
    return sparse.slots, lookups


@pytest.mark.parametrize(("made", "sharding", "world", "local"), CASES)
def test_updates_reach_every_shard(tmp_path: Path, made: type[Any], sharding: str, world: int, local: int) -> None:
    found = run_ranks(world, _update, made, sharding, tmp_path, local=local)
    lengths = [batch(step, rank).length_per_key()[:3] for step in range(6) for rank in range(world)]
    big, wide = sum(n[0] + n[1] for n in lengths), sum(n[2] for n in lengths)
    # A row belongs to one row shard, and to every column shard.
    columns = {"column_wise": (2, 2 if made is SequenceModel else 4), "table_column_wise": (2, 4), "grid_shard": (2, 2)}
    times = columns.get(sharding, (1, 1))
    assert sum(lookups for _, lookups in found) == big * times[0] + wide * times[1]
    shards = {"row_wise": (2, 2), "table_row_wise": (2, 2), "grid_shard": (4, 4)}.get(sharding, times)
    assert sum(slots.get("big", 0) for slots, _ in found) == SLOTS["big"] * shards[0]
    assert sum(slots.get("wide", 0) for slots, _ in found) == SLOTS["wide"] * shards[1]
