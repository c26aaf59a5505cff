"""TorchRec sharders whose tables may live on SSD."""

from torchrec_turbossd.sharding.checkpoint import save_snapshot
from torchrec_turbossd.sharding.embedding import (
    TurboSSDEmbeddingCollectionSharder,
    TurboSSDShardedEmbeddingCollection,
)
from torchrec_turbossd.sharding.embeddingbag import (
    TurboSSDEmbeddingBagCollectionSharder,
    TurboSSDShardedEmbeddingBagCollection,
)
from torchrec_turbossd.sharding.restore import load_snapshot
from torchrec_turbossd.sharding.sharders import get_turbo_ssd_sharders
from torchrec_turbossd.sharding.staging import TurboSSDStager
from torchrec_turbossd.sharding.swap import SwappedTable, swap_to_turbo_ssd

__all__ = [
    "SwappedTable",
    "TurboSSDEmbeddingBagCollectionSharder",
    "TurboSSDEmbeddingCollectionSharder",
    "TurboSSDShardedEmbeddingBagCollection",
    "TurboSSDShardedEmbeddingCollection",
    "TurboSSDStager",
    "get_turbo_ssd_sharders",
    "load_snapshot",
    "save_snapshot",
    "swap_to_turbo_ssd",
]
