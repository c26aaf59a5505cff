"""`torch.distributed.checkpoint` saves and loads tables on SSD window by window, and as TorchRec's FUSED ones."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor
from torchrec.distributed import DistributedModelParallel

from tests.ranks import GPU_RANKS, run_ranks
from tests.sharding.models import (
    Model,
    SequenceModel,
    local_rows,
    make_dmp,
    optimizer_rows,
    sparse_of,
    train,
)
from torchrec_turbossd.sharding import row_columns, windows
from torchrec_turbossd.sharding.lazy_sharded import LazyShardedTensor
from torchrec_turbossd.sharding.staging import TurboSSDStager

ADAGRAD, ROWWISE = EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD
SLOTS = {"big": 120, "wide": 60}
WINDOW = 2048
"""Bytes; small, so that every table has several windows."""

Rows = dict[str, list[tuple[tuple[int, ...], Tensor]]]


def _both(dmp: DistributedModelParallel) -> dict[str, Any]:
    return {"model": dmp.state_dict(), "optim": dmp.fused_optimizer.state_dict()}


def _rows(dmp: DistributedModelParallel) -> Rows:
    return {**local_rows(dmp.state_dict()), **optimizer_rows(dmp)}


def _load(dmp: DistributedModelParallel, path: Path) -> None:
    """As users do: into the state dicts, and these into the model."""
    state = _both(dmp)
    dcp.load(state, checkpoint_id=str(path))
    missed = dmp.load_state_dict(state["model"])
    dmp.fused_optimizer.load_state_dict(state["optim"])
    if missed.missing_keys or missed.unexpected_keys:
        raise AssertionError(str(missed))


def _check_same(wanted: Rows, got: Rows, label: str) -> None:
    if wanted.keys() != got.keys() or not wanted:
        raise AssertionError(f"{label}: keys {sorted(got)} instead of {sorted(wanted)}")
    for key, shards in wanted.items():
        for (offset, rows), (other, mine) in zip(shards, got[key], strict=True):
            if offset != other or not torch.equal(rows.flatten(), mine.flatten()):
                raise AssertionError(f"{label}: {key} at {offset} differs")


def _whole(ranks: list[Rows]) -> dict[str, Tensor]:
    """Whole tensors of what all ranks hold."""
    found: dict[str, Tensor] = {}
    for key in {key for rows in ranks for key in rows}:
        shards = [shard for rows in ranks for shard in rows.get(key, [])]
        size = [max(offset[d] + rows.shape[d] for offset, rows in shards) for d in range(shards[0][1].dim())]
        found[key] = torch.full(size, float("nan"))
        for offset, rows in shards:
            found[key][tuple(slice(o, o + n) for o, n in zip(offset, rows.shape, strict=True))] = rows
    return found


def _close(*models: DistributedModelParallel) -> None:
    for dmp in models:
        if hasattr(sparse_of(dmp), "close"):
            sparse_of(dmp).close()


def _interchange(rank: int, world: int, cases: list[tuple[str, str]], directory: Path) -> int:
    windows.WINDOW_BYTES = WINDOW
    for kind, sharding in cases:
        base = directory / f"{kind}-{sharding}"

        def build(where: str | None, kind: str = kind, sharding: str = sharding, base: Path = base) -> Any:
            model = Model() if kind == "ebc" else SequenceModel()
            on_ssd = (None, None) if where is None else (base / where, SLOTS)
            return make_dmp(world, sharding, ROWWISE, *on_ssd, model)

        ours, fused = build("trained"), build(None)
        for dmp, name in ((ours, "ours"), (fused, "fused")):
            train(dmp, rank, range(4))
            dcp.save(_both(dmp), checkpoint_id=str(base / name))
        _check_metadata(base / "ours", base / "fused")
        loaded = {"ours from fused": build("b"), "ours from ours": build("c"), "fused from ours": build(None)}
        for label, dmp in loaded.items():
            _load(dmp, base / label.rsplit(" ", maxsplit=1)[1])
            _check_same(_rows(ours), _rows(dmp), f"{kind} {sharding} {label}")
        wanted, *others = (train(dmp, rank, range(4, 9)) for dmp in (ours, fused, *loaded.values()))
        for got, label in zip(others, ["fused", *loaded], strict=True):
            if not all(torch.equal(*pair) for pair in zip(wanted, got, strict=True)):
                raise AssertionError(f"{kind} {sharding} {label}: training goes on otherwise")
        _close(ours, *loaded.values())
    return len(cases)


def _check_metadata(ours: Path, fused: Path) -> None:
    """The same keys, shapes and types; ours in more chunks."""
    mine, theirs = (dcp.FileSystemReader(path).read_metadata().state_dict_metadata for path in (ours, fused))
    if mine.keys() != theirs.keys():
        raise AssertionError(f"keys {sorted(mine)} instead of {sorted(theirs)}")
    for key, wanted in theirs.items():
        if getattr(wanted, "size", None) is None:
            continue
        if (mine[key].size, mine[key].properties) != (wanted.size, wanted.properties):
            raise AssertionError(f"{key}: {mine[key].properties} instead of {wanted.properties}")
        largest = max(4 * chunk.sizes.numel() for chunk in mine[key].chunks)
        if ("big" in key or "wide" in key) and largest > WINDOW:
            raise AssertionError(f"{key}: chunks of {largest} bytes")


@pytest.mark.parametrize(
    ("cases", "world", "backend"),
    [
        ([("ebc", "table_wise"), ("ebc", "column_wise")], 2, "gloo"),
        ([("ebc", "row_wise"), ("ec", "row_wise"), ("ec", "column_wise")], 2, "gloo"),
        ([("ebc", "table_row_wise"), ("ebc", "grid_shard"), ("ebc", "table_column_wise")], 4, "gloo"),
        pytest.param([("ebc", "row_wise")], GPU_RANKS, "nccl", marks=pytest.mark.gpu),
    ],
    ids=["tables-and-columns", "rows-and-sequences", "hosts", "nccl"],
)
def test_checkpoints_are_those_of_fused(tmp_path: Path, cases: list[tuple[str, str]], world: int, backend: str) -> None:
    found = run_ranks(world, _interchange, cases, tmp_path, backend=backend, local=2 if world > 2 else None)
    assert found == [len(cases)] * world


def _save(rank: int, world: int, sharding: str, optimizer: EmbOptimType, live: Path, path: Path) -> Rows:
    windows.WINDOW_BYTES = WINDOW
    dmp = make_dmp(world, sharding, optimizer, live, SLOTS)
    train(dmp, rank, range(3))
    dcp.save(_both(dmp), checkpoint_id=str(path))
    rows = _rows(dmp)
    _close(dmp)
    return rows


def _load_as(rank: int, world: int, cases: list[tuple[str, EmbOptimType, Path]], live: Path) -> list[Rows]:
    windows.WINDOW_BYTES = WINDOW
    found = []
    for number, (sharding, optimizer, path) in enumerate(cases):
        dmp = make_dmp(world, sharding, optimizer, live / str(number), SLOTS)
        _load(dmp, path)
        found.append(_rows(dmp))
        _close(dmp)
    return found


def test_a_checkpoint_loads_under_another_sharding(tmp_path: Path) -> None:
    columns, tables, rows = (tmp_path / name for name in ("columns", "tables", "rows"))
    saved = {
        columns: _whole(run_ranks(2, _save, "column_wise", ADAGRAD, tmp_path / "a", columns)),
        tables: _whole(run_ranks(2, _save, "table_wise", ADAGRAD, tmp_path / "b", tables)),
        rows: _whole(run_ranks(1, _save, "row_wise", ROWWISE, tmp_path / "c", rows)),
    }
    # One rank's columns of a table lie beside each other in what another saved whole, and the other way round.
    on_two = [("column_wise", ADAGRAD, tables), ("table_wise", ADAGRAD, columns), ("row_wise", ADAGRAD, columns)]
    # A row-wise state has one layout for tables and rows.
    on_two += [("table_wise", ROWWISE, rows), ("row_wise", ROWWISE, rows)]
    on_one = [("table_wise", ADAGRAD, columns), ("row_wise", ADAGRAD, tables)]
    for world, cases in ((2, on_two), (1, on_one)):
        ranks = run_ranks(world, _load_as, cases, tmp_path / f"live-{world}")
        for number, (sharding, _, path) in enumerate(cases):
            got, label = _whole([rank[number] for rank in ranks]), f"{path.name} to {sharding} on {world}"
            assert got.keys() == saved[path].keys(), label
            for key, wanted in saved[path].items():
                assert not wanted.isnan().any() and torch.equal(got[key], wanted), f"{label}: {key}"


class _Meter:
    """What passes through memory: bytes of rows of one call of a TBE, and of one tensor made of rows."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.most = {"rows": 0, "tensor": 0}
        live, columns = row_columns.LiveRows, row_columns.RowColumns
        patch.setattr(live, "read", self._counting("rows", live.read, lambda found, args: found.numel()))
        patch.setattr(live, "write", self._counting("rows", live.write, lambda found, args: args[2].numel()))
        patch.setattr(columns, "read", self._counting("tensor", columns.read, lambda found, args: found.nbytes))

    def _counting(self, what: str, call: Any, size: Callable[[Any, Any], int]) -> Any:
        def counted(*args: Any) -> Any:
            found = call(*args)
            self.most[what] = max(self.most[what], size(found, args))
            return found

        return counted


