"""What FBGEMM's own SSD inference module promises holds here, and what is known to go wrong there does not."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import rounded_row_size_in_bytes
from torch import Tensor

from tests.serving.serving_kit import TYPES, WholeTables, ids
from torchrec_turbossd.errors import InputError, RowIndexError
from torchrec_turbossd.rows import quantise
from torchrec_turbossd.serving import TurboSSDInferenceModule
from torchrec_turbossd.sizing import AccessProfile
from torchrec_turbossd.tables import TableSpec

GIB = 1 << 30
ROWS, DIM = 3000, 16
SLOTS = 1024
"""What a table of `ROWS` rows gets at the least target."""
Specs = list[tuple[str, int, int, SparseType]]


def opened(directory: Path, specs: Specs, **options: Any) -> TurboSSDInferenceModule:
    defaults: dict[str, Any] = {"device": "cpu", "output_dtype": SparseType.FP32, "cache_hit_rate": 0.01}
    return TurboSSDInferenceModule.from_embedding_specs(specs, directory, **(defaults | options))


def served(module: TurboSSDInferenceModule, rows: Tensor, table: int = 0) -> Tensor:
    """Rows of one table as floats: bags of one, and nothing asked of the other tables."""
    dims = [dim for _, _, dim, _ in module.embedding_specs]
    lengths = torch.zeros(len(dims), rows.numel(), dtype=torch.int64)
    lengths[table] = 1
    offsets = torch.cat([ids(0), lengths.flatten().cumsum(0)])
    out: Tensor = module(rows, offsets)
    return out[:, sum(dims[:table]) : sum(dims[: table + 1])]


def padded(rows: Tensor, width: int) -> Tensor:
    """Row bytes with something behind them that is not theirs."""
    wide = torch.full((rows.shape[0], width), 201, dtype=torch.uint8)
    wide[:, : rows.shape[1]] = rows
    return wide


def as_bytes(values: Tensor) -> Tensor:
    return quantise(values, SparseType.FP32)


class Table:
    """A module of one FP32 table, every row written, and what it holds."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.directory, self.options = directory, {"name": "m"} | options
        self.held = torch.randn(ROWS, DIM)
        self.module = opened(directory, [("t", ROWS, DIM, SparseType.FP32)], **self.options)
        self.update(torch.arange(ROWS), self.held.clone())

    def update(self, rows: Tensor, values: Tensor) -> None:
        self.module.streaming_update(rows, as_bytes(values))
        for row, value in zip(rows.tolist(), values, strict=True):
            self.held[row] = value

    def cache(self, rows: Tensor) -> None:
        """Bring rows into slots; they are the last that were used."""
        served(self.module, rows)
        self.module.get_read_hit_rate_stats()

    def misses(self, rows: Tensor) -> int:
        self.module.get_read_hit_rate_stats()
        assert torch.equal(served(self.module, rows), self.held[rows])
        return self.module.get_read_hit_rate_stats()[1]

    def check(self) -> None:
        """Every row, a few at a time, so that each comes from slots or from SSD as it lies."""
        for part in torch.arange(ROWS).split(500):
            assert torch.equal(served(self.module, part), self.held[part])

    def reopen(self) -> None:
        self.module.close()
        self.module = opened(self.directory, [("t", ROWS, DIM, SparseType.FP32)], **self.options)


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Table]:
    table = Table(tmp_path / "ssd")
    yield table
    table.module.close()


# Making a module


def test_signature() -> None:
    """By position in FBGEMM's order, and with its defaults but for the sizes of RocksDB's buffers."""
    wanted = {
        "ssd_directory": "/tmp",
        "hbm_budget_gb": 0.0,
        "cache_hit_rate": 0.90,
        "pooling_mode": PoolingMode.SUM,
        "ssd_shards": 8,
        "ssd_write_buffer_size": None,
        "ssd_max_write_buffer_num": None,
        "ssd_rate_limit_mbps": 0,
        "enable_cache_locking": False,
    }
    ours = inspect.signature(TurboSSDInferenceModule.from_embedding_specs).parameters
    assert list(ours)[: len(wanted) + 1] == ["specs", *wanted]
    assert {name: ours[name].default for name in wanted} == wanted
    assert list(inspect.signature(TurboSSDInferenceModule.forward).parameters)[1:] == [
        "indices", "offsets", "per_sample_weights",
    ]  # fmt: skip


