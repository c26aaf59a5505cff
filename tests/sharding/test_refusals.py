"""What cannot be right with tables on SSD is refused, with the reason."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torchrec import EmbeddingBagConfig
from torchrec.distributed.types import ShardingEnv

from tests.ranks import run_ranks
from tests.sharding.models import Model, batch, make_dmp, make_plan
from torchrec_turbossd.errors import UnsupportedError
from torchrec_turbossd.sharding import TurboSSDEmbeddingBagCollectionSharder
from torchrec_turbossd.sharding.refusals import check_module
from torchrec_turbossd.tbe.training import TrainingOptions
from torchrec_turbossd.tbe.training_options import row_state

ADAGRAD = EmbOptimType.EXACT_ROWWISE_ADAGRAD
TYPES = ("table_wise", "row_wise")


class Env2D(ShardingEnv):
    """Another kind of environment than TorchRec's plain one."""


class DTensorEnv:
    output_dtensor = True


DTensorEnv.__name__ = "ShardingEnv"


def _check(env: Any = None, sharding_type: str = "row_wise", device: str = "cpu", **fields: Any) -> None:
    config = EmbeddingBagConfig(name="t", num_embeddings=10, embedding_dim=4, feature_names=["f"])
    for name, value in fields.items():
        setattr(config, name, value)
    weight = torch.empty(10, 4, device="meta")
    check_module([config], {"t": weight}, {"t": sharding_type}, TYPES, env or ShardingEnv(1, 0), torch.device(device))


def test_a_plain_table_is_taken() -> None:
    _check()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"env": Env2D(1, 0)}, "Env2D is not supported"),
        ({"env": DTensorEnv()}, "DTensor state"),
        ({"device": "meta"}, "meta device; give the device that will train"),
        ({"sharding_type": "data_parallel"}, "sharding type data_parallel is not supported on SSD; use one of table"),
        ({"use_virtual_table": True}, "virtual tables"),
        ({"stash_weights": True}, "stash_weights"),
        ({"enable_embedding_update": True}, "call streaming_update"),
        ({"init_fn": torch.nn.init.zeros_}, "init_fn is not supported"),
    ],
)
def test_what_a_module_may_not_have(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        _check(**fields)


def _rows_cannot_be_reset(rank: int, world: int, directory: Path) -> None:
    dmp = make_dmp(world, "table_wise", ADAGRAD, directory, {"big": 100, "wide": 50})
    (kernel,) = dmp.module.ebc._kernels()
    with pytest.raises(UnsupportedError, match="big, wide cannot be reset by managed-collision eviction"):
        kernel.emb_module.reset_embedding_weight_momentum(
            pruned_indices=torch.tensor([1]),
            pruned_indices_offsets=torch.tensor([0, 1]),
            logical_table_ids=torch.tensor([0]),
            buffer_ids=torch.tensor([0]),
        )
    dmp.module.ebc.close()


def test_rows_cannot_be_reset_behind_the_cache(tmp_path: Path) -> None:
    run_ranks(1, _rows_cannot_be_reset, tmp_path)


def _whole_table_options(rank: int, world: int, directory: Path) -> None:
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode

    for extra, said in [
        ({"weight_decay_mode": WeightDecayMode.COUNTER}, "weight_decay_mode COUNTER acts on whole tables"),
        ({"use_rowwise_bias_correction": True}, "use_rowwise_bias_correction"),
        ({"optimizer": EmbOptimType.ENSEMBLE_ROWWISE_ADAGRAD}, "ENSEMBLE"),
    ]:
        params = {"optimizer": ADAGRAD, "learning_rate": 0.1, **extra}
        sharder = TurboSSDEmbeddingBagCollectionSharder(directory, params)
        model = Model()
        plan = make_plan(model, sharder, world, "table_wise", {"big": 100})
        with pytest.raises(UnsupportedError, match=said):
            sharder.shard(model.ebc, plan.plan["ebc"], ShardingEnv.from_local(1, 0), torch.device("cpu"))


def test_options_that_act_on_whole_tables(tmp_path: Path) -> None:
    run_ranks(1, _whole_table_options, tmp_path)


@pytest.mark.parametrize("optimizer", [EmbOptimType.ADAM, EmbOptimType.LAMB, EmbOptimType.LARS_SGD])
def test_optimizers_that_fbgemm_lacks_on_a_cpu(optimizer: EmbOptimType) -> None:
    with pytest.raises(UnsupportedError, match=rf"{optimizer.name} is not supported on SSD-backed tables on cpu; use"):
        row_state(optimizer, torch.device("cpu"))
    assert row_state(optimizer, torch.device("cuda"))
    assert dataclasses.replace(TrainingOptions(), pooling_mode=PoolingMode.SUM).optimizer is EmbOptimType.EXACT_SGD


def _other_strides(rank: int, world: int, directory: Path) -> None:
    from torchrec import KeyedJaggedTensor

    dmp = make_dmp(world, "table_wise", ADAGRAD, directory, {"big": 100, "wide": 50})
    keys = batch(0, rank).keys()
    short = KeyedJaggedTensor(
        keys=keys,
        values=torch.arange(6),
        lengths=torch.ones(6, dtype=torch.int64),
        stride_per_key_per_rank=[[2], [2], [1], [1]],
        inverse_indices=(keys, torch.zeros(4, 2, dtype=torch.int64)),
    )
    with pytest.raises(UnsupportedError, match="batch size per feature"):
        dmp(short)
    dmp.module.ebc.close()


def test_a_batch_size_per_feature(tmp_path: Path) -> None:
    run_ranks(1, _other_strides, tmp_path)
