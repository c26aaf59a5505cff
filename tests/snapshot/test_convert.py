"""Training snapshots of several ranks become serving ones that answer as the trained tables would."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import Tensor

from tests.snapshot.snapshot_kit import ShardRows, one_table_snapshot, row_file, write_snapshot
from torchrec_turbossd.errors import ConfigError, CorruptError, SnapshotError, UnknownTableError, UnsupportedError
from torchrec_turbossd.rows import initial_rows, initial_weights, quantise
from torchrec_turbossd.snapshot import convert_to_serving, verify
from torchrec_turbossd.store import LayeredRowStore
from torchrec_turbossd.tables import InitRule, StateSpec, TableShard, TableSpec

PER_ROW = (StateSpec(name="momentum1", per_row=True),)
PER_ELEMENT = (StateSpec(name="momentum1", per_row=False),)
FLOATS = {SparseType.FP32: torch.float32, SparseType.FP16: torch.float16}


def rule(data_type: SparseType) -> InitRule:
    return InitRule(seed=11, low=-0.25, high=0.75, data_type=data_type)


def table(name: str, data_type: SparseType, dim: int, state: tuple[StateSpec, ...]) -> TableSpec:
    return TableSpec(name=name, rows=90, dim=dim, data_type=data_type, state=state, init=rule(data_type))


ROW_WISE = table("row_wise", SparseType.FP32, 8, PER_ROW)
COLUMN_WISE = table("column_wise", SparseType.FP16, 16, PER_ROW)
WHOLE = table("whole", SparseType.FP32, 24, PER_ELEMENT)
GRID = table("grid", SparseType.FP32, 16, ())
TABLES = (ROW_WISE, COLUMN_WISE, WHOLE, GRID)


def shards_of_two_ranks() -> list[list[TableShard]]:
    def cut(spec: TableSpec, row: int, rows: int, col: int, cols: int) -> TableShard:
        return TableShard(table=spec, row_offset=row, rows=rows, col_offset=col, cols=cols)

    first = [
        cut(ROW_WISE, 0, 40, 0, 8),
        cut(COLUMN_WISE, 0, 90, 0, 4),
        TableShard.whole(WHOLE),
        cut(GRID, 0, 30, 0, 8),
        cut(GRID, 60, 30, 8, 8),
    ]
    second = [
        cut(ROW_WISE, 40, 50, 0, 8),
        cut(COLUMN_WISE, 0, 90, 4, 12),
        cut(GRID, 30, 60, 0, 8),
        cut(GRID, 0, 60, 8, 8),
    ]
    return [first, second]


class Trained:
    """Tables of which some rows were written, some only in one column shard, and some never."""

    def __init__(self, seed: int, share: float) -> None:
        chooser, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        every = torch.arange(90)
        self.weights = {t.name: initial_weights(t.init, t.name, every, cols=t.dim) for t in TABLES}
        self.written: dict[str, set[int]] = {t.name: set() for t in TABLES}
        self.ranks: list[ShardRows] = []
        for shards in shards_of_two_ranks():
            rank: ShardRows = {}
            for shard in shards:
                ids = [shard.row_offset + i for i in range(shard.rows) if chooser.random() < share]
                rank[shard] = self._write(shard, torch.tensor(ids, dtype=torch.int64), generator)
            self.ranks.append(rank)

    def _write(self, shard: TableShard, ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        spec = shard.table
        values = torch.randn(ids.numel(), shard.cols, generator=generator).to(FLOATS[spec.data_type])
        self.weights[spec.name][ids, shard.col_offset : shard.col_offset + shard.cols] = values
        self.written[spec.name] |= set(ids.tolist())
        state = torch.full((ids.numel(), shard.row_bytes), 0xEE, dtype=torch.uint8)
        body = values.view(torch.uint8)
        state[:, : body.shape[1]] = body
        return ids, state


@pytest.mark.parametrize("data_type", [SparseType.FP32, SparseType.FP16, SparseType.INT8, SparseType.INT4])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_rows_of_all_ranks_quantised(
    data_type: SparseType, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Windows of a few rows, so that streams of different density are cut at different places.
    monkeypatch.setattr("torchrec_turbossd.snapshot.merge._WINDOW_BYTES", 300)
    trained = Trained(int(10 * share), share)
    write_snapshot(tmp_path / "trained", TABLES, trained.ranks, version=9)
    seen: list[tuple[int, int]] = []
    manifest = convert_to_serving(
        tmp_path / "trained", tmp_path / "serving", data_type, progress=lambda done, all_: seen.append((done, all_))
    )
    assert verify(tmp_path / "serving") == manifest
    assert (manifest.kind, manifest.version, manifest.extra) == ("serving", 9, {"iter": 7})
    assert all(t.data_type == data_type and t.state == () for t in manifest.tables)
    assert seen == sorted(seen) and seen[-1] == (360, 360)

    shutil.copytree(tmp_path / "serving" / "part-0", tmp_path / "opened")
    sizes, rows_of = {t.name: t.row_bytes for t in manifest.tables}, {t.name: t.rows for t in manifest.tables}
    store = LayeredRowStore(tmp_path / "opened", sizes, rows_of, create=False)
    try:
        for spec in manifest.tables:
            ids = torch.arange(90)
            rows, found = store.read(spec.name, ids)
            assert set(ids[found].tolist()) == trained.written[spec.name]
            rows[~found] = initial_rows(TableShard.whole(spec), ids[~found])
            assert torch.equal(rows, quantise(trained.weights[spec.name], data_type)), spec.name
    finally:
        store.close()


def test_tables_may_have_their_own_types_or_stay_behind(tmp_path: Path) -> None:
    write_snapshot(tmp_path / "trained", TABLES, Trained(1, 0.3).ranks)
    types = {"whole": SparseType.INT8, "row_wise": SparseType.FP16}
    manifest = convert_to_serving(tmp_path / "trained", tmp_path / "serving", types)
    assert {t.name: t.data_type for t in manifest.tables} == types


def test_the_training_snapshot_is_not_changed(tmp_path: Path) -> None:
    write_snapshot(tmp_path / "trained", TABLES, Trained(1, 0.3).ranks)
    before = sorted((p, p.stat().st_size, p.stat().st_mtime_ns) for p in (tmp_path / "trained").rglob("*"))
    convert_to_serving(tmp_path / "trained", tmp_path / "serving", SparseType.INT8)
    assert sorted((p, p.stat().st_size, p.stat().st_mtime_ns) for p in (tmp_path / "trained").rglob("*")) == before


def test_what_cannot_be_converted_leaves_nothing(tmp_path: Path) -> None:
    trained, target = tmp_path / "trained", tmp_path / "serving"
    write_snapshot(trained, TABLES, Trained(1, 0.3).ranks)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UnknownTableError, match="'z'"):
        convert_to_serving(trained, target, {"z": SparseType.INT8})
    with pytest.raises(ConfigError, match="names no table"):
        convert_to_serving(trained, target, {})
    with pytest.raises(UnsupportedError, match="bf16"):
        convert_to_serving(trained, target, SparseType.BF16)
    convert_to_serving(trained, target, SparseType.INT8)
    with pytest.raises(ConfigError, match="already"):
        convert_to_serving(target, tmp_path / "again", SparseType.FP16)
    with pytest.raises(SnapshotError, match="not empty"):
        convert_to_serving(trained, target, SparseType.INT8)
    row_file(trained).write_bytes(b"")
    with pytest.raises(CorruptError):
        convert_to_serving(trained, tmp_path / "again", SparseType.INT8)
    assert sorted(tmp_path.iterdir()) == sorted([*before, target])


def test_widths_that_fbgemm_cannot_quantise(tmp_path: Path) -> None:
    narrow = TableSpec(name="a", rows=5, dim=4)
    one_table_snapshot(tmp_path / "trained", narrow, (torch.arange(0), torch.empty(0, 16, dtype=torch.uint8)))
    with pytest.raises(ConfigError, match="multiple of 8, got 4"):
        convert_to_serving(tmp_path / "trained", tmp_path / "serving", SparseType.INT2)


@pytest.mark.parametrize(("rank", "place"), [(0, 0), (0, 1), (1, 2), (0, 4)])
def test_a_missing_shard_is_noticed(rank: int, place: int, tmp_path: Path) -> None:
    ranks = Trained(1, 0.3).ranks
    lost = list(ranks[rank])[place]
    del ranks[rank][lost]
    write_snapshot(tmp_path / "trained", TABLES, ranks)
    with pytest.raises(SnapshotError, match=rf"{lost.table.name!r}: the snapshot's parts (do not )?hold"):
        convert_to_serving(tmp_path / "trained", tmp_path / "serving", SparseType.INT8)
    assert not (tmp_path / "serving").exists()