def test_a_module_of_several_tables(tmp_path: Path) -> None:
    specs = [("post_id", 5000, 128, SparseType.INT8), ("user_id", 2000, 64, SparseType.FP16)]
    with TurboSSDInferenceModule.from_embedding_specs(specs, str(tmp_path), 0.0, 0.8, device="cpu") as module:
        assert module.tbe is not None and module.embedding_specs == specs
        assert module.max_D_cache == max(rounded_row_size_in_bytes(dim, t, 16) for _, _, dim, t in specs) == 144
        out = module(ids(1, 2, 3), ids(0, 1, 2, 3, 3))
        assert out.shape == (2, 192) and out.dtype == torch.float16


@pytest.mark.parametrize(
    ("specs", "rate", "said"),
    [([], 0.9, "at least one table"), ([("t", 5, 4, SparseType.FP32)], 0.0, "cache_hit_rate")],
)
def test_wrong_declarations_are_value_errors(specs: Specs, rate: float, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        opened(tmp_path, specs, cache_hit_rate=rate)


@pytest.mark.parametrize("locking", [False, True])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_lookups_are_embedding_bags(kind: torch.dtype, locking: bool, tmp_path: Path) -> None:
    table = Table(tmp_path, enable_cache_locking=locking)
    bag = torch.nn.EmbeddingBag.from_pretrained(table.held, mode="sum")
    for _ in range(10):
        asked = torch.randint(ROWS, (8, 5))
        got = table.module(asked.flatten().to(kind), torch.arange(0, 41, 5).to(kind))
        torch.testing.assert_close(got, bag(asked))
    table.module.close()


@pytest.mark.parametrize("data_type", TYPES, ids=lambda t: t.name)
def test_rows_of_every_type(data_type: SparseType, tmp_path: Path) -> None:
    """Bytes padded to 16, or to the widest row of all tables, are the rows that a stock module looks up."""
    specs = [("t", 500, 24, data_type), ("wide", 10, 64, SparseType.FP32)]
    stock = WholeTables(
        [TableSpec(name=n, rows=r, dim=d, data_type=t) for n, r, d, t in specs], [0, 1], PoolingMode.SUM
    )
    rows = quantise(torch.randn(500, 24), data_type)
    stock.rows[0][:] = rows
    every = torch.arange(500)
    with opened(tmp_path, specs, output_dtype=SparseType.FP16) as module:
        for width in (rounded_row_size_in_bytes(24, data_type, 16), module.max_D_cache):
            module.streaming_update(every, padded(quantise(torch.zeros(500, 24), data_type), width))
            module.streaming_update(every, padded(rows, width))
            offsets = torch.cat([torch.arange(501), torch.full((500,), 500)])
            assert torch.equal(module(every, offsets), stock(every, offsets))


# Updates

UPDATES = {
    "a few": ids(0, 10, 100, 999),
    "one row": ids(42),
    "the first and the last": ids(0, ROWS - 1),
    "one row twice": ids(42, 42),
    "a thousand": torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))[:1000],
}


