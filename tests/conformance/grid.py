"""TorchRec's comparison of a sharded with an unsharded model, for every sharding type and option by name."""

from __future__ import annotations

from typing import Any

import torch
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig
from torchrec.distributed.planner import ParameterConstraints
from torchrec.modules.embedding_configs import DataType, PoolingType

from tests.conformance.harness import load
from tests.conformance.on_cpu import BACKEND, OnCpu, Swap

_PARALLEL, _SEQUENCE = "test_utils.test_model_parallel", "tests.test_sequence_model_parallel"
_SGD = {"embedding_bags": (torch.optim.SGD, {"lr": 0.01}), "embeddings": (torch.optim.SGD, {"lr": 0.2})}
_HALF = QCommsConfig(forward_precision=CommType.FP16, backward_precision=CommType.BF16)

_RANKS = {
    "table_wise": {}, "row_wise": {}, "column_wise": {}, "table_column_wise": {},
    "table_row_wise": {"world_size": 4, "local_size": 2}, "grid_shard": {"world_size": 4, "local_size": 2},
}  # fmt: skip

_BAG_OPTIONS: dict[str, dict[str, Any]] = {
    "sum": {},
    "mean": {"pooling": PoolingType.MEAN},
    "fp16": {"data_type": DataType.FP16},
    "variable_batch": {"variable_batch_size": True},
    "optimizer_in_backward": {"apply_optimizer_in_backward_config": _SGD},
    "half_comms": {"qcomms_config": _HALF},
    "int32": {"indices_dtype": torch.int32, "offsets_dtype": torch.int32, "lengths_dtype": torch.int32},
    "offsets": {"use_offsets": True},
    "no_batch": {"allow_zero_batch_size": True},
    "batch_per_feature": {"variable_batch_per_feature": True, "has_weighted_tables": False},
}
_SEQUENCE_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "variable_batch": {"variable_batch_size": True},
    "optimizer_in_backward": {"apply_optimizer_in_backward_config": _SGD},
    "half_comms": {"qcomms_config": _HALF},
    "batch_per_feature": {"variable_batch_per_feature": True},
}


def bags_class() -> type[OnCpu]:
    """Cases of `EmbeddingBagCollection`: test_<sharding type>_<option>."""
    base = load(_PARALLEL).ModelParallelTestShared
    methods = {
        f"test_{sharding}_{name}": _bag_case(sharding, option)
        for sharding in _RANKS
        for name, option in _BAG_OPTIONS.items()
    }
    swap = Swap(names={_PARALLEL: ("create_test_sharder",)})
    return type("Bags", (OnCpu, base), {**methods, "swap": swap, "__module__": __name__})


def _bag_case(sharding: str, option: dict[str, Any]) -> Any:
    def run(self: Any) -> None:
        self._build_tables_and_groups()
        constraints = {
            table.name: ParameterConstraints(min_partition=_narrowest(sharding, table), sharding_types=[sharding])
            for table in self.tables + self.weighted_tables
        }
        sharder = load(_PARALLEL).create_test_sharder(
            "embedding_bag_collection", sharding, "fused", qcomms_config=option.get("qcomms_config"), device=self.device
        )
        self._test_sharding(
            sharders=[sharder],
            backend=BACKEND,
            constraints=constraints,
            **_RANKS[sharding],
            **option,
        )

    return run


def _narrowest(sharding: str, table: Any) -> int | None:
    """Columns of a shard: for a grid, one shard for each host where a half is wide enough."""
    if sharding == "grid_shard":
        return int(table.embedding_dim // 2) if table.embedding_dim > 12 else int(table.embedding_dim)
    return 4 if "column" in sharding else None


def sequences_class() -> type[OnCpu]:
    """Cases of `EmbeddingCollection`: test_<sharding type>_<option>, again with ids looked up once (dedup)."""
    base = load(_SEQUENCE).SequenceModelParallelTest
    methods = {
        f"test_{sharding}_{name}{'_dedup' if dedup else ''}": _sequence_case(sharding, option, dedup)
        for sharding in ("table_wise", "row_wise", "column_wise")
        for name, option in _SEQUENCE_OPTIONS.items()
        for dedup in (False, True)
    }
    # The stock tests of the class are a group of their own.
    hidden = dict.fromkeys((name for name in dir(base) if name.startswith("test_")), None)
    swap = Swap(names={_SEQUENCE: ("TestEmbeddingCollectionSharder",)})
    return type("Sequences", (OnCpu, base), {**hidden, **methods, "swap": swap, "__module__": __name__})


def _sequence_case(sharding: str, option: dict[str, Any], dedup: bool) -> Any:
    def run(self: Any) -> None:
        sharder = load(_SEQUENCE).TestEmbeddingCollectionSharder(
            sharding_type=sharding,
            kernel_type="fused",
            qcomms_config=option.get("qcomms_config"),
            use_index_dedup=dedup,
        )
        narrow = {table.name: ParameterConstraints(min_partition=8) for table in self.tables}
        self._test_sharding(
            sharders=[sharder],
            backend=BACKEND,
            constraints=narrow if sharding == "column_wise" else None,
            **option,
        )

    return run


__all__ = ["bags_class", "sequences_class"]
