"""Bridges between a checkout of TorchRec's tests and a wheel of another release, or a machine without streams."""

from __future__ import annotations

import functools
import inspect
from typing import Any
from unittest import TestCase, mock

import hypothesis
import torch
from torch import nn
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist

from tests.conformance.harness import load


class Pipelines(TestCase):
    """Comes before a class of the pipeline tests."""

    def setUp(self) -> None:
        super().setUp()
        if not torch.cuda.is_available():
            # No tensor of a CPU can record a stream; pipelines without streams ask for it all the same.
            self._replace(torch.Tensor, "record_stream", lambda tensor, stream: None)
            # TorchRec takes no stream for one of CUDA.
            self._replace(torch, "get_device_module", lambda device=None: torch.cpu)
            self._replace(torch.cpu.Stream, "device", torch.device("cpu"), create=True)
            if "context" in inspect.signature(PrefetchTrainPipelineSparseDist._prefetch).parameters:
                tests = load("train_pipeline.tests.test_train_pipelines")
                self._replace(tests, "PrefetchTrainPipelineSparseDist", without_streams())

    def _replace(self, owner: Any, name: str, value: Any, **options: Any) -> None:
        patch = mock.patch.object(owner, name, value, **options)
        patch.start()
        self.addCleanup(patch.stop)

    def _setup_model(self, **options: Any) -> nn.Module:
        if options.get("zch") or options.get("postproc_module") is not None:
            # Managed collision is refused with tables on SSD; the post-processor makes batches that the releases since
            # refuse for keys that come twice.
            hypothesis.reject()
        model = load("test_utils.test_model").TestSparseNN
        if "zch" not in inspect.signature(model).parameters:
            # They tell models by a flag that other releases have not.
            options["model_type"] = functools.partial(_without_flag, model)
        made: nn.Module = super()._setup_model(**options)  # type: ignore[misc]
        return made


def without_streams() -> type:
    """The prefetching pipeline for a device without streams, where TorchRec's prefetches nothing and then fails."""

    class OnOneStream(PrefetchTrainPipelineSparseDist):
        def __init__(self, *args: Any, execute_all_batches: bool = True, **options: Any) -> None:
            if not execute_all_batches:
                # TorchRec 1.8 then takes batches twice as fast as it trains on them, and runs out of them early.
                hypothesis.reject()
            super().__init__(*args, execute_all_batches=execute_all_batches, **options)

        def _prefetch(self, context: Any, *_: Any) -> None:
            context.module_input_post_prefetch.clear()
            context.module_contexts_post_prefetch.clear()
            for module in self._pipelined_modules:
                name = module.forward._name
                batch = context.input_dist_tensors_requests.pop(name).wait()
                state = context.module_contexts.pop(name)
                module.prefetch(ctx=state, dist_input=batch, forward_stream=None)
                context.module_input_post_prefetch[name] = batch
                context.module_contexts_post_prefetch[name] = state

    return OnOneStream


def _without_flag(model: Any, *, zch: bool = False, **options: Any) -> nn.Module:
    made: nn.Module = model(**options)
    return made


class LiveTable(nn.Module):
    """Stands in for a table's module: `weight` is the local shard as the state dict has it now."""

    def __init__(self, module: nn.Module, key: str) -> None:
        super().__init__()
        # In a list, so that it is no submodule of its own part.
        self._module, self._key = [module], key

    @property
    def weight(self) -> Any:
        shards = self._module[0].state_dict()[self._key].local_shards()
        return shards[0].tensor.detach().clone() if shards else None


def tracked(original: Any) -> Any:
    """In place of `DistributedModelParallel` in the tracker's tests: takes the tracker's config, as it once did.

    The tests also read weights from the parameters of tables, which are empty for tables on SSD: see `LiveTable`.
    """
    if "model_tracker_config" in inspect.signature(original).parameters:
        return original

    def make(*, model_tracker_config: Any = None, **options: Any) -> Any:
        model = original(**options)
        if model_tracker_config is not None:
            tracker = model.init_torchrec_delta_tracker(model_tracker_config)
            tracker.get_delta_ids, tracker.get_delta = tracker.get_unique_ids, tracker.get_unique
            object.__setattr__(model, "get_model_tracker", lambda: tracker)
        sharded: Any = getattr(model._dmp_wrapped_module.module, "ec", None)
        for name in list(getattr(sharded, "embeddings", {})):
            sharded.embeddings[name] = LiveTable(sharded, f"embeddings.{name}.weight")
        return model

    return make


__all__ = ["LiveTable", "Pipelines", "tracked", "without_streams"]
