"""The list of sharders for a model: ours where tables may go on SSD, TorchRec's for the rest."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.types import ModuleSharder
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_turbossd.sharding.embedding import TurboSSDEmbeddingCollectionSharder
from torchrec_turbossd.sharding.embeddingbag import TurboSSDEmbeddingBagCollectionSharder


def get_turbo_ssd_sharders(
    ssd_directory: str | os.PathLike[str] | None = None,
    fused_params: dict[str, Any] | None = None,
    **options: Any,
) -> list[ModuleSharder[nn.Module]]:
    """Sharders for a whole model, for the planner and for `DistributedModelParallel`.

    `EmbeddingBagCollection` and `EmbeddingCollection` get ours; every other module what TorchRec's defaults say.

    Args:
        ssd_directory: base directory of the live rows, on a local SSD; each rank and module takes a sub-directory of
            its own, which is emptied when it is opened. A table's `KeyValueParams.ssd_storage_directory` comes before
            it; `@local_rank` in either becomes the local rank. Models alive at once in a process need one each.
        fused_params: optimizer and its arguments, as for TorchRec's sharders.
        options: `load_factor` (share of a shard's rows that get slots when the plan says nothing, 0.2), `seed` (of rows
            never written), `policy` (of eviction), `read_threads` (for each store), `dram_budget_gb` (GiB of a rank for
            the DRAM tier of a GPU; None: what the planner finds free). See `TurboSSDSharder`.
    """
    special: dict[type[nn.Module], Any] = {
        EmbeddingBagCollection: TurboSSDEmbeddingBagCollectionSharder(ssd_directory, fused_params, **options),
        EmbeddingCollection: TurboSSDEmbeddingCollectionSharder(ssd_directory, fused_params, **options),
    }
    stock = [s for s in get_default_sharders() if s.module_type not in special]
    return [*special.values(), *stock]


__all__ = ["get_turbo_ssd_sharders"]