def _window(rank: int, world: int, directory: Path) -> list[dict[str, int]]:
    windows.WINDOW_BYTES = WINDOW
    dmp = make_dmp(world, "row_wise", ROWWISE, directory / "live", SLOTS)
    train(dmp, rank, range(3))
    seen, before = [], _rows(dmp)
    for threads in (1, 3):
        with pytest.MonkeyPatch.context() as patch:
            meter = _Meter(patch)
            writer = dcp.FileSystemWriter(directory / f"saved-{threads}", thread_count=threads)
            dcp.save(_both(dmp), storage_writer=writer)
            seen.append(meter.most)
    train(dmp, rank, range(3, 6))
    with pytest.MonkeyPatch.context() as patch:
        meter = _Meter(patch)
        _load(dmp, directory / "saved-3")
        seen.append(meter.most)
    _check_same(before, _rows(dmp), "back in time")
    _close(dmp)
    return seen


def test_one_window_is_in_memory(tmp_path: Path) -> None:
    for seen in run_ranks(2, _window, tmp_path):
        assert len(seen) == 3
        for most in seen:
            assert WINDOW // 2 < most["rows"] <= WINDOW and most["tensor"] <= WINDOW


def _no_state(rank: int, world: int, directory: Path) -> None:
    windows.WINDOW_BYTES = WINDOW
    ours, other = (make_dmp(world, "row_wise", EmbOptimType.EXACT_SGD, directory / n, SLOTS) for n in "ab")
    train(ours, rank, range(3))
    dcp.save({"model": ours.state_dict()}, checkpoint_id=str(directory / "saved"))
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=str(directory / "saved"))
    _check_same(local_rows(ours.state_dict()), local_rows(other.state_dict()), "SGD")
    if any(ours.fused_optimizer.state_dict()["state"].values()):
        raise AssertionError("SGD has no state")
    _close(ours, other)


