"""Any shard of a table comes out of the shards of a snapshot: every cell in its place, a row-wise state as a mean."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import Tensor

from torchrec_turbossd.errors import SnapshotError
from torchrec_turbossd.rows import initial_weights
from torchrec_turbossd.snapshot import Manifest, Part, ShardRange
from torchrec_turbossd.snapshot import merge as merging
from torchrec_turbossd.store import MemoryRowStore
from torchrec_turbossd.tables import TRAINING_TYPES, InitRule, StateSpec, TableShard, TableSpec, with_type

ROWS, DIM = 70, 24
STATES = {
    "none": (),
    "row-wise": (StateSpec(name="momentum1", per_row=True),),
    "element-wise": (StateSpec(name="momentum1", per_row=False),),
    "both": (StateSpec(name="momentum1", per_row=False), StateSpec(name="exp_avg_sq", per_row=True)),
}


def table_of(state: str, data_type: SparseType = SparseType.FP32) -> TableSpec:
    rule = InitRule(seed=4, low=-1.0, high=1.0, data_type=data_type)
    return TableSpec(name="t", rows=ROWS, dim=DIM, data_type=data_type, state=STATES[state], init=rule)


class Saved:
    """A table in shards, each with rows of its own; the whole of it in plain tensors."""

    def __init__(self, table: TableSpec, seed: int, share: float, columns: Sequence[int] | None = None) -> None:
        self.table, self._random = table, random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        every, self._type = torch.arange(ROWS), TRAINING_TYPES[table.data_type]
        self.weights = initial_weights(table.init, "t", every, cols=DIM)
        # A row-wise state is kept for each column, as what its shard holds.
        self.state = [torch.zeros(ROWS, DIM) for _ in table.state]
        self.written = torch.zeros(ROWS, DIM, dtype=torch.bool)
        self.sources: list[merging.Source] = []
        cuts = list(columns or sorted({0, DIM, *self._random.sample(range(4, DIM, 4), self._random.randint(0, 4))}))
        for start, stop in pairwise(cuts):
            blocks = sorted({0, ROWS, *self._random.sample(range(1, ROWS), self._random.randint(0, 2))})
            for first, last in pairwise(blocks):
                shard = TableShard(
                    table=table, row_offset=first, rows=last - first, col_offset=start, cols=stop - start
                )
                self.sources.append(self._write(shard, share))
        self._random.shuffle(self.sources)

    def _write(self, shard: TableShard, share: float) -> merging.Source:
        ids = [i for i in range(shard.row_offset, shard.row_offset + shard.rows) if self._random.random() < share]
        at, count = torch.tensor(ids, dtype=torch.int64), len(ids)
        columns = slice(shard.col_offset, shard.col_offset + shard.cols)
        weights = torch.randn(count, shard.cols, generator=self._generator).to(self._type)
        self.weights[at, columns], self.written[at, columns] = weights, True
        parts = [weights]
        for spec, whole in zip(self.table.state, self.state, strict=True):
            values = torch.rand(count, 1 if spec.per_row else shard.cols, generator=self._generator)
            whole[at, columns] = values.expand(count, shard.cols)
            parts.append(values)
        store = MemoryRowStore({shard.key: shard.row_bytes})
        store.write({shard.key: (at, torch.cat([p.contiguous().view(torch.uint8) for p in parts], dim=1))})
        return merging.Source(store=store, key=shard.key, range=ShardRange.of(shard))

    def read(self, target: TableShard) -> tuple[Tensor, Tensor]:
        windows = list(merging.merged_rows(self.table, self.sources, target))
        ids = torch.cat([torch.empty(0, dtype=torch.int64), *(i for i, _ in windows)])
        assert bool((ids[1:] > ids[:-1]).all())
        rows = torch.cat([torch.empty(0, target.row_bytes, dtype=torch.uint8), *(r for _, r in windows)])
        return ids, rows

    def check(self, target: TableShard) -> None:
        """Every byte of `target` is what the plain tensors say."""
        ids, rows = self.read(target)
        block = slice(target.row_offset, target.row_offset + target.rows)
        columns = slice(target.col_offset, target.col_offset + target.cols)
        assert torch.equal(ids, target.row_offset + torch.nonzero(self.written[block, columns].any(1)).flatten())
        at = weight = target.cols * self.weights.element_size()
        assert torch.equal(rows[:, :weight].contiguous().view(self._type), self.weights[ids, columns])
        for spec, whole in zip(target.table.state, self.state, strict=False):
            wide = spec.row_bytes(target.cols)
            found = rows[:, at : at + wide].contiguous().view(torch.float32)
            at += wide
            if spec.per_row:
                wanted = whole[ids, columns].double().mean(1, keepdim=True)
                torch.testing.assert_close(found.double(), wanted, rtol=1e-7, atol=0.0)
            else:
                assert torch.equal(found, whole[ids, columns])
        assert at == rows.shape[1]


def shard(table: TableSpec, *, row: int = 0, rows: int = ROWS, col: int = 0, cols: int = DIM) -> TableShard:
    return TableShard(table=table, row_offset=row, rows=rows, col_offset=col, cols=cols)


@pytest.mark.parametrize("data_type", [SparseType.FP32, SparseType.FP16])
@pytest.mark.parametrize("state", STATES)
def test_any_shard_out_of_any_shards(state: str, data_type: SparseType, monkeypatch: pytest.MonkeyPatch) -> None:
    # Windows of a few rows, so that streams of different density are cut at different places.
    monkeypatch.setattr(merging, "_WINDOW_BYTES", 700)
    table, chooser = table_of(state, data_type), random.Random(2)
    for seed, share in enumerate([0.0, 0.1, 0.5, 0.9, 1.0]):
        saved = Saved(table, seed, share)
        saved.check(TableShard.whole(table))
        saved.check(TableShard.whole(with_type(table, data_type)))
        for _ in range(6):
            row, col = chooser.randrange(ROWS), 4 * chooser.randrange(DIM // 4)
            rows, cols = chooser.randint(1, ROWS - row), 4 * chooser.randint(1, (DIM - col) // 4)
            saved.check(shard(table, row=row, rows=rows, col=col, cols=cols))


def test_unchanged_columns_give_the_very_bytes() -> None:
    table = table_of("both")
    saved = Saved(table, 3, 0.7, columns=(0, 8, 12, 24))
    for start, stop in ((0, 8), (8, 12), (12, 24)):
        ids, rows = saved.read(shard(table, col=start, cols=stop - start))
        for source in saved.sources:
            if source.range.col_offset == start:
                mine = (ids >= source.range.row_offset) & (ids < source.range.row_offset + source.range.rows)
                held, found = source.store.read(source.key, ids[mine])
                assert bool(found.all()) and torch.equal(held, rows[mine])


def test_equal_row_states_join_to_themselves() -> None:
    table = table_of("row-wise")
    states = torch.rand(ROWS, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.arange(-35, 35)
    sources = []
    for start, cols in ((0, 8), (8, 4), (12, 12)):
        piece = shard(table, col=start, cols=cols)
        rows = torch.cat([torch.zeros(ROWS, cols), states.unsqueeze(1)], dim=1).view(torch.uint8)
        store = MemoryRowStore({piece.key: piece.row_bytes})
        store.write({piece.key: (torch.arange(ROWS), rows)})
        sources.append(merging.Source(store=store, key=piece.key, range=ShardRange.of(piece)))
    for target in (shard(table), shard(table, col=4, cols=12), shard(table, col=12, cols=4)):
        ((_, rows),) = merging.merged_rows(table, sources, target)
        assert torch.equal(rows[:, -4:].contiguous().view(torch.float32).flatten(), states)


def test_parts_that_do_not_cover_are_refused() -> None:
    table = table_of("row-wise")
    ranges = [ShardRange.of(shard(table, cols=8)), ShardRange.of(shard(table, col=12, cols=12))]
    parts = tuple(Part(directory=f"p{i}", shards={f"k{i}": r}) for i, r in enumerate(ranges))
    manifest = Manifest(kind="training", id="x", version=0, tables=(table,), parts=parts, files={})
    with pytest.raises(SnapshotError, match="columns 8 to 12"):
        merging.check_cover(manifest, table)
