"""Lazy rows answer as the tensor that they stand for, and hold a window of it at most."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from torch import Tensor

from torchrec_turbossd.cache import host_memory
from torchrec_turbossd.errors import BudgetError, InputError
from torchrec_turbossd.sharding import windows
from torchrec_turbossd.sharding.lazy_rows import LazyRows
from torchrec_turbossd.sharding.row_columns import LiveRows, RowColumns
from torchrec_turbossd.store.memory import MemoryRowStore
from torchrec_turbossd.tables import InitRule, StateSpec, TableShard, TableSpec
from torchrec_turbossd.tbe.training import TrainingOptions, TurboSSDTableBatchedEmbeddingBags

ROWS, COLS = 70, 8
WINDOW = 300
"""Bytes: 4 whole rows, 9 of their weights or state."""


class CountingStore(MemoryRowStore):
    """Counts rows that are written, and the most that are read or written at once."""

    written = 0
    most = 0

    def read(self, table: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        self.most = max(self.most, ids.numel())
        return super().read(table, ids)

    def write(self, batch: Any) -> None:
        counts = [ids.numel() for ids, _ in batch.values()]
        self.written += sum(counts)
        self.most = max(self.most, *counts)
        super().write(batch)


class Bench:
    """One shard of some rows and columns of a table, with a few rows in slots, and what each part should be."""

    def __init__(self, data_type: SparseType = SparseType.FP32, *, per_row: bool = False) -> None:
        states = (StateSpec(name="momentum1", per_row=per_row),)
        init = InitRule(seed=3, low=-1.0, high=1.0, data_type=data_type)
        table = TableSpec(name="t", rows=500, dim=12, data_type=data_type, state=states, init=init)
        self.shard = TableShard(table=table, row_offset=100, rows=ROWS, col_offset=4, cols=COLS)
        self.store = CountingStore({self.shard.key: self.shard.row_bytes})
        self.tbe = TurboSSDTableBatchedEmbeddingBags(
            [self.shard],
            [8],
            [0],
            self.store,
            options=TrainingOptions(
                tbe_args={
                    "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD if per_row else EmbOptimType.EXACT_ADAGRAD,
                    "learning_rate": 0.1,
                }
            ),
        )
        self.train(torch.tensor([3, 5, 69, 3, 0]))
        self.store.most = 0

    def train(self, ids: Tensor) -> None:
        offsets = torch.tensor([0, ids.numel()])
        self.tbe(ids, offsets).sum().backward()

    def lazy(self, part: int = 0) -> LazyRows:
        return LazyRows(RowColumns(LiveRows(self.tbe, 0), part))

    def plain(self, part: int = 0) -> Tensor:
        """The part, read by the rows' own interface."""
        rows = self.tbe.read_rows(0, torch.arange(ROWS))
        cut = COLS * (2 if self.shard.table.data_type is SparseType.FP16 else 4)
        body = rows[:, cut:] if part else rows[:, :cut]
        dtype = torch.float16 if self.shard.table.data_type is SparseType.FP16 and not part else torch.float32
        self.store.most = 0
        return body.contiguous().view(dtype)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(windows, "WINDOW_BYTES", WINDOW)
    yield Bench()


READS = {
    "whole": lambda t: t + 0,
    "rows": lambda t: t[10:33] * 1,
    "rows of rows": lambda t: t[10:60][5:-3].clone(),
    "columns": lambda t: t[:, 2:5].clone(),
    "negative dim": lambda t: t.narrow(-1, 3, 4).narrow(-2, 60, 10).contiguous() + 0,
    "a row": lambda t: t[-1] + 0,
    "a column": lambda t: t[:, 3] + 0,
    "steps": lambda t: t[::7] + 0,
    "by index": lambda t: t[torch.tensor([5, 0, 69, 5, -2])],
    "by mask": lambda t: t[torch.arange(ROWS) % 3 == 0],
    "by index of two dims": lambda t: t[torch.tensor([[5, 0], [69, 5]])],
    "index_select": lambda t: t.index_select(0, torch.tensor([7, 3], dtype=torch.int32)),
    "index_select columns": lambda t: t[3:9].index_select(1, torch.tensor([7, 3])),
    "view": lambda t: t.view(-1, COLS)[1:3] + 0,
    "reshaped": lambda t: t[0:4].reshape(8, 4) + 0,
    "flatten": lambda t: t.flatten() + 0,
    "empty": lambda t: t[5:5] + 0,
    "sum": lambda t: t.detach().sum(0),
    "other type": lambda t: t.to(torch.float64),
    "out": lambda t: torch.mul(t, 2, out=torch.empty(ROWS, COLS)),
}


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("name", READS)
def test_reads_are_those_of_the_tensor(bench: Bench, name: str, part: int) -> None:
    found = READS[name](bench.lazy(part))
    assert type(found) is torch.Tensor and torch.equal(found, READS[name](bench.plain(part)))


