"""Loading a snapshot: what is refused, what is carried over, and what a failure leaves."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torch import Tensor

from tests.serving.serving_kit import WholeTables
from tests.snapshot.snapshot_kit import one_table_snapshot, row_file, write_snapshot
from tests.snapshot.test_convert import TABLES, Trained
from tests.snapshot.test_snapshot import DAMAGE
from torchrec_turbossd.errors import SnapshotError, StoreError, TurboSSDError
from torchrec_turbossd.rows import quantise
from torchrec_turbossd.serving import TurboSSDInferenceModule
from torchrec_turbossd.snapshot import read_manifest
from torchrec_turbossd.tables import TableShard, TableSpec, with_type

build = TurboSSDInferenceModule.from_embedding_specs
ROWS = 50
SPECS = [("a", ROWS, 4, SparseType.FP32)]
EVERY = torch.arange(ROWS)


def values(first: float) -> Tensor:
    """Row i is first + i."""
    return (first + EVERY.float())[:, None].expand(ROWS, 4).contiguous()


def answers(module: TurboSSDInferenceModule) -> Tensor:
    return module(EVERY, torch.arange(ROWS + 1))


@contextmanager
def serving(tmp_path: Path) -> Iterator[TurboSSDInferenceModule]:
    with build(SPECS, tmp_path / "ssd", device="cpu", name="m", output_dtype=SparseType.FP32) as module:
        module.streaming_update(EVERY, values(1000), "a")
        yield module


def saved(tmp_path: Path) -> Path:
    with build(SPECS, tmp_path / "other", device="cpu") as other:
        other.streaming_update(EVERY, values(2000), "a")
        other.save_snapshot(tmp_path / "snap", version=5)
    return tmp_path / "snap"


@pytest.fixture
def module(tmp_path: Path) -> Iterator[TurboSSDInferenceModule]:
    with serving(tmp_path) as module:
        yield module


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    return saved(tmp_path)


def generations(module: TurboSSDInferenceModule) -> list[str]:
    return sorted(p.name for p in module.directory.iterdir())


def reopened(module: TurboSSDInferenceModule) -> Tensor:
    module.close()
    with build(SPECS, module.directory.parent, device="cpu", name="m", output_dtype=SparseType.FP32) as again:
        return answers(again)


def test_load_serves_the_snapshot_and_resumes_it(module: TurboSSDInferenceModule, snapshot: Path) -> None:
    answers(module)
    module.load_snapshot(snapshot)
    # The clone does not need the snapshot.
    shutil.rmtree(snapshot)
    assert torch.equal(answers(module), values(2000))
    assert (module.version, generations(module)) == (5, ["CURRENT", "LOCK", "gen-2"])
    module.streaming_update(EVERY[:1], values(7)[:1], "a", version=6)
    want = values(2000)
    want[0] = 7
    assert torch.equal(reopened(module), want)


def test_the_snapshot_is_never_opened(module: TurboSSDInferenceModule, snapshot: Path) -> None:
    before = sorted((p, p.stat().st_size, p.stat().st_mtime_ns) for p in snapshot.rglob("*"))
    module.load_snapshot(snapshot)
    module.streaming_update(EVERY, values(1), "a")
    module.flush()
    assert sorted((p, p.stat().st_size, p.stat().st_mtime_ns) for p in snapshot.rglob("*")) == before
    module.load_snapshot(snapshot)
    assert torch.equal(answers(module), values(2000))


def test_hot_rows_stay_in_slots(module: TurboSSDInferenceModule, snapshot: Path) -> None:
    answers(module)
    module.get_read_hit_rate_stats()
    module.load_snapshot(snapshot)
    assert torch.equal(answers(module), values(2000))
    assert module.get_read_hit_rate_stats() == (ROWS, 0, ROWS)
    module.tbe.rows.cache.check()


@pytest.mark.parametrize(("damage", "error", "said"), DAMAGE, ids=[d.__name__ for d, *_ in DAMAGE])
def test_damaged_snapshots_are_refused(
    damage: Callable[[Path], None],
    error: type[TurboSSDError],
    said: str,
    module: TurboSSDInferenceModule,
    snapshot: Path,
) -> None:
    damage(snapshot)
    with pytest.raises(error, match=said):
        module.load_snapshot(snapshot)
    assert_serves_on(module)


def assert_serves_on(module: TurboSSDInferenceModule) -> None:
    assert torch.equal(answers(module), values(1000))
    assert generations(module) == ["CURRENT", "LOCK", "gen-1"]
    module.streaming_update(EVERY[:1], values(3)[:1], "a")
    want = values(1000)
    want[0] = 3
    assert torch.equal(answers(module), want)
    assert torch.equal(reopened(module), want)


OTHER_TABLES = {
    "no such table": TableSpec(name="b", rows=ROWS, dim=4),
    "other rows": TableSpec(name="a", rows=ROWS + 1, dim=4),
    "other width": TableSpec(name="a", rows=ROWS, dim=8),
    "other type": TableSpec(name="a", rows=ROWS, dim=4, data_type=SparseType.FP16),
}


@pytest.mark.parametrize("kind", ["serving", "training"])
@pytest.mark.parametrize("case", OTHER_TABLES)
def test_snapshots_of_other_tables_are_refused(
    case: str, kind: str, module: TurboSSDInferenceModule, tmp_path: Path
) -> None:
    table = OTHER_TABLES[case]
    none = torch.empty(0, dtype=torch.int64), torch.empty(0, table.row_bytes, dtype=torch.uint8)
    one_table_snapshot(tmp_path / "other", table, none, kind=kind)
    if (case, kind) == ("other type", "training"):
        module.load_snapshot(tmp_path / "other")
        return
    with pytest.raises(SnapshotError, match=r"'[ab]'"):
        module.load_snapshot(tmp_path / "other")
    assert_serves_on(module)


def test_tables_that_are_not_served_ride_along(module: TurboSSDInferenceModule, tmp_path: Path) -> None:
    wide = [*SPECS, ("b", 9, 8, SparseType.INT8)]
    with build(wide, tmp_path / "ssd", device="cpu", output_dtype=SparseType.FP32) as other:
        other.streaming_update(EVERY, values(1), "a")
        other.streaming_update(torch.arange(9), torch.ones(9, 8), "b")
        other.save_snapshot(tmp_path / "both")
    module.load_snapshot(tmp_path / "both")
    assert torch.equal(answers(module), values(1))
    module.save_snapshot(tmp_path / "again")
    assert [t.name for t in read_manifest(tmp_path / "again").tables] == ["a", "b"]


BUILT, SQUEEZED, WARMED = "built", "squeezed", "warmed"


def during(place: str, patch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    """Run `act` in the middle of the next load: before the new generation opens, or before or after it was warmed."""
    import torchrec_turbossd.serving.live as live

    owner, name = {
        BUILT: (live, "build_generation"),
        SQUEEZED: (live.Successor, "squeeze"),
        WARMED: (live.Successor, "warm"),
    }[place]
    usual = getattr(owner, name)

    def then_act(*arguments: Any) -> Any:
        done = usual(*arguments)
        patch.undo()
        act()
        return done

    patch.setattr(owner, name, then_act)


@pytest.mark.parametrize("place", [BUILT, SQUEEZED, WARMED])
@pytest.mark.parametrize(("version", "carried"), [(None, True), (6, True), (5, False), (4, False)])
@pytest.mark.parametrize("resident", [True, False])
def test_updates_during_a_load(
    place: str,
    version: int | None,
    carried: bool,
    resident: bool,
    module: TurboSSDInferenceModule,
    snapshot: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if resident:
        answers(module)
    before = values(1000)
    before[7] = 1

    def act() -> None:
        module.streaming_update(EVERY[7:8], torch.ones(1, 4), "a", version=version)
        assert torch.equal(answers(module), before)

    during(place, monkeypatch, act)
    module.load_snapshot(snapshot)
    want = values(2000)
    if carried:
        want[7] = 1
    assert torch.equal(answers(module), want)
    assert module.version == max(5, version or 0)
    module.tbe.rows.cache.check()
    assert torch.equal(reopened(module), want)


def test_rows_that_come_into_slots_during_a_load(
    module: TurboSSDInferenceModule, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    came = EVERY[10:30]
    during(SQUEEZED, monkeypatch, lambda: module(came, torch.arange(came.numel() + 1)))
    module.load_snapshot(snapshot)
    module.get_read_hit_rate_stats()
    assert torch.equal(module(came, torch.arange(came.numel() + 1)), values(2000)[10:30])
    assert module.get_read_hit_rate_stats() == (20, 0, 20)


def test_old_versions_are_left_out_after_a_load(module: TurboSSDInferenceModule, snapshot: Path) -> None:
    assert module.streaming_update(EVERY[:1], torch.ones(1, 4), "a", version=3)
    module.load_snapshot(snapshot)
    with pytest.warns(RuntimeWarning, match="version 5 was left out"):
        assert not module.streaming_update(EVERY[:1], torch.ones(1, 4), "a", version=5)
    assert torch.equal(answers(module), values(2000))
    assert module.streaming_update(EVERY[:1], torch.ones(1, 4), "a", version=6)
    assert float(answers(module)[0, 0]) == 1.0


def fail_with(*_: object, **__: object) -> None:
    raise StoreError("planted")


FAILURES = {
    "cloning": "torchrec_turbossd.serving.swap.clone_directory",
    "checking the clone": "torchrec_turbossd.serving.swap.check_files",
    "describing": "torchrec_turbossd.serving.swap.write_info",
    "opening": "torchrec_turbossd.serving.live.LayeredRowStore",
    "warming": "torchrec_turbossd.tbe.successor.stored_rows",
    "recording": "torchrec_turbossd.serving.live.write_info",
    "naming": "torchrec_turbossd.serving.generations.write_durably",
    "naming, too late": "torchrec_turbossd.serving.generations.sync_file",
}


@pytest.mark.parametrize(
    ("step", "cold"), [(s, c) for s in FAILURES for c in (False, True) if (s, c) != ("warming", True)]
)
def test_a_load_that_fails_changes_nothing(
    step: str, cold: bool, module: TurboSSDInferenceModule, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not cold:
        answers(module)
    with monkeypatch.context() as patch:
        patch.setattr(FAILURES[step], fail_with)
        with pytest.raises(StoreError, match="planted"):
            module.load_snapshot(snapshot)
    module.tbe.rows.cache.check()
    assert_serves_on(module)


def test_a_name_that_was_written_before_the_failure_is_taken_back(
    module: TurboSSDInferenceModule, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchrec_turbossd.serving.generations as folder

    usual = folder.write_durably

    def write_and_fail(path: Path, text: str) -> None:
        usual(path, text)
        monkeypatch.undo()
        raise StoreError("planted")

    monkeypatch.setattr(folder, "write_durably", write_and_fail)
    # Descriptions of generations are written by the same function: only the name is to fail.
    monkeypatch.setattr("torchrec_turbossd.serving.swap.write_info", lambda path, info: None)
    monkeypatch.setattr("torchrec_turbossd.serving.live.write_info", lambda path, info: None)
    with pytest.raises(StoreError, match="planted"):
        module.load_snapshot(snapshot)
    assert_serves_on(module)


def test_slots_that_cannot_be_refilled_are_emptied(
    module: TurboSSDInferenceModule, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(module)
    memory = module.tbe.rows.memory
    usual = memory.write

    def write_and_fail(table: int, slots: Tensor, rows: Tensor) -> None:
        usual(table, slots, rows)
        raise MemoryError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(memory, "write", write_and_fail)
        with pytest.raises(MemoryError, match="planted"):
            module.load_snapshot(snapshot)
    assert_serves_on(module)


@pytest.mark.parametrize("data_type", [SparseType.FP32, SparseType.INT8, SparseType.INT4], ids=lambda t: t.name)
def test_a_training_snapshot_is_answered_as_the_trained_tables(data_type: SparseType, tmp_path: Path) -> None:
    trained = Trained(3, 0.4)
    write_snapshot(tmp_path / "trained", TABLES, trained.ranks, version=8)
    tables = [with_type(t, data_type) for t in TABLES]
    whole = WholeTables(tables, [0, 1, 2, 3], PoolingMode.SUM)
    whole.rows = [quantise(trained.weights[t.name], data_type) for t in tables]
    every = torch.arange(90).repeat(4), torch.arange(361)
    specs = [(t.name, t.rows, t.dim, data_type) for t in tables]
    with build(specs, tmp_path / "ssd", device="cpu", name="m") as module:
        module(*every)
        module.load_snapshot(tmp_path / "trained")
        assert module.version == 8
        assert torch.equal(module(*every), whole(*every)), "rows in slots"
        module.save_snapshot(tmp_path / "saved")
    with build(specs, tmp_path / "ssd", device="cpu", name="m") as module:
        assert torch.equal(module(*every), whole(*every)), "rows read again, and never written ones"
    with build(specs, tmp_path / "ssd", device="cpu") as module:
        module.load_snapshot(tmp_path / "saved", 2)
        assert torch.equal(module(*every), whole(*every)), "a serving snapshot keeps the rule"


def test_a_serving_snapshot_of_several_parts_is_merged(tmp_path: Path) -> None:
    table = TableSpec(name="a", rows=ROWS, dim=4, data_type=SparseType.INT8)
    rows = quantise(values(1), SparseType.INT8)
    halves = [(0, 20), (20, 30)]
    ranks = [
        {TableShard(table=table, row_offset=at, rows=n, cols=4): (EVERY[at : at + n], rows[at : at + n])}
        for at, n in halves
    ]
    write_snapshot(tmp_path / "snap", [table], ranks, kind="serving")
    with build([("a", ROWS, 4, SparseType.INT8)], tmp_path / "ssd", device="cpu") as module:
        module.load_snapshot(tmp_path / "snap")
        assert torch.equal(module.tbe.rows.read_rows(0, EVERY), rows)


def test_a_crash_while_loading_leaves_the_old_generation(
    module: TurboSSDInferenceModule, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("torchrec_turbossd.serving.live.remove", lambda path: None)
        patch.setattr("torchrec_turbossd.serving.generations.write_durably", fail_with)
        with pytest.raises(StoreError):
            module.load_snapshot(snapshot)
    assert generations(module) == ["CURRENT", "LOCK", "gen-1", "gen-2"]
    assert torch.equal(reopened(module), values(1000))
    assert generations(module) == ["CURRENT", "LOCK", "gen-1"]


def test_a_flipped_bit_in_a_copy_is_found(
    module: TurboSSDInferenceModule, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchrec_turbossd.serving.swap as swap

    usual = swap.clone_directory

    def copy_badly(src: Path, dst: Path) -> bool:
        usual(src, dst)
        file = row_file(dst)
        data = bytearray(file.read_bytes())
        data[100] ^= 1
        file.unlink()
        file.write_bytes(data)
        return False

    monkeypatch.setattr(swap, "clone_directory", copy_badly)
    with pytest.raises(StoreError, match="does not match its digest"):
        module.load_snapshot(snapshot)
    assert_serves_on(module)
