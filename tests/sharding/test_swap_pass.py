"""Tables go onto SSD in a plan, or in a model that is sharded and trained already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.types import CacheParams, ShardingPlan

from tests.ranks import run_ranks
from tests.sharding.models import (
    SEED,
    SHARDERS,
    Model,
    SequenceModel,
    fill_initial,
    fused_params,
    local_rows,
    make_dmp,
    optimizer_rows,
    sparse_name,
    sparse_of,
    train,
)
from tests.sharding.plans import cuts, parameter, plan_of
from torchrec_turbossd.errors import ConfigError, UnknownTableError, UnsupportedError
from torchrec_turbossd.planner import TURBO_SSD
from torchrec_turbossd.sharding import swap_to_turbo_ssd

ADAGRAD = EmbOptimType.EXACT_ROWWISE_ADAGRAD


def _continue_on_ssd(rank: int, world: int, sharding: str, made: type[Any], directory: Path) -> list[str]:
    stock = make_dmp(world, sharding, ADAGRAD, None, None, made())
    swapped = make_dmp(world, sharding, ADAGRAD, None, None, made())
    for dmp in (stock, swapped):
        train(dmp, rank, range(4))
        dmp.fused_optimizer.param_groups[0]["lr"] = 0.03
        dmp.fused_optimizer.zero_grad()
        train(dmp, rank, range(4, 6))
    report = swap_to_turbo_ssd(swapped, ["big", "wide"], load_factor=0.25, ssd_directory=directory, seed=SEED)
    wanted, got = (train(dmp, rank, range(6, 20)) for dmp in (stock, swapped))
    if not all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True)):
        raise AssertionError("predictions differ after the swap")
    for read in (lambda d: local_rows(d.state_dict()), optimizer_rows):
        before, after = read(stock), read(swapped)
        if before.keys() != after.keys():
            raise AssertionError(f"keys {sorted(after)} instead of {sorted(before)}")
        for key, shards in before.items():
            for (_, rows), (_, mine) in zip(shards, after[key], strict=True):
                if not torch.equal(rows.flatten(), mine.flatten()):
                    raise AssertionError(f"{key} differs")
    stats = sparse_of(swapped).read_stats()
    if stats and not all(reads.read_miss_count for reads in stats.values()):
        raise AssertionError("nothing was ever read from the store")
    kernels = {s.compute_kernel for n, s in swapped.plan.plan[sparse_name(swapped.module)].items() if n != "small"}
    if kernels != {TURBO_SSD}:
        raise AssertionError(f"the model's plan says {kernels}")
    sparse_of(swapped).close()
    return [f"{s.module}.{s.table} {s.was} {s.sharding_type} {s.shards}" for s in report]


@pytest.mark.parametrize(
    ("sharding", "made"),
    [("table_wise", Model), ("row_wise", Model), ("column_wise", Model), ("row_wise", SequenceModel)],
)
def test_a_trained_model_goes_on_with_its_numbers(tmp_path: Path, sharding: str, made: type[Any]) -> None:
    reports = run_ranks(2, _continue_on_ssd, sharding, made, tmp_path)
    name = "ebc" if made is Model else "ec"
    shards = {"table_wise": (1, 1), "row_wise": (2, 2), "column_wise": (2, 4)}[sharding]
    wanted = [f"{name}.big fused {sharding} {shards[0]}", f"{name}.wide fused {sharding} {shards[1]}"]
    assert reports == [wanted, wanted]


def _key_value_plan(kernel: str, model: Model) -> ShardingPlan:
    places = {}
    for config in model.ebc.embedding_bag_configs():
        shards = cuts("table_wise", config.num_embeddings, config.embedding_dim, 1, 1, 0)
        places[config.name] = parameter("table_wise", shards, None)
        if config.name != "small":
            places[config.name].compute_kernel = kernel
            places[config.name].cache_params = CacheParams(load_factor=0.3)
    return ShardingPlan({"ebc": plan_of(places)})


def _key_value_tables(rank: int, world: int, directory: Path) -> None:
    stock = make_dmp(world, "table_wise", ADAGRAD, None, None)
    wanted = train(stock, rank, range(8))
    for swap in (True, False):
        model = Model()
        plan = _key_value_plan("key_value", model)
        if swap:
            report = swap_to_turbo_ssd(plan)
            if [(s.table, s.was) for s in report] != [("big", "key_value"), ("wide", "key_value")]:
                raise AssertionError(f"reported {report}")
        # A plan that was not swapped is understood by the sharder, too.
        sharder = SHARDERS["ebc"][1](ssd_directory=directory / str(swap), fused_params=fused_params(ADAGRAD), seed=SEED)
        dmp = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=[sharder])
        fill_initial(dmp, on_ssd=("big", "wide"))
        got = train(dmp, rank, range(8))
        if not all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True)):
            raise AssertionError("predictions differ")
        if dmp.module.ebc.slots != {"big": 270, "wide": 120}:
            raise AssertionError(f"slots {dmp.module.ebc.slots}")
        dmp.module.ebc.close()


def test_key_value_tables_go_on_ssd(tmp_path: Path) -> None:
    run_ranks(1, _key_value_tables, tmp_path)


def _refused(rank: int, world: int, directory: Path) -> None:
    stock = make_dmp(world, "table_wise", ADAGRAD, None, None)
    before = stock.module.ebc
    with pytest.raises(UnknownTableError, match="no table 'huge'; the tables are 'big', 'wide', 'small'"):
        swap_to_turbo_ssd(stock, ["big", "huge"], ssd_directory=directory)
    with pytest.raises(ConfigError, match="ssd_directory"):
        swap_to_turbo_ssd(stock, ["big"])
    with pytest.raises(ConfigError, match="fused_params: not among the options of a swap"):
        swap_to_turbo_ssd(stock, ["big"], ssd_directory=directory, fused_params={})
    with pytest.raises(ConfigError, match="load_factor"):
        swap_to_turbo_ssd(stock, ["big"], ssd_directory=directory, load_factor=-1)
    stock.module.again = stock.module.ebc
    with pytest.raises(UnsupportedError, match="more than once, as 'ebc', 'again'"):
        swap_to_turbo_ssd(stock, ["big"], ssd_directory=directory)
    del stock.module.again
    with pytest.raises(ConfigError, match="collection of names"):
        swap_to_turbo_ssd(stock, "big", ssd_directory=directory)
    if stock.module.ebc is not before or any(s.compute_kernel != "fused" for s in stock.plan.plan["ebc"].values()):
        raise AssertionError("a swap that was refused changed the model")
    swap_to_turbo_ssd(stock, ["big"], ssd_directory=directory)
    if swap_to_turbo_ssd(stock, ["big"], ssd_directory=directory):
        raise AssertionError("there was nothing left to swap")
    with pytest.raises(UnsupportedError, match="'ebc' has tables on SSD already"):
        swap_to_turbo_ssd(stock, ["wide"], ssd_directory=directory)
    stock.module.ebc.close()


def _our_sharder_without_ssd(rank: int, world: int, directory: Path) -> None:
    stock = make_dmp(world, "row_wise", ADAGRAD, None, None)
    ours = make_dmp(world, "row_wise", ADAGRAD, directory / "a", {})
    for dmp in (stock, ours):
        train(dmp, rank, range(3))
    swap_to_turbo_ssd(ours, ["big"], ssd_directory=directory / "b", seed=SEED)
    if swap_to_turbo_ssd(ours.plan):
        raise AssertionError("a plan whose tables are on SSD has nothing to swap")
    wanted, got = (train(dmp, rank, range(3, 8)) for dmp in (stock, ours))
    if not all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True)):
        raise AssertionError("predictions differ after the swap")
    ours.module.ebc.close()


def test_a_model_of_our_sharders_that_fits_in_memory_is_swapped(tmp_path: Path) -> None:
    run_ranks(2, _our_sharder_without_ssd, tmp_path)


def test_swaps_that_are_refused_change_nothing(tmp_path: Path) -> None:
    run_ranks(1, _refused, tmp_path)


def test_a_plan_that_cannot_be_swapped_says_why() -> None:
    plan = _key_value_plan("fused", Model())
    with pytest.raises(ConfigError, match="no table of the plan has kernel key_value"):
        swap_to_turbo_ssd(plan)
    with pytest.raises(ConfigError, match="seed, ssd_directory: for a model"):
        swap_to_turbo_ssd(plan, ["big"], ssd_directory="x", seed=1)
    plan.plan["ebc"]["wide"].sharding_type = "data_parallel"
    with pytest.raises(UnsupportedError, match="'wide': sharding type data_parallel"):
        swap_to_turbo_ssd(plan, ["big", "wide"])
    assert plan.plan["ebc"]["big"].compute_kernel == "fused"
