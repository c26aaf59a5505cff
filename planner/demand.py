"""What a table asks of its cache: bytes of a row, lookups of a batch, and the least slots that a batch needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor
from torchrec.distributed.planner.shard_estimators import get_num_poolings
from torchrec.distributed.planner.types import ParameterConstraints, Shard, ShardingOption
from torchrec.distributed.utils import optimizer_type_to_emb_opt_type

from torchrec_turbossd.errors import ConfigError, UnsupportedError
from torchrec_turbossd.tables import MAX_SLOTS, StateSpec

ROW_SHARD_SLACK = 1.25
"""How many more of a batch's ids than its even share a shard of some of the rows must be ready for."""

_FIRST, _SECOND = StateSpec(name="momentum1", per_row=False), StateSpec(name="exp_avg_sq", per_row=False)
_FIRST_OF_ROW, _SECOND_OF_ROW = StateSpec(name="momentum1", per_row=True), StateSpec(name="exp_avg_sq", per_row=True)

ROW_STATE: dict[EmbOptimType, tuple[StateSpec, ...]] = {
    EmbOptimType.NONE: (),
    EmbOptimType.SGD: (),
    EmbOptimType.EXACT_SGD: (),
    EmbOptimType.ROWWISE_ADAGRAD: (_FIRST_OF_ROW,),
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: (_FIRST_OF_ROW,),
    EmbOptimType.EXACT_ADAGRAD: (_FIRST,),
    EmbOptimType.LARS_SGD: (_FIRST,),
    EmbOptimType.PARTIAL_ROWWISE_ADAM: (_FIRST, _SECOND_OF_ROW),
    EmbOptimType.PARTIAL_ROWWISE_LAMB: (_FIRST, _SECOND_OF_ROW),
    EmbOptimType.ADAM: (_FIRST, _SECOND),
    EmbOptimType.LAMB: (_FIRST, _SECOND),
}
"""Optimizer state of a row. Wider than what the training kernel supports, which decides for itself when it is built;
where both know an optimizer they agree."""


def optimizer_of(tensor: Tensor, fused_params: Mapping[str, Any] | None) -> EmbOptimType:
    """The optimizer of a table: the one applied to its parameter, else the sharder's, else FBGEMM's exact SGD."""
    applied = getattr(tensor, "_optimizer_classes", None)
    if applied:
        chosen = optimizer_type_to_emb_opt_type(applied[0])
    else:
        chosen = (fused_params or {}).get("optimizer", EmbOptimType.EXACT_SGD)
    if not isinstance(chosen, EmbOptimType) or chosen not in ROW_STATE:
        raise UnsupportedError(
            f"optimizer must be FBGEMM's EmbOptimType, one of {', '.join(o.name for o in ROW_STATE)} (for tables on "
            f"SSD EXACT_SGD, EXACT_ROWWISE_ADAGRAD or EXACT_ADAGRAD), got {chosen!r}"
        )
    return chosen


def row_bytes(tensor: Tensor, cols: int, fused_params: Mapping[str, Any] | None) -> int:
    """Bytes of one row of a shard `cols` wide: weights, and the optimizer state that travels with them.

    Args:
        tensor: the table's parameter, which may be on the meta device.
        cols: columns of the shard.
        fused_params: the sharder's.

    Raises:
        UnsupportedError: an optimizer that tables on SSD cannot have.
    """
    state = ROW_STATE[optimizer_of(tensor, fused_params)]
    return cols * int(tensor.element_size()) + sum(spec.row_bytes(cols) for spec in state)


@dataclass(frozen=True, kw_only=True)
class Demand:
    """How many lookups reach a shard.

    A shard of some of the rows, on all ranks or on those of one host, answers its share of the table's lookups; one
    of some of the columns answers all of them, each with a part of the row.

    Attributes:
        world_size: ranks, each of which brings its own batch.
        batches_in_flight: batches whose rows must be in slots at once: 2 when the next one is prefetched.
        constraints: the user's, for batch sizes and pooling factors.
    """

    world_size: int
    batches_in_flight: int = 2
    constraints: Mapping[str, ParameterConstraints] = field(default_factory=dict)

    def lookups(self, option: ShardingOption, shard: Shard) -> float:
        """Lookups of one global batch that this shard is expected to answer."""
        return self.table_lookups(option) * _row_share(option, shard)

    def floor(self, option: ShardingOption, shard: Shard) -> int:
        """The least slots with which no batch in flight overflows: as many as it may have distinct ids, at most the
        shard's rows. A shard of some of the rows is ready for 25 % more than its even share."""
        rows, share = int(shard.size[0]), _row_share(option, shard)
        slack = ROW_SHARD_SLACK if share < 1 else 1.0
        ids = self.table_lookups(option) * min(1.0, share * slack)
        return min(rows, MAX_SLOTS, max(1, math.ceil(ids * self.batches_in_flight)))

    def table_lookups(self, option: ShardingOption) -> float:
        """Lookups of one global batch that the option's table is expected to get."""
        pooling = option.input_lengths
        given = self.constraints.get(option.name)
        batches = given.batch_sizes if given and given.batch_sizes else [option.batch_size] * len(pooling)
        poolings = get_num_poolings(dict(self.constraints), option)
        one_rank = sum(a * b * c for a, b, c in zip(pooling, poolings, batches, strict=True))
        # TorchRec counts one feature where no constraint says more.
        return float(one_rank) * max(1.0, _features(option) / len(pooling)) * self.world_size


def check_constraints(constraints: Mapping[str, ParameterConstraints]) -> None:
    """Raise `ConfigError` for numbers that no plan can be made of, naming the table."""
    for table, given in constraints.items():
        pooling, numbers = given.pooling_factors, [given.num_poolings, given.batch_sizes]
        lengths = [len(pooling), *(len(values) for values in numbers if values)]
        if len(set(lengths)) > 1:
            raise ConfigError(
                f"table {table!r}: pooling_factors, num_poolings and batch_sizes need one entry for each feature, "
                f"got {lengths[0]} pooling factors, {given.num_poolings} and {given.batch_sizes}"
            )
        for values in (pooling, *numbers):
            if not all(math.isfinite(value) and value >= 0 for value in values or ()):
                raise ConfigError(
                    f"table {table!r}: pooling factors, num_poolings and batch sizes must be finite and not negative, "
                    f"got {values}"
                )
        if given.min_partition is not None and given.min_partition < 1:
            raise ConfigError(f"table {table!r}: min_partition must be a positive int, got {given.min_partition}")
        check_load_factor(table, given.cache_params.load_factor if given.cache_params is not None else None)


def check_load_factor(table: str, factor: float | None) -> float | None:
    """`factor` itself; raises `ConfigError` unless it is None or in (0, 1]."""
    # NaN fails this comparison too.
    if factor is not None and not 0 < factor <= 1:
        raise ConfigError(f"table {table!r}: a cache load factor is above 0 and at most 1, got {factor}")
    return factor


def _row_share(option: ShardingOption, shard: Shard) -> float:
    return float(shard.size[0] / option.tensor.shape[0])


def _features(option: ShardingOption) -> int:
    """Features that look up the table, 1 where the module does not say."""
    module = option.module[1]
    for method in ("embedding_bag_configs", "embedding_configs"):
        configs = getattr(module, method, None)
        if callable(configs):
            return max([len(c.feature_names) for c in configs() if c.name == option.name], default=1)
    return 1


__all__ = [
    "ROW_SHARD_SLACK",
    "ROW_STATE",
    "Demand",
    "check_constraints",
    "check_load_factor",
    "optimizer_of",
    "row_bytes",
]
