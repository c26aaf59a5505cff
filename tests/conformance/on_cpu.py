"""What is put before a class of TorchRec's tests, so that it shards with ours and its ranks talk over gloo."""

from __future__ import annotations

import inspect
import operator
import os
import random
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import TestCase, mock

import hypothesis
import numpy as np
import torch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

from tests.conformance.drift import tracked
from tests.conformance.harness import ROOT, STOCK, load
from tests.conformance.sharders import FUSED, counterpart

BACKEND = "nccl" if torch.cuda.device_count() > 1 else "gloo"
"""Ranks talk over NCCL where each can have a GPU."""

NOT_POSSIBLE = (
    "TorchRec itself cannot: row shards of batches that differ in size are not added up over gloo, and only "
    "data-parallel tables are trained densely"
)

RAISED = "this rank raised "
"""Before the error of a rank, in what reaches the test."""

_ONLY_OLD_GLOO = ("Gloo reduce_scatter_base fallback", "bounds_check_indices on CPU does not support variable")
"""Reasons why tests skip gloo that do not hold any more, or never for what a sharder of ours does."""


@dataclass(frozen=True, kw_only=True)
class Swap:
    """Which names of test modules give sharders of ours.

    names: by module within `torchrec.distributed`. in_ranks: likewise, where a rank makes its own sharders.
    kernels: planned kernels whose tables go on SSD. cpu: the modules name CUDA devices outright. tracked: the modules
    give the tracker's config to `DistributedModelParallel`.
    """

    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    in_ranks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kernels: tuple[str, ...] = FUSED
    cpu: bool = False
    tracked: bool = False


def reseed(seed: int) -> None:
    """Fix what TorchRec's tests draw; they take the time of day."""
    random.seed(seed)
    torch.manual_seed(seed)
    np.random.seed(seed)


class CpuTorch:
    """Stands in for the name `torch` in a test module: every device is the CPU, the rest is torch's."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, *named: Any) -> torch.device:
        meta = named == ("meta",)
        return torch.device("meta" if meta else "cpu")


def stand_ins(swap: Swap, names: Mapping[str, tuple[str, ...]]) -> list[Any]:
    """Patches, not started, of the test modules' names."""
    patches = []
    for module_name, wanted in names.items():
        module = load(module_name)
        patches += [
            mock.patch.object(module, name, counterpart(getattr(module, name), swap.kernels)) for name in wanted
        ]
        if swap.tracked:
            patches.append(
                mock.patch.object(module, "DistributedModelParallel", tracked(module.DistributedModelParallel))
            )
        if swap.cpu and not torch.cuda.is_available():
            patches += _on_cpu(module)
        if BACKEND == "gloo" and hasattr(module, "MultiProcessContext"):
            patches.append(mock.patch.object(module, "MultiProcessContext", _over_gloo(module.MultiProcessContext)))
    return patches


def _over_gloo(context: Any) -> Any:
    def make(rank: int, world_size: int, backend: str = BACKEND, *more: Any, **options: Any) -> Any:
        return context(rank, world_size, BACKEND, *more, **options)

    return make


def _on_cpu(module: Any) -> list[Any]:
    patches: list[Any] = [mock.patch.object(module, "torch", CpuTorch())]
    if hasattr(module, "Topology"):
        topology = module.Topology

        def on_cpu(world_size: int, compute_device: str = "cpu", **more: Any) -> Any:
            return topology(world_size, "cpu", **more)

        patches.append(mock.patch.object(module, "Topology", on_cpu))
    return patches


class InRank:
    """A test's function by name, so that the process of a rank finds the checkout before it looks for the function."""

    def __init__(self, function: Callable[..., Any], swap: Swap) -> None:
        self.module, self.name, self.swap = function.__module__.removeprefix(f"{ROOT}."), function.__qualname__, swap
        # Ranks may be forked from a process with an older environment, and find each other at another test's port.
        self.environment = {
            name: os.environ[name] for name in (STOCK, "MASTER_ADDR", "MASTER_PORT") if name in os.environ
        }

    def __call__(self, **arguments: Any) -> Any:
        torch.set_num_threads(1)
        os.environ.update(self.environment)
        reseed(int(arguments.get("rank", 0)))
        for patch in stand_ins(self.swap, self.swap.in_ranks):
            # For good: the process ends with the test.
            patch.start()
        try:
            return operator.attrgetter(self.name)(load(self.module))(**arguments)
        except BaseException as error:
            # Other ranks may now wait for ever, so that the test's own report never comes.
            traceback.print_exc()
            raise RuntimeError(f"{RAISED}{type(error).__name__}: {error}\n{traceback.format_exc()}") from None


def _planned(sharder: Any) -> tuple[str, str]:
    stock = getattr(sharder, "_stock", sharder)
    return getattr(stock, "_sharding_type", ""), getattr(stock, "_kernel_type", "")


def _trains_densely(sharder: Any) -> bool:
    kind, kernel = _planned(sharder)
    return kernel == "dense" and kind != "data_parallel"


def _adds_up_rows(sharder: Any) -> bool:
    kind = _planned(sharder)[0]
    return isinstance(sharder, EmbeddingBagCollectionSharder) and ("row_wise" in kind or kind == "grid_shard")


class OnCpu(TestCase):
    """Comes before a class of TorchRec's tests."""

    backend = BACKEND
    swap = Swap()

    def setUp(self) -> None:
        for patch in stand_ins(self.swap, self.swap.names):
            patch.start()
            self.addCleanup(patch.stop)
        stock = super().setUp
        if "backend" in inspect.signature(stock).parameters:
            stock(backend=BACKEND)  # type: ignore[call-arg]
        else:
            stock()
        reseed(0)
        if not torch.cuda.is_available():
            self.device = torch.device("cpu")

    def skipTest(self, reason: Any) -> None:  # type: ignore[override]
        if not str(reason).startswith(_ONLY_OLD_GLOO):
            super().skipTest(reason)

    def _run_multi_process_test(self, *, callable: Any, **arguments: Any) -> None:
        if "backend" in arguments:
            arguments["backend"] = BACKEND
        if not torch.cuda.is_available():
            cpu = torch.device("cpu")
            arguments = {k: cpu if isinstance(v, torch.device) else v for k, v in arguments.items()}
        sharders = arguments.get("sharders", ())
        if arguments.get("sharding_type") == "data_parallel":
            # Not ours, and a parameter of the test rather than of its sharder.
            hypothesis.reject()
        uneven = BACKEND == "gloo" and arguments.get("variable_batch_size") and any(map(_adds_up_rows, sharders))
        if uneven or any(map(_trains_densely, sharders)):
            # `NOT_POSSIBLE` says why; other examples of the test still count.
            hypothesis.reject()
        super()._run_multi_process_test(callable=InRank(callable, self.swap), **arguments)  # type: ignore[misc]


__all__ = ["BACKEND", "NOT_POSSIBLE", "RAISED", "CpuTorch", "InRank", "OnCpu", "Swap", "reseed", "stand_ins"]
