"""Small models, plans and batches that the sharding tests share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.types import ModuleSharder, ShardingPlan
from torchrec.modules.embedding_configs import DataType, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.sharding.plans import cuts, parameter, plan_of
from torchrec_turbossd.rows import initial_weights
from torchrec_turbossd.sharding import TurboSSDEmbeddingBagCollectionSharder, TurboSSDEmbeddingCollectionSharder
from torchrec_turbossd.tables import InitRule

DIM, BATCH = 8, 12
ROWS = {"big": 900, "wide": 400, "small": 30}
FEATURES = {"big": ["b0", "b1"], "wide": ["w0"], "small": ["s0"]}
SEED = 5
SHARDERS: dict[str, tuple[Any, Any]] = {
    "ebc": (EmbeddingBagCollectionSharder, TurboSSDEmbeddingBagCollectionSharder),
    "ec": (EmbeddingCollectionSharder, TurboSSDEmbeddingCollectionSharder),
}
"""TorchRec's sharder and ours, by name of the sparse module."""


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


class SequenceModel(nn.Module):
    """The same tables, all `DIM` wide, looked up as sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.ec = EmbeddingCollection(
            device=torch.device("meta"),
            tables=[
                EmbeddingConfig(name=name, num_embeddings=rows, embedding_dim=DIM, feature_names=FEATURES[name])
                for name, rows in ROWS.items()
            ],
        )
        torch.manual_seed(3)
        self.linear = nn.Linear(4 * DIM, 1)

    def forward(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        """(loss, predictions)."""
        found = self.ec(features)
        # Each place of a sequence counts differently.
        weights = torch.arange(1, 6, device=features.device()).view(1, 5, 1)
        bags = [(found[f].to_padded_dense(5) * weights).sum(1) for names in FEATURES.values() for f in names]
        predictions = self.linear(torch.cat(bags, dim=1))
        return (predictions * predictions).mean() + predictions.mean(), predictions


def sparse_name(model: nn.Module) -> str:
    return "ebc" if hasattr(model, "ebc") else "ec"


def sparse_of(dmp: DistributedModelParallel) -> Any:
    """The sharded module of a model."""
    return getattr(dmp.module, sparse_name(dmp.module))


def make_plan(
    model: nn.Module,
    sharder: ModuleSharder[Any],
    world: int,
    sharding: str,
    slots: dict[str, int] | None,
    device: str = "cpu",
) -> ShardingPlan:
    """`big` and `wide` sharded as said, on SSD when `slots` are given; `small` always FUSED on the last rank."""
    sparse = getattr(model, sparse_name(model))
    configs = sparse.embedding_bag_configs() if sparse_name(model) == "ebc" else sparse.embedding_configs()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    places = {}
    for config in configs:
        kind = "table_wise" if config.name == "small" else sharding
        rank = 0 if config.name == "big" else world - 1
        shards = cuts(kind, config.num_embeddings, config.embedding_dim, world, local, rank)
        places[config.name] = parameter(kind, shards, (slots or {}).get(config.name), device)
    return ShardingPlan({sparse_name(model): plan_of(places)})


def make_dmp(
    world: int,
    sharding: str,
    optimizer: EmbOptimType,
    directory: Path | None,
    slots: dict[str, int] | None,
    model: Model | SequenceModel | None = None,
) -> DistributedModelParallel:
    """A sharded model: on SSD under `directory` with `slots`, or all FUSED with the same initial rows.

    On CUDA where the ranks talk over NCCL.
    """
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    model = model or Model()
    params = fused_params(optimizer)
    stock, ours = SHARDERS[sparse_name(model)]
    sharder: Any = (
        stock(fused_params=params)
        if directory is None
        else ours(ssd_directory=directory, fused_params=params, seed=SEED)
    )
    plan = make_plan(model, sharder, world, sharding, slots, device)
    dmp = DistributedModelParallel(model, device=torch.device(device), plan=plan, sharders=[sharder])
    fill_initial(dmp, on_ssd=() if slots is None else tuple(slots))
    return dmp


def initial(name: str, config: Any) -> Tensor:
    """A whole table as its init rule gives it."""
    rule = InitRule(seed=SEED, low=config.get_weight_init_min(), high=config.get_weight_init_max())
    return initial_weights(rule, name, torch.arange(config.num_embeddings), cols=config.embedding_dim)


def fill_initial(dmp: DistributedModelParallel, on_ssd: tuple[str, ...]) -> None:
    """Give every FUSED table the rows that an SSD-backed one starts from."""
    sparse = sparse_of(dmp)
    configs = {c.name: c for c in getattr(sparse, "_embedding_bag_configs", None) or sparse._embedding_configs}
    for key, value in dmp.state_dict().items():
        name = key.split(".")[-2]
        if name in configs and name not in on_ssd:
            whole = initial(name, configs[name])
            for shard in value.local_shards():
                (row, col), (rows, cols) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
                shard.tensor.detach().copy_(whole[row : row + rows, col : col + cols])


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
