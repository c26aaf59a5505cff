"""What a sharded module with tables on SSD does beside training: state, updates, statistics, refusals."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed.types import ParameterSharding
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.ranks import GPU_RANKS, run_ranks
from tests.sharding.models import (
    DIM,
    ROWS,
    Model,
    batch,
    big_batch,
    initial,
    local_rows,
    make_dmp,
    optimizer_rows,
    train,
)
from torchrec_turbossd.errors import (
    ClosedError,
    ConfigError,
    InputError,
    RowIndexError,
    StoreLockedError,
    TurboSSDError,
    UnknownTableError,
    UnsupportedError,
)

ADAGRAD = EmbOptimType.EXACT_ROWWISE_ADAGRAD
SLOTS = {"big": 120, "wide": 60}
KEY = "ebc.embedding_bags.big.weight"


def _equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(x[1].flatten(), y[1].flatten()) for key in a for x, y in zip(a[key], b[key], strict=True)
    )


def _state(rank: int, world: int, sharding: str, directory: Path) -> dict[str, bool]:
    seen = {}
    first = make_dmp(world, sharding, ADAGRAD, directory / "a", SLOTS)
    train(first, rank, range(8))
    stock = make_dmp(world, sharding, ADAGRAD, None, None)
    train(stock, rank, range(8))
    seen["same keys as FUSED"] = list(first.state_dict()) == list(stock.state_dict())
    second = make_dmp(world, sharding, ADAGRAD, directory / "b", SLOTS)
    missed = second.load_state_dict(first.state_dict())
    second.fused_optimizer.load_state_dict(first.fused_optimizer.state_dict())
    seen["nothing missing or unexpected"] = not missed.missing_keys and not missed.unexpected_keys
    seen["weights"] = _equal(local_rows(first.state_dict()), local_rows(second.state_dict()))
    seen["state"] = _equal(optimizer_rows(first), optimizer_rows(second))
    third = make_dmp(world, sharding, ADAGRAD, directory / "c", SLOTS)
    third.load_state_dict(stock.state_dict())
    third.fused_optimizer.load_state_dict(stock.fused_optimizer.state_dict())
    seen["from FUSED"] = _equal(local_rows(stock.state_dict()), local_rows(third.state_dict()))
    kept, before = copy.deepcopy(first.state_dict()), local_rows(first.state_dict())
    after = [train(dmp, rank, range(8, 14)) for dmp in (first, second, third, stock)]
    second.load_state_dict(kept)
    seen["a deep copy keeps its rows"] = _equal(before, local_rows(second.state_dict()))
    seen["trains on alike"] = all(
        torch.equal(x, y) for other in after[1:] for x, y in zip(after[0], other, strict=True)
    )
    whole = torch.randn(ROWS["big"], DIM, generator=torch.Generator().manual_seed(1))
    second.load_state_dict({**first.state_dict(), KEY: whole})
    held = second.state_dict()[KEY].local_shards()
    seen["whole tensor"] = all(
        torch.equal(s.tensor + 0, whole[s.metadata.shard_offsets[0] :][: s.metadata.shard_sizes[0]]) for s in held
    )
    try:
        second.load_state_dict({**first.state_dict(), KEY: torch.zeros(3, DIM)})
        seen["wrong shape refused"] = not held
    except InputError as error:
        seen["wrong shape refused"] = "(900, 8)" in str(error)
    for dmp in (first, second, third):
        dmp.module.ebc.close()
    return seen


BACKENDS = pytest.mark.parametrize(
    ("backend", "world"), [("gloo", 2), pytest.param("nccl", GPU_RANKS, marks=pytest.mark.gpu)], ids=["gloo", "nccl"]
)


@BACKENDS
@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_state_dict_goes_both_ways(tmp_path: Path, sharding: str, backend: str, world: int) -> None:
    for seen in run_ranks(world, _state, sharding, tmp_path, backend=backend):
        assert seen and all(seen.values()), seen


def _overwrite(state: dict[str, Any], table: str, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Write the parts of all ranks, in rank order, into the local shards of a FUSED table."""
    for shard in state[f"ebc.embedding_bags.{table}.weight"].local_shards():
        first, count = shard.metadata.shard_offsets[0], shard.metadata.shard_sizes[0]
        for ids, rows in parts:
            for i, row in zip(ids.tolist(), rows, strict=True):
                if first <= i < first + count:
                    shard.tensor.detach()[i - first] = row


