"""`state_dict` and `load_state_dict` of models and optimizers with tables on SSD."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed import DistributedModelParallel

from tests.ranks import run_ranks
from tests.sharding.models import (
    DIM,
    ROWS,
    Model,
    SequenceModel,
    local_rows,
    make_dmp,
    optimizer_rows,
    sparse_of,
    train,
)
from torchrec_turbossd.errors import InputError
from torchrec_turbossd.sharding import windows
from torchrec_turbossd.sharding.lazy_rows import LazyRows
from torchrec_turbossd.sharding.lazy_sharded import LazyShardedTensor

ROWWISE = EmbOptimType.EXACT_ROWWISE_ADAGRAD
SLOTS = {"big": 120, "wide": 60}
WINDOW = 2048


def _check_same(wanted: dict[str, Any], got: dict[str, Any], label: str) -> None:
    if wanted.keys() != got.keys() or not wanted:
        raise AssertionError(f"{label}: keys {sorted(got)} instead of {sorted(wanted)}")
    for key, shards in wanted.items():
        for (offset, rows), (other, mine) in zip(shards, got[key], strict=True):
            if offset != other or not torch.equal(rows.flatten(), mine.flatten()):
                raise AssertionError(f"{label}: {key} at {offset} differs")


def _weights(dmp: DistributedModelParallel) -> dict[str, Any]:
    return local_rows(dmp.state_dict())


def _key(dmp: DistributedModelParallel, table: str) -> str:
    return next(key for key in dmp.state_dict() if key.endswith(f".{table}.weight"))


def _load_both(dmp: DistributedModelParallel, source: DistributedModelParallel) -> None:
    missed = dmp.load_state_dict(source.state_dict())
    dmp.fused_optimizer.load_state_dict(source.fused_optimizer.state_dict())
    if missed.missing_keys or missed.unexpected_keys:
        raise AssertionError(str(missed))


def _plain(dmp: DistributedModelParallel) -> None:
    """Whole tensors, the same on every rank, reach every shard; with strict keys, also through the module itself."""
    generator = torch.Generator().manual_seed(1)
    widths = {table: DIM * (2 if table == "wide" and hasattr(dmp.module, "ebc") else 1) for table in ROWS}
    whole = {_key(dmp, table): torch.randn(ROWS[table], dim, generator=generator) for table, dim in widths.items()}
    linear = {key: value for key, value in dmp.state_dict().items() if key.startswith("linear")}
    missed = dmp.load_state_dict({**whole, **linear})
    if missed.missing_keys or missed.unexpected_keys:
        raise AssertionError(str(missed))
    for key, shards in _weights(dmp).items():
        for (row, col), rows in shards:
            if not torch.equal(rows, whole[key][row : row + rows.shape[0], col : col + rows.shape[1]]):
                raise AssertionError(f"{key} at {row}, {col}: the whole tensor was not taken")
    whole = {key: value + 1 for key, value in whole.items()}
    sparse_of(dmp).load_state_dict({key.split(".", 1)[1]: value for key, value in whole.items()}, strict=True)
    offset, rows = _weights(dmp)[_key(dmp, "small")][0] if _weights(dmp)[_key(dmp, "small")] else ((0, 0), None)
    if rows is not None and not torch.equal(rows, whole[_key(dmp, "small")]):
        raise AssertionError(f"small at {offset}: the module's own load_state_dict did not load")


def _both_ways(rank: int, world: int, cases: list[tuple[str, str]], directory: Path) -> int:
    windows.WINDOW_BYTES = WINDOW
    for kind, sharding in cases:
        base = directory / f"{kind}-{sharding}"

        def build(where: str | None, kind: str = kind, sharding: str = sharding, base: Path = base) -> Any:
            model = Model() if kind == "ebc" else SequenceModel()
            on_ssd = (None, None) if where is None else (base / where, SLOTS)
            return make_dmp(world, sharding, ROWWISE, *on_ssd, model)

        ours, fused = build("a"), build(None)
        for dmp in (ours, fused):
            train(dmp, rank, range(4))
        if list(ours.state_dict()) != list(fused.state_dict()):
            raise AssertionError(f"{list(ours.state_dict())} instead of {list(fused.state_dict())}")
        others = {"ours to ours": (build("b"), ours), "FUSED to ours": (build("c"), fused)}
        others["ours to FUSED"] = (build(None), ours)
        for label, (dmp, source) in others.items():
            _load_both(dmp, source)
            _check_same(_weights(ours), _weights(dmp), f"{kind} {sharding} {label}")
            _check_same(optimizer_rows(ours), optimizer_rows(dmp), f"{kind} {sharding} {label}")
        models = [ours, fused, *(dmp for dmp, _ in others.values())]
        wanted, *got = (train(dmp, rank, range(4, 9)) for dmp in models)
        for predictions in got:
            if not all(torch.equal(*pair) for pair in zip(wanted, predictions, strict=True)):
                raise AssertionError(f"{kind} {sharding}: training goes on otherwise")
        _load_both(ours, ours)
        _check_same(_weights(fused), _weights(ours), "its own state")
        _plain(ours)
        for dmp in models:
            if hasattr(sparse_of(dmp), "close"):
                sparse_of(dmp).close()
    return len(cases)


@pytest.mark.parametrize(
    ("cases", "world"),
    [
        ([("ebc", "table_wise"), ("ebc", "row_wise"), ("ebc", "column_wise")], 2),
        ([("ec", "table_wise"), ("ec", "row_wise"), ("ec", "column_wise")], 2),
        ([("ebc", "table_row_wise"), ("ebc", "grid_shard")], 4),
    ],
    ids=["bags", "sequences", "hosts"],
)
def test_state_goes_both_ways(tmp_path: Path, cases: list[tuple[str, str]], world: int) -> None:
    found = run_ranks(world, _both_ways, cases, tmp_path, local=2 if world > 2 else None)
    assert found == [len(cases)] * world


def _refuses(load: Callable[[dict[str, Any]], Any], state: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        load(state)


def _bad_state(rank: int, world: int, directory: Path) -> None:
    dmp = make_dmp(world, "row_wise", ROWWISE, directory / "live", SLOTS)
    other = make_dmp(world, "table_wise", ROWWISE, None, None)
    for model in (dmp, other):
        train(model, rank, range(3))
    big, wide = _key(dmp, "big"), _key(dmp, "wide")
    before, state_before = _weights(dmp), optimizer_rows(dmp)
    good = {**dmp.state_dict(), big: torch.ones(ROWS["big"], DIM)}
    bad: list[tuple[Any, str]] = [
        (torch.zeros(ROWS["wide"] - 1, 2 * DIM), r"\(400, 16\), got \(399, 16\)"),
        (torch.zeros(ROWS["wide"] * 2 * DIM), r"got \(6400,\)"),
        (torch.zeros(ROWS["wide"], 2 * DIM, device="meta"), "meta device"),
        (other.state_dict()[wide], "no shard at"),
        (other.state_dict()[big], r"got \(900, 8\)"),
        ([1.0], "got list"),
    ]
    for value, said in bad:
        # `big` comes first and is right: it must not be written either.
        _refuses(dmp.load_state_dict, {**good, wide: value}, InputError, said)
        _check_same(before, _weights(dmp), said)
    optimizer = dmp.fused_optimizer
    for value, said in [
        (torch.zeros(ROWS["big"] - 1), r"\(900,\), got \(899,\)"),
        (other.state_dict()[big], r"got \(900, 8\)"),
        ("zeros", "got str"),
    ]:
        state = copy.copy(optimizer.state_dict())
        state["state"] = {key: dict(values) for key, values in state["state"].items()}
        state["state"]["ebc.embedding_bags.big.weight"] = {"big.momentum1": value}
        _refuses(optimizer.load_state_dict, state, InputError, said)
        _check_same(state_before, optimizer_rows(dmp), said)
    state["state"]["ebc.embedding_bags.big.weight"] = {"big.momentum1": torch.arange(float(ROWS["big"]))}
    optimizer.load_state_dict(state)
    for (first,), rows in optimizer_rows(dmp)["ebc.embedding_bags.big.weight/big.momentum1"]:
        if not torch.equal(rows, torch.arange(float(first), float(first + rows.numel()))):
            raise AssertionError("the whole state was not taken")
    dmp.load_state_dict(good)
    if not all(bool((rows == 1).all()) for _, rows in _weights(dmp)[big]):
        raise AssertionError("the good state was not loaded")
    sparse_of(dmp).close()


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run_ranks(2, _bad_state, tmp_path)


def _in_time(rank: int, world: int, directory: Path) -> None:
    dmp = make_dmp(world, "column_wise", ROWWISE, directory / "live", SLOTS)
    train(dmp, rank, range(3))
    state, before = dmp.state_dict(), _weights(dmp)
    copied, saved = copy.deepcopy(state), io.BytesIO()
    torch.save(state, saved)
    train(dmp, rank, range(3, 6))
    # Rows follow training until they are read.
    _check_same(_weights(dmp), local_rows(state), "lazy")
    with pytest.raises(AssertionError, match="differs"):
        _check_same(before, local_rows(state), "lazy")
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    for label, kept in (("copied", copied), ("saved", loaded)):
        _check_same(before, local_rows(kept), label)
        weight = kept[_key(dmp, "big")]
        if type(weight) is not ShardedTensor or not all(type(s.tensor) is Tensor for s in weight.local_shards()):
            raise AssertionError(f"{label}: {type(weight)}")
    if not isinstance(state[_key(dmp, "big")], LazyShardedTensor):
        raise AssertionError("the state itself is lazy")
    if not all(isinstance(s.tensor, LazyRows) for s in state[_key(dmp, "big")].local_shards()):
        raise AssertionError("the state's rows are lazy")
    dmp.load_state_dict(loaded)
    _check_same(before, _weights(dmp), "back to what was saved")
    sparse_of(dmp).close()


def test_state_follows_training_until_it_is_read(tmp_path: Path) -> None:
    run_ranks(2, _in_time, tmp_path)
