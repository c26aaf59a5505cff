"""What a training loop tells the tables on SSD through TorchRec: learning rate, batches to come, bounds."""

from __future__ import annotations

from pathlib import Path

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torchrec.distributed import DistributedModelParallel

from tests.ranks import run_ranks
from tests.sharding.models import FEATURES, ROWS, Model, batch, fused_params, local_rows, make_dmp, make_plan, train
from torchrec_turbossd.sharding import TurboSSDEmbeddingBagCollectionSharder, save_snapshot
from torchrec_turbossd.tbe.layout import Bounds

ADAGRAD = EmbOptimType.EXACT_ROWWISE_ADAGRAD
SLOTS = {"big": 120, "wide": 60}


def _learning_rate(rank: int, world: int, directory: Path) -> None:
    ours = make_dmp(world, "table_wise", ADAGRAD, directory / "live", SLOTS)
    stock = make_dmp(world, "table_wise", ADAGRAD, None, None)
    for rate in (0.02, 0.5):
        for dmp in (ours, stock):
            for group in dmp.fused_optimizer.param_groups:
                group["lr"] = rate
            dmp.fused_optimizer.zero_grad()
        seen = [train(dmp, rank, range(3)) for dmp in (ours, stock)]
        if not all(torch.equal(*pair) for pair in zip(*seen, strict=True)):
            raise AssertionError(f"predictions differ at a learning rate of {rate}")
    rows = [local_rows(dmp.state_dict()) for dmp in (ours, stock)]
    if not all(torch.equal(x[1], y[1]) for key in rows[0] for x, y in zip(rows[0][key], rows[1][key], strict=True)):
        raise AssertionError("rows differ")
    saved = save_snapshot(ours, directory / "saved").optimizer
    if set(saved) != set(ROWS) or any(progress.learning_rate != 0.5 for progress in saved.values()):
        raise AssertionError(f"the snapshot says {saved}")
    ours.module.ebc.close()


def test_a_changed_learning_rate_trains_and_is_saved(tmp_path: Path) -> None:
    run_ranks(1, _learning_rate, tmp_path)


def _prefetch(rank: int, world: int, directory: Path) -> None:
    ebc = make_dmp(world, "table_wise", ADAGRAD, directory, SLOTS).module.ebc
    features, context = batch(1, rank), ebc.create_context()
    inputs = ebc.input_dist(context, features).wait().wait()
    for lookup, each in zip(ebc._lookups, inputs, strict=True):
        lookup.prefetch(each)
    for kernel in ebc._kernels():
        kernel.emb_module._prefetched.settle()
    caches = [kernel.emb_module.rows.cache for kernel in ebc._kernels()]
    if not caches or not all(cache.pinned_slots for cache in caches):
        raise AssertionError("prefetched rows must be in slots and stay there")
    ebc.compute_and_output_dist(context, inputs).wait().values().sum().backward()
    if any(cache.pinned_slots for cache in caches):
        raise AssertionError("backward must end what prefetch began")
    counted = sum(reads.read_total_count for reads in ebc.read_stats().values())
    wanted = sum(features[key].values().numel() for name in SLOTS for key in FEATURES[name])
    if counted != wanted:
        raise AssertionError(f"{counted} reads counted of {wanted}: the forward did not take the prefetched batch")
    ebc.close()


def test_prefetch_reaches_tables_on_ssd(tmp_path: Path) -> None:
    run_ranks(1, _prefetch, tmp_path)


def _bounds(rank: int, world: int, directory: Path) -> dict[str, set[Bounds]]:
    seen = {}
    for mode in (BoundsCheckMode.FATAL, BoundsCheckMode.WARNING, BoundsCheckMode.IGNORE):
        model, params = Model(), fused_params(ADAGRAD, bounds_check_mode=mode)
        sharder = TurboSSDEmbeddingBagCollectionSharder(directory / mode.name, params)
        plan = make_plan(model, sharder, world, "table_wise", SLOTS)
        dmp = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=[sharder])
        seen[mode.name] = {kernel.emb_module.rows.layout.bounds for kernel in dmp.module.ebc._kernels()}
        dmp.module.ebc.close()
    return seen


def test_bounds_are_checked_in_torchrecs_mode(tmp_path: Path) -> None:
    (seen,) = run_ranks(1, _bounds, tmp_path)
    assert seen == {"FATAL": {Bounds.RAISE}, "WARNING": {Bounds.WARN}, "IGNORE": {Bounds.IGNORE}}


def _by_parameter(rank: int, world: int, directory: Path) -> None:
    ours = make_dmp(world, "table_wise", ADAGRAD, directory / "live", SLOTS)
    stock = make_dmp(world, "table_wise", ADAGRAD, None, None)
    for dmp in (ours, stock):
        train(dmp, rank, range(3))
    for name in ROWS:
        mine, theirs = (dmp.module.ebc.embedding_bags[name].weight._in_backward_optimizers[0] for dmp in (ours, stock))
        (key,) = theirs.state_dict()["state"]
        found, wanted = (o.state_dict()["state"][key][f"{name}.momentum1"] for o in (mine, theirs))
        for part, other in zip(found.local_shards(), wanted.local_shards(), strict=True):
            if not torch.equal(part.tensor + 0, other.tensor):
                raise AssertionError(f"{name}: the state of its parameter's optimizer differs")
        for optimizer in (mine, theirs):
            optimizer.param_groups[0]["lr"] = 0.011
            optimizer.step()
    wanted_after, got = (train(dmp, rank, range(3, 6)) for dmp in (stock, ours))
    if not all(torch.equal(a, b) for a, b in zip(wanted_after, got, strict=True)):
        raise AssertionError("a learning rate of a parameter's optimizer did not reach the table")
    ours.module.ebc.close()


def test_each_parameter_has_its_tables_optimizer(tmp_path: Path) -> None:
    run_ranks(1, _by_parameter, tmp_path)
