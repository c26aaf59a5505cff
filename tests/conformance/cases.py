"""Which of TorchRec's tests concern training with sharded tables, and what each must do with tables on SSD."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.conformance.drift import Pipelines
from tests.conformance.grid import bags_class, sequences_class
from tests.conformance.harness import load
from tests.conformance.on_cpu import OnCpu, Swap
from tests.conformance.sharders import UVM

_PER_FEATURE = "batch size per feature"
_KERNELS = "test_numerical_equivalence_between_kernel_types"


@dataclass(frozen=True, kw_only=True)
class Group:
    """The tests of one class.

    `refused`, `not_here` and `needs_cuda` are by name of the test, as a pattern.

    name: as the table shows it. make: builds the class, once TorchRec's tests can be imported.
    only: the tests that belong to the group; empty: all.
    refused: a word of the error that must come instead.
    not_here: why the test says nothing about tables on SSD. needs_cuda: why it cannot be run without.
    """

    name: str
    make: Callable[[], type[OnCpu]]
    only: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    not_here: Mapping[str, str] = field(default_factory=dict)
    needs_cuda: Mapping[str, str] = field(default_factory=dict)


def _group(module: str, test_class: str, swap: Swap, *before: type, label: str = "", **more: Any) -> Group:
    """Tests of a class of a module within `torchrec.distributed`; `before`: classes to put before it."""

    def make() -> type[OnCpu]:
        base = getattr(load(module), test_class)
        return type(test_class, (OnCpu, *before, base), {"swap": swap, "__module__": __name__})

    return Group(name=f"{module.rpartition('.')[2]}::{label or test_class}", make=make, **more)


def _bases() -> list[Group]:
    parallel, base = "test_utils.test_model_parallel", "test_utils.test_model_parallel_base"
    by_row, create = "tests.test_model_parallel_hierarchical", ("create_test_sharder",)
    return [
        _group(
            parallel,
            "ModelParallelBase",
            Swap(names={parallel: create}),
            refused={"test_sharding_variable_batch": _PER_FEATURE},
            not_here={"test_sharding_multiple_kernels*": "kernels in UVM, with a batch size per feature"},
        ),
        _group(
            by_row,
            "ModelParallelHierarchicalTest",
            Swap(names={by_row: create}),
            refused={"test_sharding_variable_batch": _PER_FEATURE},
            not_here={"test_embedding_tower*": "TorchRec's towers shard with its own sharders"},
        ),
        _group(
            base,
            "ModelParallelStateDictBase",
            Swap(names={base: (*create, "get_default_sharders")}),
            refused={"test_meta_device_dmp_state_dict": "meta device"},
            not_here={_KERNELS: "run as the group `kernels`"},
        ),
        _group(
            base,
            "ModelParallelStateDictBase",
            Swap(names={base: create}, kernels=UVM),
            label="kernels",
            only=(_KERNELS,),
        ),
        _group(
            base,
            "ModelParallelSparseOnlyBase",
            Swap(names={base: ("DistributedModelParallel",)}),
            not_here={"test_initialize_torch_state_error*": "puts a mock in place of a method that ours calls"},
        ),
    ]


def _sequences() -> list[Group]:
    many, single = "tests.test_sequence_model_parallel", "tests.test_sequence_model_parallel_single_rank"
    sharder = ("TestEmbeddingCollectionSharder",)
    one_class = "SequenceModelParallelStateDictTest"
    return [
        _group(many, "SequenceModelParallelTest", Swap(names={many: sharder})),
        _group(many, "TDSequenceModelParallelTest", Swap(names={many: sharder})),
        _group(single, one_class, Swap(names={single: sharder}), only=("test_load_state_dict",)),
        _group(single, one_class, Swap(names={single: sharder}, kernels=UVM), label="kernels", only=(_KERNELS,)),
    ]


def _feature_processors() -> list[Group]:
    many, single = "tests.test_fp_embeddingbag", "tests.test_fp_embeddingbag_single_rank"
    one_class, sharder = "FPModelParallelStateDictTest", ("TestFPEBCSharder",)
    return [
        _group(
            many,
            "ShardedEmbeddingBagCollectionParallelTest",
            Swap(names={many: ("FeatureProcessedEmbeddingBagCollectionSharder",)}),
        ),
        _group(single, one_class, Swap(names={single: sharder}), only=("test_load_state_dict",)),
        _group(single, one_class, Swap(names={single: sharder}, kernels=UVM), label="kernels", only=(_KERNELS,)),
    ]


def _modules() -> list[Group]:
    bag, sequence = "EmbeddingBagCollectionSharder", "EmbeddingCollectionSharder"
    init, optim = "tests.test_init_parameters", "tests.test_apply_optim_per_param"
    comms, bags, sequences = (
        "tests.test_qcomms_embedding_modules",
        "composable.tests.test_embeddingbag",
        "composable.tests.test_embedding",
    )
    crash = "on a CPU, FBGEMM crashes with TorchRec's own sharders too (permute of sequences)"
    return [
        _group(init, "ParameterInitializationTest", Swap(names={init: (bag, sequence)})),
        _group(
            optim,
            "ShardedEmbeddingBagCollectionApplyOptimPerParamTest",
            Swap(names={optim: ("TestEmbeddingBagCollectionSharder",)}),
        ),
        _group(
            optim,
            "ShardedEmbeddingCollectionApplyOptimPerParamTest",
            Swap(names={optim: ("TestEmbeddingCollectionSharder",)}),
        ),
        _group(comms, "ConstructParameterShardingTest", Swap(names={comms: (bag,)})),
        _group(
            bags,
            "ShardedEmbeddingBagCollectionParallelTest",
            Swap(names={bags: ("TestEmbeddingBagCollectionSharder",)}),
        ),
        _group(
            sequences,
            "ShardedEmbeddingCollectionParallelTest",
            Swap(in_ranks={sequences: (sequence,)}),
            needs_cuda={"*": crash},
        ),
    ]


def _composed() -> list[Group]:
    optim, states, ddp = (
        "composable.tests.test_fused_optim",
        "composable.tests.test_fused_optim_nccl",
        "composable.tests.test_ddp",
    )
    adam = "trains with partial row-wise Adam, which FBGEMM has on CUDA only"
    return [
        _group(optim, "TestFusedOptim", Swap(names={optim: ("shard",)})),
        _group(
            states, "ShardedFusedOptimizerStateDictTest", Swap(in_ranks={states: ("shard",)}), needs_cuda={"*": adam}
        ),
        _group(ddp, "DDPTest", Swap(in_ranks={ddp: ("trec_shard", "shard_modules")})),
    ]


def _pipelines() -> list[Group]:
    tests, base = "train_pipeline.tests.test_train_pipelines", "train_pipeline.tests.test_train_pipelines_base"
    made = {tests: ("TestEBCSharder", "FeatureProcessedEmbeddingBagCollectionSharder"), base: ("TestEBCSharder",)}
    swap = Swap(names=made, cpu=True)
    fsdp = {"test_pipelining_fsdp_pre_trace": "FSDP wants an accelerator"}
    return [
        _group(tests, "TrainPipelineSparseDistTest", swap, Pipelines, needs_cuda=fsdp),
        _group(tests, "TrainPipelineAttachDetachTest", swap, Pipelines),
        _group(tests, "EmbeddingTrainPipelineTest", swap, Pipelines),
        _group(tests, "PrefetchTrainPipelineSparseDistTest", swap, Pipelines),
        _group(tests, "StagedTrainPipelineTest", swap, Pipelines, needs_cuda={"*": "makes CUDA streams of its own"}),
    ]


def _tracker() -> Group:
    tests = "model_tracker.tests.test_model_delta_tracker"
    made = {tests: ("EmbeddingCollectionSharder", "EmbeddingBagCollectionSharder")}
    return _group(
        tests,
        "ModelDeltaTrackerTest",
        Swap(in_ranks=made, cpu=True, tracked=True),
        not_here={"test_tracker_not_initialized*": "asks an interface of the tracker that is gone"},
    )


GROUPS = (
    Group(name="bags", make=bags_class, refused={"*_batch_per_feature": _PER_FEATURE}),
    Group(name="sequences", make=sequences_class),
    *_bases(),
    *_sequences(),
    *_feature_processors(),
    *_modules(),
    *_composed(),
    *_pipelines(),
    _tracker(),
)
"""Everything that is run, in the order of the table."""

ELSEWHERE = {
    "test_cache_prefetch": "counts misses of FBGEMM's UVM cache, which tables on SSD do not use",
    "test_fused_optimizer": "empty in the checkout; optimizers are in test_apply_optim_per_param and the state dicts",
    "test_quant_*, test_infer_*": "inference: quantised tables on SSD are served by a module of their own",
    "test_embedding_update": "rows are updated by `streaming_update` of the sharded module",
    "test_2d_sharding, test_dynamic_sharding": "2D sharding and resharding in place are refused",
    "test_mc_*": "managed collision modules reset rows by their id: refused",
}
"""Tests that are never loaded, and why."""

__all__ = ["ELSEWHERE", "GROUPS", "Group"]