@pytest.mark.parametrize("name", ["rows", "rows of rows", "a row", "by index", "index_select", "by index of two dims"])
def test_only_rows_asked_for_are_read(bench: Bench, name: str) -> None:
    wanted, read = READS[name](bench.plain()), []
    seen = bench.tbe.read_rows
    bench.tbe.read_rows = lambda table, ids: (read.append(ids.numel()), seen(table, ids))[1]  # type: ignore[method-assign]
    READS[name](bench.lazy())
    assert sum(read) <= wanted[..., 0].numel() and max(read) <= WINDOW // bench.shard.row_bytes


def test_a_row_wise_state_is_one_number_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "WINDOW_BYTES", WINDOW)
    bench = Bench(per_row=True)
    state, before = bench.lazy(1), bench.plain()
    assert state.shape == (ROWS,) and torch.equal(state + 0, bench.plain(1).flatten())
    assert float(state[3]) > 0 and torch.equal(state[2:4] > 0, torch.tensor([False, True]))
    state[10:40].copy_(torch.arange(30))
    state[50:].fill_(7)
    assert torch.equal(bench.plain(1).flatten()[10:40], torch.arange(30.0)) and float(state[69]) == 7
    assert torch.equal(bench.plain(), before)


def test_half_precision() -> None:
    half = Bench(SparseType.FP16)
    assert half.lazy().dtype == torch.float16 and torch.equal(half.lazy() + 0, half.plain())
    half.lazy()[3:5].copy_(torch.full((2, COLS), 0.5, dtype=torch.float64))
    assert bool((half.plain()[3:5] == 0.5).all()) and not bool((half.plain()[5] == 0.5).any())


def test_a_copy_keeps_what_the_rows_are_now(bench: Bench) -> None:
    lazy, before = bench.lazy(), bench.plain()
    saved = io.BytesIO()
    torch.save({"w": lazy}, saved)
    copied = copy.deepcopy([lazy, lazy])
    bench.train(torch.tensor([5, 6]))
    saved.seek(0)
    kept = torch.load(saved, weights_only=True)["w"]
    assert type(kept) is torch.Tensor and torch.equal(kept, before)
    assert copied[0] is copied[1] and torch.equal(copied[0], before)
    assert torch.equal(lazy + 0, bench.plain()) and not torch.equal(lazy + 0, before)


WRITES = {
    "copy": lambda t: t.copy_(torch.arange(ROWS * COLS).view(ROWS, COLS)),
    "copy rows": lambda t: t[20:31].copy_(torch.ones(11, COLS)),
    "copy columns": lambda t: t[:, 2:5].copy_(torch.ones(ROWS, 3)),
    "copy a block": lambda t: t[60:][:, 7:].copy_(torch.full((10, 1), 4.0)),
    "copy a number": lambda t: t.copy_(torch.tensor(2.0)),
    "copy a row": lambda t: t.copy_(torch.arange(COLS)),
    "zero": lambda t: t[5:50].zero_(),
    "multiply by rows": lambda t: t.mul_(torch.arange(ROWS).view(ROWS, 1)),
    "multiply by columns": lambda t: t.mul_(torch.arange(COLS)),
    "add itself": lambda t: t.add_(t, alpha=2.0),
    "same shape": lambda t: t.resize_(ROWS, COLS),
}


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("name", WRITES)
def test_writes_are_those_of_the_tensor(bench: Bench, name: str, part: int) -> None:
    wanted, other = bench.plain(part).clone(), bench.plain(1 - part)
    WRITES[name](wanted)
    WRITES[name](bench.lazy(part))
    assert bench.store.most <= WINDOW // bench.shard.row_bytes
    assert torch.equal(bench.plain(part), wanted)
    assert torch.equal(bench.plain(1 - part), other), "the other part of the rows was changed"


def test_copies_out_of_it_go_by_windows(bench: Bench) -> None:
    wanted, target = bench.plain(), torch.empty(ROWS, COLS)
    target.copy_(bench.lazy())
    assert torch.equal(target, wanted) and bench.store.most <= WINDOW // bench.shard.row_bytes
    assert torch.equal(torch.zeros(2, ROWS, COLS).copy_(bench.lazy())[1], wanted)


def test_rows_that_stay_the_same_are_not_written(bench: Bench) -> None:
    values, before = bench.plain(), bench.store.written
    bench.lazy().copy_(values)
    assert bench.store.written == before
    values[[40, 44, 51]] += 1
    bench.lazy().copy_(values)
    assert bench.store.written == before + 3 and torch.equal(bench.plain(), values)