def test_without_optimizer_state_the_model_is_enough(tmp_path: Path) -> None:
    run_ranks(2, _no_state, tmp_path)


def _by_torch(dmp: DistributedModelParallel, rank: int, path: Path, group: Any) -> None:
    """torch's own stager works too; it reads every row into memory."""
    wanted, writer = _rows(dmp), dcp.FileSystemWriter(path)
    saving = dcp.async_save(_both(dmp), storage_writer=writer, process_group=group)
    train(dmp, rank, range(12, 14))
    saving.result()
    _load(dmp, path)
    _check_same(wanted, _rows(dmp), "staged by torch")


def _async(rank: int, world: int, directory: Path) -> None:
    windows.WINDOW_BYTES = WINDOW
    dmp = make_dmp(world, "row_wise", ROWWISE, directory / "live", SLOTS)
    group, stager = dist.new_group(backend="gloo"), TurboSSDStager()
    train(dmp, rank, range(4))
    live = directory / "live" / f"rank_{rank}"
    stale = live / ".ebc.staged-0123"
    stale.mkdir()
    for step in (4, 8):
        state, path = _both(dmp), directory / f"saved-{step}"
        # After the state is taken, so that rows have changed in the slots alone.
        train(dmp, rank, range(step, step + 2))
        wanted = {**local_rows(state["model"]), **optimizer_rows(dmp)}
        with pytest.MonkeyPatch.context() as patch:
            meter = _Meter(patch)
            saving = dcp.async_save(state, checkpoint_id=str(path), async_stager=stager, process_group=group)
            if meter.most["rows"] or meter.most["tensor"]:
                raise AssertionError("staging has read rows")
            train(dmp, rank, range(step + 2, step + 4))
            saving.result()
            if meter.most["rows"] or not 0 < meter.most["tensor"] <= WINDOW:
                raise AssertionError(f"{meter.most}: rows come from the live store, or not by windows")
        del saving, state
        other = make_dmp(world, "row_wise", ROWWISE, directory / f"other-{step}", SLOTS)
        _load(other, path)
        _check_same(wanted, _rows(other), f"saved at {step}")
        _close(other)
    _by_torch(dmp, rank, directory / "by-torch", group)
    staged = stager.stage(_both(dmp))
    weight = staged["model"]["ebc.embedding_bags.big.weight"]
    with pytest.raises(Exception, match="staged rows cannot be written"):
        weight.local_shards()[0].tensor.zero_()
    if isinstance(weight, LazyShardedTensor) and len(list(live.glob(".ebc.staged-*"))) != 1:
        raise AssertionError(f"{sorted(live.iterdir())}")
    del staged, weight
    gc.collect()
    stager.close()
    if stale.exists() or [p for p in live.iterdir() if "staged" in p.name]:
        raise AssertionError(f"left behind: {sorted(live.iterdir())}")
    _close(dmp)


def test_saving_in_the_background_stands_still(tmp_path: Path) -> None:
    run_ranks(2, _async, tmp_path)