def _update(rank: int, world: int, sharding: str, directory: Path) -> None:
    ours = make_dmp(world, sharding, ADAGRAD, directory / "a", SLOTS)
    stock = make_dmp(world, sharding, ADAGRAD, None, None)
    for dmp in (ours, stock):
        train(dmp, rank, range(5))
    momentum = optimizer_rows(ours)
    generator = torch.Generator().manual_seed(rank)
    for table, width in (("big", DIM), ("wide", 2 * DIM), ("small", DIM)):
        count = 0 if rank == 1 and table == "wide" else 40
        ids = torch.randint(0, ROWS[table], (count,), generator=generator)
        rows = torch.randn(count, width, generator=generator)
        ours.module.ebc.streaming_update(ids.int() if rank else ids, rows, table)
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, (ids, rows))
        _overwrite(stock.state_dict(), table, gathered)
    if not _equal(local_rows(ours.state_dict()), local_rows(stock.state_dict())):
        raise AssertionError("updated rows differ")
    if not _equal(momentum, optimizer_rows(ours)):
        raise AssertionError("optimizer state was not kept")
    if not all(torch.equal(*pair) for pair in zip(*(train(d, rank, range(5, 10)) for d in (ours, stock)), strict=True)):
        raise AssertionError("training after an update differs")
    _given_state(ours, sharding)
    ours.module.ebc.close()


def _given_state(dmp: Any, sharding: str) -> None:
    state = {"momentum1": torch.tensor([9.0])}
    dmp.module.ebc.streaming_update(torch.tensor([5]), torch.ones(1, DIM), "big", optimizer_state=state)
    held = [value for key, value in optimizer_rows(dmp).items() if key.endswith("/big.momentum1")]
    if sharding == "row_wise" and not held:
        raise AssertionError("no state of the updated table found")
    for offset, values in held[0] if held else []:
        if offset[0] <= 5 < offset[0] + values.numel() and values[5 - offset[0]] != 9.0:
            raise AssertionError("given optimizer state was not taken")


@BACKENDS
@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_streaming_update_reaches_every_shard(tmp_path: Path, sharding: str, backend: str, world: int) -> None:
    run_ranks(world, _update, sharding, tmp_path, backend=backend)


def _unreadable(*args: Any) -> None:
    raise UnsupportedError("planted")


def _bad_updates(rank: int, world: int, directory: Path) -> None:
    dmp = make_dmp(world, "row_wise", ADAGRAD, directory, SLOTS)
    ebc, before = dmp.module.ebc, None
    train(dmp, rank, range(3))
    before = local_rows(dmp.state_dict())
    good = (torch.tensor([1]), torch.ones(1, DIM))
    cases: list[tuple[type[TurboSSDError], Any, Any]] = [
        (RowIndexError, torch.tensor([900]), torch.ones(1, DIM)),
        (RowIndexError, torch.tensor([-1]), torch.ones(1, DIM)),
        (InputError, torch.tensor([1.0]), torch.ones(1, DIM)),
        (InputError, torch.tensor([1]), torch.ones(1, DIM + 4)),
        (InputError, torch.tensor([1]), torch.ones(2, DIM)),
        (InputError, torch.tensor([1]), torch.full((1, DIM), float("nan"))),
        (InputError, torch.tensor([1]), torch.ones(1, DIM, dtype=torch.int32)),
        (InputError, torch.tensor([1], device="meta"), torch.ones(2, DIM)),
    ]
    for error, ids, rows in cases:
        # Only rank 0's rows are bad; both ranks must raise, and neither may hang or change.
        with pytest.raises(error if rank == 0 else InputError):
            ebc.streaming_update(*((ids, rows) if rank == 0 else good), "big")
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr("torchrec_turbossd.sharding.module.local_tables", _unreadable)
        with pytest.raises(UnsupportedError if rank == 0 else InputError):
            ebc.streaming_update(*good, "big")
    with pytest.raises(UnknownTableError, match="'wide'"):
        ebc.streaming_update(*good, "nope")
    with pytest.raises(InputError, match="momentum1"):
        ebc.streaming_update(*good, "big", optimizer_state={"exp_avg": torch.ones(1)})
    if not _equal(before, local_rows(dmp.state_dict())):
        raise AssertionError("a refused update changed rows")
    # A batch in flight, outside the slots even, trains what is updated meanwhile.
    out = ebc(big_batch())
    ebc.streaming_update(*good, "big")
    out.values().sum().backward()
    trained = ebc._local(["big"])[0].read(torch.tensor([1]))[:, : 4 * DIM].view(torch.float32)
    if rank == 0 and not (bool((trained < 1).all()) and bool((trained > 0.7).all())):
        raise AssertionError(f"an updated row was trained to {trained}")
    with pytest.raises(StoreLockedError):
        make_dmp(world, "row_wise", ADAGRAD, directory, SLOTS)
    ebc.close()
    for call in (ebc.flush, lambda: ebc.streaming_update(*good, "big"), lambda: dmp(batch(0, rank))):
        with pytest.raises(ClosedError):
            call()
    dist.barrier()
    make_dmp(world, "row_wise", ADAGRAD, directory, SLOTS).module.ebc.close()