def test_a_copy_of_itself_reads_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    state = bench.plain(1)
    with monkeypatch.context() as patch:
        patch.setattr(bench.tbe, "read_rows", None)
        bench.lazy().detach()[3:9].copy_(bench.lazy()[3:9])
    # The same rows, but another part of them, or another place.
    bench.lazy().copy_(bench.lazy(1))
    assert torch.equal(bench.plain(), state) and torch.equal(bench.plain(1), state)
    bench.lazy()[10:15].copy_(bench.lazy()[3:8])
    bench.lazy()[20:, :4].copy_(bench.lazy()[20:, 4:])
    wanted = state.clone()
    wanted[10:15], wanted[20:, :4] = state[3:8], state[20:, 4:]
    assert torch.equal(bench.plain(), wanted)


def test_a_shape_cannot_change(bench: Bench) -> None:
    before = bench.plain()
    with pytest.raises(InputError, match="shape"):
        bench.lazy().resize_(ROWS - 1, COLS)
    with pytest.raises(RuntimeError):
        bench.lazy().copy_(torch.zeros(ROWS - 1, COLS))
    with pytest.raises(IndexError):
        bench.lazy()[torch.tensor([ROWS])]
    assert torch.equal(bench.plain(), before)


def test_more_than_the_memory_that_is_free_is_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(host_memory, "_MEMORY", tmp_path / "meminfo")
    bench.lazy().clone()
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 1 kB\n")
    assert bench.lazy()[:20].clone().shape == (20, COLS)
    for read in (copy.deepcopy, torch.clone, lambda t: t + 1):
        with pytest.raises(BudgetError, match="async_stager"):
            read(bench.lazy())
    target = torch.empty(ROWS, COLS)
    target.copy_(bench.lazy())
    assert torch.equal(target, bench.plain())


def test_windows_are_sized_by_bytes() -> None:
    assert windows.window_rows(516) == (16 << 20) // 516 and windows.window_rows(1 << 30) == 1
    assert list(windows.windows(7, 3)) == [(0, 3), (3, 3), (6, 1)] and list(windows.windows(0, 3)) == []


LOST: dict[str, Callable[[Any], Any]] = {
    "a column": lambda w: w.__setitem__((slice(None), 2), 1.0),
    "a number": lambda w: w.__setitem__((3, 2), 1.0),
    "steps": lambda w: w.__setitem__(slice(None, None, 2), 1.0),
    "rows by index": lambda w: w.__setitem__(torch.tensor([1, 5]), 1.0),
    "viewed": lambda w: w.view(-1).fill_(1.0),
    "a view of a view": lambda w: w.view(-1)[3:5].zero_(),
    "transposed": lambda w: w.t().zero_(),
    "split": lambda w: w.split(3)[0].unbind()[0].zero_(),
    "index_fill_": lambda w: w.index_fill_(0, torch.tensor([2]), 1.0),
    "index_add_": lambda w: w.index_add_(0, torch.tensor([2]), torch.ones(1, w.shape[1])),
    "scatter_": lambda w: w.scatter_(0, torch.zeros(1, w.shape[1], dtype=torch.int64), 1.0),
    "cumsum_": lambda w: w.cumsum_(0),
    "fill_diagonal_": lambda w: w.fill_diagonal_(1.0),
    "foreach": lambda w: torch._foreach_mul_([w], 2.0),
    "out": lambda w: torch.add(torch.ones(w.shape), 1.0, out=w),
}


@pytest.mark.parametrize("name", LOST)
def test_writes_that_would_be_lost_are_refused(bench: Bench, name: str) -> None:
    before = bench.lazy(0).materialise()
    with pytest.raises(InputError, match=r"copy_\(values\)"):
        LOST[name](bench.lazy(0))
    assert torch.equal(bench.lazy(0).materialise(), before)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("index", [3, -1, slice(2, 7), slice(3, 4), slice(None), slice(-3, None)])
def test_rows_are_assigned(index: Any, per_row: bool) -> None:
    bench = Bench(per_row=True) if per_row else Bench()
    part = int(per_row)
    lazy, plain = bench.lazy(part), bench.plain(part).clone()
    plain = plain.flatten() if per_row else plain
    for value in (2.5, torch.tensor(1.5) if per_row else torch.arange(float(plain.shape[1]))):
        lazy[index] = value
        plain[index] = value
        assert torch.equal(bench.lazy(part).materialise(), plain)
    with pytest.raises(IndexError):
        lazy[len(plain)] = 1.0


def test_copies_are_read_like_any_tensor(bench: Bench) -> None:
    row = bench.lazy(0)[3]
    assert (
        type(row + 1) is torch.Tensor
        and row.numpy().shape == row.shape
        and float(row.sum()) == float(row.clone().sum())
    )
    changed = row.clone()
    changed.zero_()
    assert type(torch.stack([row, row])) is torch.Tensor and row.tolist() == bench.lazy(0).materialise()[3].tolist()
