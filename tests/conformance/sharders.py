"""TorchRec's test sharders with our shard step: they plan as TorchRec's do, and put what was planned on SSD."""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fp_embeddingbag import FeatureProcessedEmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.shard import shard, shard_modules
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.types import ParameterSharding

from tests.conformance.harness import SCRATCH, SHARE, STOCK
from torchrec_turbossd.planner.kernel import TURBO_SSD, TurboCacheParams
from torchrec_turbossd.sharding import TurboSSDEmbeddingBagCollectionSharder, TurboSSDEmbeddingCollectionSharder

ROWS = "rows-"
"""What the folder of every sharded module that has tables on SSD begins with."""

UVM = ("fused_uvm", "fused_uvm_caching")
FUSED = ("fused", *UVM)
"""Kernels that a test plans with, and whose tables go on SSD instead; dense ones are left alone."""


def on_ssd(params: dict[str, ParameterSharding], share: float) -> dict[str, ParameterSharding]:
    """A plan with its tables on SSD, but for data-parallel ones; a `share` of each shard's rows in slots."""
    plan = {}
    for name, sharding in params.items():
        # Plans made by hand say "dense" for any table.
        if sharding.sharding_type != "data_parallel" and sharding.compute_kernel in (*FUSED, "dense"):
            rows = [shard.shard_sizes[0] for shard in sharding.sharding_spec.shards]
            slots = tuple(max(1, math.ceil(count * share)) for count in rows)
            sharding = dataclasses.replace(
                sharding, compute_kernel=TURBO_SSD, cache_params=TurboCacheParams(slots=slots)
            )
        plan[name] = sharding
    return plan


class _OnSSD(ABC):
    """Before one of TorchRec's sharders: asks `stock` what the planner may do, but for kernels that need CUDA."""

    _stock: Any
    _ours: Callable[..., Any]

    def __getstate__(self) -> dict[str, Any]:
        # By name: while a test runs, its module has a stand-in under the name of the class.
        kind = type(self._stock)
        return {**self.__dict__, "_stock": (kind.__module__, kind.__name__, self._stock.__dict__)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        module, name, fields = state["_stock"]
        kind = getattr(importlib.import_module(module), name)
        stock = kind.__new__(kind)
        stock.__dict__.update(fields)
        self.__dict__.update({**state, "_stock": stock})

    def sharding_types(self, compute_device_type: str) -> list[str]:
        # Those of CUDA: over gloo TorchRec offers fewer than it can.
        return list(self._stock.sharding_types("cuda"))

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        kernels = self._stock.compute_kernels(sharding_type, compute_device_type)
        return list(dict.fromkeys("fused" if kernel in UVM else kernel for kernel in kernels))

    def shard(self, module: Any, params: Any, env: Any, device: Any = None, module_fqn: str | None = None) -> Any:
        fused = self._stock.fused_params or {}
        # A test that sets a load factor means the share of rows in fast memory.
        share = fused.get("cache_load_factor") or float(os.environ.get(SHARE, "0.5"))
        plan = on_ssd(params, share)
        # A folder for every sharded module: a test may have several at once. Its name tells whether it is in use.
        used = any(sharding.compute_kernel == TURBO_SSD for sharding in plan.values())
        directory = tempfile.mkdtemp(prefix=ROWS if used else "no-rows-", dir=os.environ.get(SCRATCH))
        ours = self._make(directory, _trainable(fused), self._stock.qcomm_codecs_registry)
        return ours.shard(module, plan, env, device, module_fqn)

    @abstractmethod
    def _make(self, directory: str, fused_params: Any, codecs: Any) -> Any:
        """The package's sharder, with its rows in a directory."""


def _trainable(fused_params: dict[str, Any]) -> dict[str, Any]:
    """Fused parameters with an optimizer that FBGEMM has on this device."""
    if torch.cuda.is_available() or fused_params.get("optimizer") != EmbOptimType.ADAM:
        return fused_params
    return {**fused_params, "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD}


class BagsOnSSD(_OnSSD, EmbeddingBagCollectionSharder):
    """Plans as `stock` does; shards an `EmbeddingBagCollection` with its tables on SSD."""

    def __init__(self, stock: EmbeddingBagCollectionSharder) -> None:
        super().__init__(stock.fused_params, stock.qcomm_codecs_registry)
        self._stock = stock

    def _make(self, directory: str, fused_params: Any, codecs: Any) -> Any:
        return TurboSSDEmbeddingBagCollectionSharder(directory, fused_params, codecs)


class SequencesOnSSD(_OnSSD, EmbeddingCollectionSharder):
    """Plans as `stock` does; shards an `EmbeddingCollection` with its tables on SSD."""

    def __init__(self, stock: EmbeddingCollectionSharder) -> None:
        super().__init__(stock.fused_params, stock.qcomm_codecs_registry, use_index_dedup=stock._use_index_dedup)
        self._stock = stock

    def _make(self, directory: str, fused_params: Any, codecs: Any) -> Any:
        dedup = self._stock._use_index_dedup
        return TurboSSDEmbeddingCollectionSharder(directory, fused_params, codecs, use_index_dedup=dedup)


def moved(sharder: Any, kernels: tuple[str, ...] = FUSED) -> Any:
    """A sharder's counterpart on SSD.

    The sharder itself when it is for another kind of module, or restricted to a kernel that is not among `kernels`.
    """
    if getattr(sharder, "_kernel_type", "fused" if "fused" in kernels else None) not in kernels:
        return sharder
    if isinstance(sharder, FeatureProcessedEmbeddingBagCollectionSharder):
        sharder._ebc_sharder = moved(sharder._ebc_sharder, kernels)
        if hasattr(sharder, "_kernel_type"):
            sharder._kernel_type = "fused"
        return sharder
    if isinstance(sharder, EmbeddingBagCollectionSharder):
        return BagsOnSSD(sharder)
    return SequencesOnSSD(sharder) if isinstance(sharder, EmbeddingCollectionSharder) else sharder


def counterpart(original: Any, kernels: tuple[str, ...] = FUSED) -> Callable[..., Any]:
    """Stands in for a name of a test module: a sharder's class, a function that makes sharders, or one that shards with
    TorchRec's own when it is given none."""

    def move(sharder: Any) -> Any:
        return resident(sharder) if os.environ.get(STOCK) else moved(sharder, kernels)

    def make(*args: Any, **kwargs: Any) -> Any:
        if original in (DistributedModelParallel, shard_modules):
            kwargs.setdefault("sharders", [move(sharder) for sharder in get_default_sharders()])
            return original(*args, **kwargs)
        if original is shard:
            kwargs.setdefault("sharder", move(EmbeddingBagCollectionSharder()))
            return original(*args, **kwargs)
        made = original(*args, **kwargs)
        return [move(sharder) for sharder in made] if isinstance(made, list) else move(made)

    return make


def resident(sharder: Any) -> Any:
    """TorchRec's sharder as it is, but for kernels that this machine has not."""
    if not torch.cuda.is_available() and getattr(sharder, "_kernel_type", None) in UVM:
        sharder._kernel_type = "fused"
    return sharder


__all__ = ["FUSED", "ROWS", "UVM", "BagsOnSSD", "SequencesOnSSD", "counterpart", "moved", "on_ssd", "resident"]