@pytest.mark.parametrize("cached", ["none", "half", "all"])
@pytest.mark.parametrize("case", UPDATES)
def test_an_update_is_seen_and_nothing_else_changes(case: str, cached: str, table: Table) -> None:
    """Wherever the rows were; the last of an id given twice counts; what is on SSD is the same."""
    rows = UPDATES[case]
    table.cache(rows[: {"none": 0, "half": (len(rows) + 1) // 2, "all": len(rows)}[cached]])
    for _ in range(2):
        table.update(rows, torch.randn(len(rows), DIM))
        assert torch.equal(served(table.module, rows), table.held[rows])
    table.check()
    table.reopen()
    table.check()


def test_updates_of_a_row_in_turn(table: Table) -> None:
    for _ in range(10):
        table.update(ids(5), torch.randn(1, DIM))
        assert torch.equal(served(table.module, ids(5)), table.held[5:6])


def test_other_rows_stay_in_slots(table: Table) -> None:
    hot = torch.arange(0, 800, 2)
    table.cache(hot)
    table.update(ids(100, 333), torch.randn(2, DIM))
    assert table.misses(hot[hot != 100]) == 0


def test_a_second_lookup_reads_nothing(table: Table) -> None:
    rows = torch.randperm(ROWS)[:500]
    table.cache(rows)
    assert table.misses(rows) == table.misses(rows.flip(0)) == 0


def test_an_empty_update_changes_nothing(table: Table) -> None:
    table.cache(torch.arange(50))
    table.module.streaming_update(ids(), torch.empty(0, table.module.max_D_cache, dtype=torch.uint8))
    assert table.misses(torch.arange(50)) == 0


def test_linear_ids_count_through_all_tables(tmp_path: Path) -> None:
    specs = [(f"t{place}", 500, 8, SparseType.FP32) for place in range(3)]
    with opened(tmp_path, specs) as module:
        module.streaming_update(torch.arange(1500), as_bytes(torch.arange(1500.0)[:, None].repeat(1, 8)))
        module.streaming_update(ids(2 * 500, 499), as_bytes(torch.tensor([[-1.0] * 8, [-2.0] * 8])))
        for place in range(3):
            want = torch.arange(500.0) + 500 * place
            want[0 if place == 2 else 499] = {0: -2.0, 1: 999.0, 2: -1.0}[place]
            assert torch.equal(served(module, torch.arange(500), place)[:, 3], want)


BAD_UPDATES = {
    "2-D indices": (torch.zeros(2, 2, dtype=torch.int64), (4, 64), InputError),
    "1-D weights": (ids(0), (64,), InputError),
    "another number of rows": (ids(0, 1), (3, 64), InputError),
    "another width": (ids(0, 1), (2, 48), InputError),
    "beyond the last row": (ids(0, ROWS), (2, 64), RowIndexError),
}


@pytest.mark.parametrize("case", BAD_UPDATES)
def test_wrong_updates_are_refused(case: str, table: Table) -> None:
    rows, shape, error = BAD_UPDATES[case]
    with pytest.raises(error):
        table.module.streaming_update(rows, torch.ones(shape, dtype=torch.uint8))
    table.check()


# Snapshots


def test_load_snapshot_and_then_updates(table: Table, tmp_path: Path) -> None:
    """The snapshot's rows are served, those that it lacks are zeros, and updates go on; nothing of before is left."""
    with opened(tmp_path / "other", [("t", ROWS, DIM, SparseType.FP32)]) as other:
        new = torch.zeros(ROWS, DIM)
        new[100:] = torch.randn(ROWS - 100, DIM)
        other.streaming_update(torch.arange(100, ROWS), as_bytes(new[100:]))
        other.save_snapshot(tmp_path / "snapshot")
    table.cache(torch.arange(80, 700))
    table.module.load_snapshot(str(tmp_path / "snapshot"), 1)
    table.held = new.clone()
    table.check()
    for part in torch.randperm(ROWS).split(100):
        table.update(part, torch.randn(len(part), DIM))
    table.check()
    table.module.load_snapshot(tmp_path / "snapshot")
    table.held = new.clone()
    table.check()
    table.reopen()
    table.check()


def test_snapshots_one_after_the_other(table: Table, tmp_path: Path) -> None:
    holds = []
    for number in range(3):
        table.update(torch.arange(ROWS), torch.full((ROWS, DIM), float(number)))
        table.module.save_snapshot(tmp_path / f"{number}")
        holds.append(table.held.clone())
    for number in (0, 2, 1, 1):
        table.module.load_snapshot(str(tmp_path / f"{number}"))
        table.held = holds[number].clone()
        table.check()
        table.update(ids(0), torch.full((1, DIM), 100.0 + number))
        table.check()


# Sizes and counts


def test_estimates() -> None:
    estimate = TurboSSDInferenceModule.estimate_hbm_gb
    post, user = ("post_id", 1_000_000, 128, SparseType.INT8), ("user_id", 500_000, 64, SparseType.FP16)
    assert estimate([post], 0.9) > estimate([post], 0.5) > 0
    # Each table by its own width: rows are not padded to the widest of all.
    assert estimate([post, user]) == pytest.approx(estimate([post]) + estimate([user]))
    big = [("post_id", 1_600_000_000, 128, SparseType.INT8)]
    by_rows = 1_600_000_000 * 0.9 * 144 / GIB
    assert 100 < by_rows < 300 and estimate(big) < by_rows / 5, "slots follow what is asked for, not rows x hit rate"
    flat = {"post_id": AccessProfile.zipf(1_000_000, 0.0)}
    a_slot = (estimate([post], 0.9, flat) * GIB - 4 * 1_000_000) / 900_000
    assert 144 < a_slot < 144 + 48, "a padded row and its bookkeeping, beside 4 bytes of slot map for each row"


def test_a_budget_caps_the_slots(tmp_path: Path) -> None:
    specs = [("t", 200_000, 128, SparseType.FP32)]
    with opened(tmp_path, specs, hbm_budget_gb=0.01, cache_hit_rate=0.9) as module:
        assert SLOTS < module.slots["t"] < 0.01 * GIB / 512


def test_reads_are_counted_and_begin_anew(table: Table) -> None:
    stats = table.module.get_read_hit_rate_stats
    assert stats() == (0, 0, 0)
    served(table.module, ids(1, 2, 3, 2))
    assert stats() == (1, 3, 4)
    served(table.module, ids(1, 2, 7))
    served(table.module, ids(7))
    assert stats() == (3, 1, 4)
    assert stats() == (0, 0, 0)


# What goes wrong there


def test_an_update_outlives_the_slots(table: Table) -> None:
    """A row updated while in slots is not overwritten on SSD by its old bytes when it leaves them."""
    first, others = torch.arange(600), torch.arange(1000, ROWS)
    for _ in range(2):
        table.cache(first)
        table.update(first[::3], torch.randn(200, DIM))
        for part in others.split(500):
            table.cache(part)
        assert table.misses(first) > 300, "most rows have left their slots"
    table.check()
    table.reopen()
    table.check()


@pytest.mark.filterwarnings("ignore:a batch did not fit")
def test_more_rows_than_slots(table: Table) -> None:
    """No row that finds no slot is taken from another's, nor written into it."""
    assert table.module.slots["t"] == SLOTS
    table.cache(torch.arange(300))
    for _ in range(3):
        rows = torch.randperm(ROWS)[: SLOTS + 900]
        assert torch.equal(served(table.module, rows), table.held[rows])
        assert torch.equal(served(table.module, torch.arange(300)), table.held[:300])
    table.check()


def test_rows_never_written_are_zeros(tmp_path: Path) -> None:
    for data_type in TYPES:
        with opened(tmp_path, [("t", ROWS, 16, data_type)]) as module:
            module.streaming_update(ids(7), torch.ones(1, 16), "t")
            for part in torch.randperm(ROWS).split(500):
                assert torch.equal(served(module, part).abs().sum(1), (part == 7) * 16.0)


def test_ids_beyond_int32(tmp_path: Path) -> None:
    far = 2**31
    with opened(tmp_path, [("long", far, 4, SparseType.INT8), ("short", 50, 4, SparseType.INT8)]) as module:
        rows = quantise(torch.tensor([[1.0] * 4, [2.0] * 4]), SparseType.INT8)
        module.streaming_update(ids(far - 1, far + 7), rows)
        assert served(module, ids(far - 1, 7), 0)[:, 0].tolist() == [1.0, 0.0]
        assert served(module, ids(7, 8), 1)[:, 0].tolist() == [2.0, 0.0]
        with pytest.raises(RowIndexError):
            module.streaming_update(ids(far + 50), rows[:1])


def test_a_loaded_snapshot_is_left_as_it_is(table: Table, tmp_path: Path) -> None:
    table.module.save_snapshot(tmp_path / "snapshot")
    files = sorted((p, p.read_bytes()) for p in (tmp_path / "snapshot").rglob("*") if p.is_file())
    table.module.load_snapshot(tmp_path / "snapshot")
    table.update(torch.arange(ROWS), torch.randn(ROWS, DIM))
    table.module.flush()
    table.module.close()
    assert sorted((p, p.read_bytes()) for p in (tmp_path / "snapshot").rglob("*") if p.is_file()) == files
