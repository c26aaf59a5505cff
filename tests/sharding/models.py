"""Small models, plans and batches that the sharding tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ModuleSharder, ShardingPlan
from torchrec.modules.embedding_configs import DataType, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_turbossd.planner.kernel import TURBO_SSD, TurboCacheParams
from torchrec_turbossd.rows import initial_weights
from torchrec_turbossd.sharding import TurboSSDEmbeddingBagCollectionSharder
from torchrec_turbossd.tables import InitRule

DIM, BATCH = 8, 12
ROWS = {"big": 900, "wide": 400, "small": 30}
FEATURES = {"big": ["b0", "b1"], "wide": ["w0"], "small": ["s0"]}
SEED = 5


class Model(nn.Module):
    """Three tables, one linear layer."""

    def __init__(self, pooling: PoolingType = PoolingType.SUM, data_type: DataType = DataType.FP32) -> None:
        super().__init__()
        self.ebc = EmbeddingBagCollection(
            device=torch.device("meta"),
            tables=[
                EmbeddingBagConfig(
                    name=name,
                    num_embeddings=rows,
                    embedding_dim=DIM * (2 if name == "wide" else 1),
                    feature_names=FEATURES[name],
                    pooling=pooling,
                    data_type=data_type,
                )
                for name, rows in ROWS.items()
            ],
        )
        torch.manual_seed(3)
        self.linear = nn.Linear(5 * DIM, 1)

    def forward(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        """(loss, predictions)."""
        predictions = self.linear(self.ebc(features).values().float())
        return (predictions * predictions).mean() + predictions.mean(), predictions


def batch(step: int, rank: int, *, weighted: bool = False) -> KeyedJaggedTensor:
    """A batch with hot and cold ids, duplicates and empty bags."""
    generator = torch.Generator().manual_seed(step * 100 + rank)
    keys = [f for names in FEATURES.values() for f in names]
    rows = [ROWS[t] for t, names in FEATURES.items() for _ in names]
    lengths = torch.randint(0, 5, (len(keys) * BATCH,), generator=generator)
    values = []
    for feature, count in enumerate(lengths.view(len(keys), BATCH).sum(1).tolist()):
        skewed = torch.rand(count, generator=generator) ** 3
        values.append((skewed * rows[feature]).long())
    ids = torch.cat(values)
    weights = torch.rand(ids.numel(), generator=generator) if weighted else None
    return KeyedJaggedTensor(keys=keys, values=ids, lengths=lengths, weights=weights)


def big_batch() -> KeyedJaggedTensor:
    """More distinct rows than any small cache holds."""
    keys = [f for names in FEATURES.values() for f in names]
    lengths = torch.zeros(len(keys) * BATCH, dtype=torch.int64)
    lengths[0] = ROWS["big"]
    return KeyedJaggedTensor(keys=keys, values=torch.arange(ROWS["big"]), lengths=lengths)


def fused_params(optimizer: EmbOptimType, **more: Any) -> dict[str, Any]:
    return {"optimizer": optimizer, "learning_rate": 0.1, "eps": 1e-6, **more}


def make_plan(
    model: Model,
    sharder: ModuleSharder[Any],
    world: int,
    sharding: str,
    slots: dict[str, int] | None,
    device: str = "cpu",
) -> ShardingPlan:
    """`big` and `wide` sharded as said, on SSD when `slots` are given; `small` always FUSED on the last rank."""

    def place(name: str) -> Any:
        kernel = TURBO_SSD if slots is not None and name in slots else "fused"
        base = (
            row_wise(compute_kernel=kernel)
            if sharding == "row_wise" and name != "small"
            else table_wise(rank=(world - 1) if name != "big" else 0, compute_kernel=kernel)
        )

        def generate(*args: Any) -> Any:
            parameter = base(*args)
            if slots is not None and name in slots:
                shards = parameter.sharding_spec.shards
                parameter.cache_params = TurboCacheParams(
                    slots=tuple(min(slots[name], s.shard_sizes[0]) for s in shards),
                    row_bytes=(0,) * len(shards),
                    hit_rates=(0.0,) * len(shards),
                )
            return parameter

        return generate

    places = {name: place(name) for name in ROWS}
    module_plan = construct_module_sharding_plan(
        model.ebc, places, sharder=sharder, local_size=world, world_size=world, device_type=device
    )
    return ShardingPlan({"ebc": module_plan})


def make_dmp(
    world: int,
    sharding: str,
    optimizer: EmbOptimType,
    directory: Path | None,
    slots: dict[str, int] | None,
    model: Model | None = None,
) -> DistributedModelParallel:
    """A sharded model: on SSD under `directory` with `slots`, or all FUSED with the same initial rows.

    On CUDA where the ranks talk over NCCL.
    """
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    model = model or Model()
    params = fused_params(optimizer)
    sharder: Any = (
        EmbeddingBagCollectionSharder(fused_params=params)
        if directory is None
        else TurboSSDEmbeddingBagCollectionSharder(ssd_directory=directory, fused_params=params, seed=SEED)
    )
    plan = make_plan(model, sharder, world, sharding, slots, device)
    dmp = DistributedModelParallel(model, device=torch.device(device), plan=plan, sharders=[sharder])
    fill_initial(dmp, on_ssd=() if slots is None else tuple(slots))
    return dmp


def initial(name: str, config: EmbeddingBagConfig) -> Tensor:
    """A whole table as its init rule gives it."""
    rule = InitRule(seed=SEED, low=config.get_weight_init_min(), high=config.get_weight_init_max())
    return initial_weights(rule, name, torch.arange(config.num_embeddings), cols=config.embedding_dim)


def fill_initial(dmp: DistributedModelParallel, on_ssd: tuple[str, ...]) -> None:
    """Give every FUSED table the rows that an SSD-backed one starts from."""
    configs = {c.name: c for c in dmp.module.ebc._embedding_bag_configs}
    for key, value in dmp.state_dict().items():
        name = key.split(".")[-2]
        if name in configs and name not in on_ssd:
            whole = initial(name, configs[name])
            for shard in value.local_shards():
                row, count = shard.metadata.shard_offsets[0], shard.metadata.shard_sizes[0]
                shard.tensor.detach().copy_(whole[row : row + count])


def train(dmp: DistributedModelParallel, rank: int, steps: range, *, weighted: bool = False) -> list[Tensor]:
    """Train; returns each step's predictions."""
    dense = torch.optim.SGD([p for n, p in dmp.named_parameters() if "linear" in n], lr=0.05)
    seen = []
    for step in steps:
        dense.zero_grad()
        loss, predictions = dmp(batch(step, rank, weighted=weighted).to(dmp.device))
        loss.backward()
        dense.step()
        seen.append(predictions.detach())
    return seen


def local_rows(state: dict[str, Any]) -> dict[str, list[tuple[tuple[int, ...], Tensor]]]:
    """The local shards of every ShardedTensor in a state dict, as plain tensors."""
    return {
        key: [(tuple(s.metadata.shard_offsets), s.tensor.detach().cpu().clone() + 0) for s in value.local_shards()]
        for key, value in state.items()
        if hasattr(value, "local_shards")
    }


def optimizer_rows(dmp: DistributedModelParallel) -> dict[str, Any]:
    """Optimizer state by `<parameter>/<state>`, as `local_rows`."""
    state = dmp.fused_optimizer.state_dict()["state"]
    flat = {f"{param}/{name}": value for param, values in state.items() for name, value in values.items()}
    return local_rows(flat)
