"""What would be silently wrong with tables on SSD, refused before anything is built."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.types import ShardingEnv

from torchrec_turbossd.errors import UnsupportedError


def check_module(
    configs: Sequence[Any],
    weights: Mapping[str, Tensor],
    sharding_types: Mapping[str, str],
    supported: Sequence[str],
    env: ShardingEnv,
    device: torch.device | None = None,
) -> None:
    """Raise `UnsupportedError` for an environment or a table that cannot have its rows on SSD.

    Args:
        configs: TorchRec's, of the tables on SSD.
        weights: their parameters, maybe on the meta device. sharding_types: as planned.
        supported: sharding types of the module. device: that will train.
    """
    if configs and device is not None and device.type == "meta":
        raise UnsupportedError("tables on SSD cannot be sharded onto the meta device; give the device that will train")
    if configs and type(env).__name__ != "ShardingEnv":
        raise UnsupportedError(f"{type(env).__name__} is not supported with tables on SSD; use a plain ShardingEnv")
    if configs and getattr(env, "output_dtensor", False):
        raise UnsupportedError("DTensor state is not supported with tables on SSD; leave output_dtensor off")
    for config in configs:
        if sharding_types[config.name] not in supported:
            raise UnsupportedError(
                f"table {config.name!r}: sharding type {sharding_types[config.name]} is not supported on SSD; use "
                f"one of {', '.join(supported)}"
            )
        if getattr(config, "use_virtual_table", False):
            raise UnsupportedError(f"table {config.name!r}: virtual tables are not supported on SSD")
        if getattr(config, "stash_weights", False):
            raise UnsupportedError(
                f"table {config.name!r}: stash_weights is not supported on SSD, where slots hold rows that are in use; "
                "leave it off"
            )
        if getattr(config, "enable_embedding_update", False):
            raise UnsupportedError(
                f"table {config.name!r}: enable_embedding_update is not supported on SSD; leave it off and call "
                "streaming_update of the sharded module"
            )
        own_init = config.init_fn is not None and not _is_default_init(config)
        if own_init and weights[config.name].device.type == "meta":
            raise UnsupportedError(
                f"table {config.name!r}: init_fn is not supported on SSD; set weight_init_min and weight_init_max, or "
                "build the module off the meta device, whose weights are then loaded"
            )


def _is_default_init(config: Any) -> bool:
    init_fn, bounds = config.init_fn, {"a": config.get_weight_init_min(), "b": config.get_weight_init_max()}
    uniform = isinstance(init_fn, functools.partial) and init_fn.func is torch.nn.init.uniform_
    return uniform and init_fn.keywords == bounds


__all__ = ["check_module"]