def test_bad_updates_are_refused_on_every_rank(tmp_path: Path) -> None:
    run_ranks(2, _bad_updates, tmp_path)


def _only(features: KeyedJaggedTensor, kernel: Any, dtype: torch.dtype) -> KeyedJaggedTensor:
    """The features that a kernel looks up, with ids of a type."""
    names = [name for table in kernel.config.embedding_tables for name in table.feature_names]
    part = features.permute([features.keys().index(name) for name in names])
    return KeyedJaggedTensor(keys=names, values=part.values().to(dtype), lengths=part.lengths())


def _refusals(rank: int, world: int, directory: Path) -> None:
    with pytest.raises(UnsupportedError, match="ADAM"):
        make_dmp(world, "table_wise", EmbOptimType.ADAM, directory / "adam", SLOTS)
    model = Model()
    next(c for c in model.ebc.embedding_bag_configs() if c.name == "big").init_fn = torch.nn.init.zeros_
    with pytest.raises(UnsupportedError, match="init_fn"):
        make_dmp(world, "table_wise", ADAGRAD, directory / "init", SLOTS, model)
    model = Model()
    other = functools.partial(torch.nn.init.uniform_, a=5.0, b=6.0)
    next(c for c in model.ebc.embedding_bag_configs() if c.name == "big").init_fn = other
    with pytest.raises(UnsupportedError, match="init_fn"):
        make_dmp(world, "table_wise", ADAGRAD, directory / "uniform", SLOTS, model)
    # Nothing on SSD, so any optimizer goes; what cannot be read row by row is told when it is asked for.
    resident = make_dmp(world, "table_wise", EmbOptimType.EMAINPLACE_ROWWISE_ADAGRAD, directory / "ema", {})
    with pytest.raises(UnsupportedError, match="one by one"):
        resident.module.ebc.streaming_update(torch.tensor([1]), torch.ones(1, DIM), "big")
    resident.module.ebc.close()
    dmp = make_dmp(world, "table_wise", ADAGRAD, directory / "ok", SLOTS)
    for kernel in dmp.module.ebc._kernels():
        features = batch(1, rank)
        wanted = kernel(_only(features, kernel, torch.int64))
        for _ in range(3):
            ids = _only(features, kernel, torch.int32)
            kernel.prefetch(ids)
            if not torch.equal(kernel(ids), wanted) or kernel.emb_module._prefetched:
                raise AssertionError("a prefetched batch of int32 ids was not taken up")
    del wanted
    with pytest.raises(UnsupportedError, match="in place"):
        dmp.module.ebc.update_shards({}, None, None)
    short = KeyedJaggedTensor(
        keys=["b0", "b1", "w0", "s0"],
        values=torch.arange(6),
        lengths=torch.ones(6, dtype=torch.int64),
        stride_per_key_per_rank=[[2], [2], [1], [1]],
    )
    with pytest.raises(UnsupportedError, match="batch size per feature"):
        for kernel in dmp.module.ebc._kernels():
            kernel(short)
    reads = dmp.module.ebc.read_stats()
    train(dmp, rank, range(3))
    after = dmp.module.ebc.read_stats()
    for name in after:
        if not after[name].read_total_count > reads[name].read_total_count:
            raise AssertionError(f"{name}: {after[name]}")
    if dmp.module.ebc.slots != SLOTS:
        raise AssertionError(f"slots {dmp.module.ebc.slots}")
    dmp.module.ebc.close()


def test_unsupported_combinations(tmp_path: Path) -> None:
    run_ranks(1, _refusals, tmp_path)


