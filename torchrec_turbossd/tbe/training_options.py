"""How a training TBE is built: optimizers and their state by row, options, and what tables it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode

from torchrec_turbossd.cache import DEFAULT_POLICY
from torchrec_turbossd.errors import ConfigError, UnsupportedError
from torchrec_turbossd.tables import MAX_SLOTS, TRAINING_TYPES, StateSpec, TableShard
from torchrec_turbossd.tbe.layout import Bounds

_FIRST, _FIRST_OF_ROW = (StateSpec(name="momentum1", per_row=per_row) for per_row in (False, True))
_SECOND, _SECOND_OF_ROW = (StateSpec(name="exp_avg_sq", per_row=per_row) for per_row in (False, True))

ROW_STATE: dict[EmbOptimType, tuple[StateSpec, ...]] = {
    EmbOptimType.EXACT_SGD: (),
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: (_FIRST_OF_ROW,),
    EmbOptimType.EXACT_ADAGRAD: (_FIRST,),
    EmbOptimType.ADAM: (_FIRST, _SECOND),
    EmbOptimType.PARTIAL_ROWWISE_ADAM: (_FIRST, _SECOND_OF_ROW),
    EmbOptimType.LAMB: (_FIRST, _SECOND),
    EmbOptimType.PARTIAL_ROWWISE_LAMB: (_FIRST, _SECOND_OF_ROW),
    EmbOptimType.LARS_SGD: (_FIRST,),
}
"""Optimizers whose whole state belongs to a row, and that state in FBGEMM's order under TorchRec's names."""

_ON_CPU = (EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_ADAGRAD)
_DECAYS = ("NONE", "L2", "DECOUPLE")


def row_state(optimizer: EmbOptimType, device: torch.device | None = None) -> tuple[StateSpec, ...]:
    """Optimizer state that travels with a row; raises `UnsupportedError` for an optimizer that cannot train on SSD.

    Args:
        device: where it trains; FBGEMM has fewer optimizers on a CPU. None: anywhere.
    """
    known = _ON_CPU if device is not None and device.type == "cpu" else tuple(ROW_STATE)
    if optimizer not in known:
        where = f" on {device.type}" if device is not None and optimizer in ROW_STATE else ""
        raise UnsupportedError(
            f"optimizer {getattr(optimizer, 'name', optimizer)} is not supported on SSD-backed tables{where}; use one "
            f"of {', '.join(o.name for o in known)}"
        )
    return ROW_STATE[optimizer]


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a training TBE looks rows up and trains them.

    tbe_args: keyword arguments of `SplitTableBatchedEmbeddingBagsCodegen` (optimizer, learning_rate, eps, ...).
    """

    pooling_mode: PoolingMode = PoolingMode.SUM
    policy: str = DEFAULT_POLICY
    bounds: Bounds = Bounds.RAISE
    tbe_args: dict[str, Any] = field(default_factory=dict)

    @property
    def optimizer(self) -> EmbOptimType:
        # FBGEMM's own default.
        found = self.tbe_args.get("optimizer", EmbOptimType.EXACT_SGD)
        return found if isinstance(found, EmbOptimType) else EmbOptimType(found)


def check_training_tables(
    shards: Sequence[TableShard], slots: Sequence[int], options: TrainingOptions, device: torch.device
) -> None:
    """Raise `ConfigError` or `UnsupportedError` unless a training TBE can hold these shards in these slots."""
    if not shards:
        raise ConfigError("a training TBE needs at least one table, got none")
    optimizer = options.optimizer
    state, types = row_state(optimizer, device), {s.table.data_type for s in shards}
    decay = options.tbe_args.get("weight_decay_mode")
    if decay is not None and getattr(decay, "name", decay) not in _DECAYS:
        raise UnsupportedError(
            f"weight_decay_mode {getattr(decay, 'name', decay)} acts on whole tables, which SSD-backed ones never have "
            f"in memory; use one of {', '.join(_DECAYS)}"
        )
    if len(types) > 1 or not types <= set(TRAINING_TYPES):
        raise ConfigError(f"tables of one TBE train in one type, FP32 or FP16, got {', '.join(map(str, types))}")
    if len(slots) != len(shards):
        raise ConfigError(f"{len(shards)} tables need as many slot counts, got {len(slots)}")
    for shard, count in zip(shards, slots, strict=True):
        if shard.table.state != state:
            raise ConfigError(f"table {shard.table.name!r}: its state {shard.table.state} is not that of {optimizer}")
        if not shard.rows:
            raise ConfigError(
                f"table {shard.table.name!r}: this shard has no rows, because there are more row shards than rows "
                "fill; shard the table by table, or over fewer ranks"
            )
        if not 1 <= count <= min(shard.rows, MAX_SLOTS):
            raise ConfigError(
                f"table {shard.table.name!r}: slots must be 1 to {min(shard.rows, MAX_SLOTS)}, got {count}"
            )
        if shard.cols % 4:
            raise ConfigError(
                f"table {shard.table.name!r}: FBGEMM trains widths that are multiples of 4, got {shard.cols}"
            )


__all__ = ["ROW_STATE", "TrainingOptions", "check_training_tables", "row_state"]