def _weights_given(rank: int, world: int, directory: Path) -> None:
    from torchrec import EmbeddingBagCollection

    model = Model()
    torch.manual_seed(7)
    model.ebc = EmbeddingBagCollection(device=torch.device("cpu"), tables=model.ebc.embedding_bag_configs())
    wanted = {name: model.ebc.embedding_bags[name].weight.detach().clone() for name in SLOTS}
    dmp = make_dmp(world, "row_wise", ADAGRAD, directory, SLOTS, model)
    for name, whole in wanted.items():
        for shard in dmp.state_dict()[f"ebc.embedding_bags.{name}.weight"].local_shards():
            row = shard.metadata.shard_offsets[0]
            if not torch.equal(shard.tensor + 0, whole[row : row + shard.metadata.shard_sizes[0]]):
                raise AssertionError(f"{name}: the module's own weights were not loaded")
    dmp.module.ebc.close()


def test_a_module_with_weights_is_loaded(tmp_path: Path) -> None:
    run_ranks(2, _weights_given, tmp_path)


def test_initial_rows_are_the_same_however_a_table_is_sharded() -> None:
    config = Model().ebc.embedding_bag_configs()[0]
    whole = initial("big", config)
    assert whole.abs().max() <= (1 / ROWS["big"]) ** 0.5 and whole.unique().numel() > 0.9 * whole.numel()


def test_parameter_sharding_without_slots_uses_the_load_factor(tmp_path: Path) -> None:
    from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardedEmbeddingTable
    from torchrec.distributed.types import CacheParams

    from torchrec_turbossd.sharding.lookup import LookupContext

    table: Any = ShardedEmbeddingTable(name="t", num_embeddings=100, embedding_dim=4, local_rows=50, local_cols=4)

    def context(cache: CacheParams | None) -> LookupContext:
        sharding = ParameterSharding("table_wise", EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value, cache_params=cache)
        return LookupContext(plan={"t": sharding}, store=None, load_factor=0.5)  # type: ignore[arg-type]

    assert context(None).slots(table) == 25
    assert context(CacheParams(load_factor=0.01)).slots(table) == 1
    with pytest.raises(ConfigError, match="load_factor"):
        context(CacheParams(load_factor=2.0)).slots(table)


def test_default_sharders_are_ours_for_bags_and_stock_for_the_rest(tmp_path: Path) -> None:
    from torchrec.distributed.embedding import EmbeddingCollectionSharder

    from torchrec_turbossd.sharding import TurboSSDEmbeddingBagCollectionSharder, get_turbo_ssd_sharders

    sharders = get_turbo_ssd_sharders(tmp_path, {"learning_rate": 0.5}, seed=3)
    kinds = [s.module_type for s in sharders]
    assert len(set(kinds)) == len(kinds) and len(kinds) > 2
    assert isinstance(sharders[0], TurboSSDEmbeddingBagCollectionSharder)
    assert isinstance(sharders[1], EmbeddingCollectionSharder) and sharders[1].fused_params == {"learning_rate": 0.5}


def test_each_shard_takes_its_own_slots_of_the_plan() -> None:
    from torch.distributed._shard.metadata import ShardMetadata
    from torch.distributed._shard.sharded_tensor import ShardedTensorMetadata
    from torchrec.distributed.embedding_types import ShardedEmbeddingTable

    from torchrec_turbossd.planner.kernel import TURBO_SSD, TurboCacheParams
    from torchrec_turbossd.sharding.lookup import LookupContext

    shards = [ShardMetadata(shard_offsets=[row, 0], shard_sizes=[50, 4], placement="cpu") for row in (0, 50)]

    def slots(place: int, planned: tuple[int, ...]) -> int:
        table: Any = ShardedEmbeddingTable(name="t", num_embeddings=100, embedding_dim=4, local_rows=50, local_cols=4)
        table.local_metadata, table.global_metadata = shards[place], ShardedTensorMetadata(shards_metadata=shards)
        sharding = ParameterSharding("row_wise", TURBO_SSD, cache_params=TurboCacheParams(slots=planned))
        return LookupContext(plan={"t": sharding}, store=None).slots(table)  # type: ignore[arg-type]

    assert [slots(place, (7, 11)) for place in (0, 1)] == [7, 11]
    with pytest.raises(ConfigError, match="slots for 3 shards, but there are 2"):
        slots(0, (7, 11, 13))
