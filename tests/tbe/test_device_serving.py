"""A serving TBE that keeps account of its slots as on a GPU: what fails in the middle of a lookup leaves no trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import Tensor

from torchrec_turbossd.errors import InputError
from torchrec_turbossd.store.contract import Rows
from torchrec_turbossd.tables import TableShard, TableSpec
from torchrec_turbossd.tbe.device_serving import DeviceServingRows
from torchrec_turbossd.tbe.serving import ServingOptions, TurboSSDIntNBitTableBatchedEmbeddingBags

ROWS, DIM = 40, 4


class Store:
    """Row i of a table is i, i + 1, ..."""

    def read(self, table: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        rows = (ids[:, None] + torch.arange(DIM)[None, :]).float()
        return rows.view(torch.uint8).view(ids.numel(), -1), torch.ones(ids.numel(), dtype=torch.bool)

    def commit(self, batch: Mapping[str, Rows]) -> Any:
        return batch

    def publish(self, committed: Any) -> None:
        """Nothing is ever updated."""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def tbe(request: pytest.FixtureRequest) -> TurboSSDIntNBitTableBatchedEmbeddingBags:
    shards = [TableShard.whole(TableSpec(name=n, rows=ROWS, dim=DIM, data_type=SparseType.FP32)) for n in "ab"]
    options = ServingOptions(output_dtype=SparseType.FP32)
    module = TurboSSDIntNBitTableBatchedEmbeddingBags(
        shards, [10, 10], [0, 1], Store(), device=request.param, options=options, dram_slots=[20, 20]
    )
    assert isinstance(module.rows, DeviceServingRows)
    return module


def look(tbe: TurboSSDIntNBitTableBatchedEmbeddingBags, ids: list[int]) -> None:
    """One bag for each of `ids` of both tables, and see that the answer is right."""
    device = tbe.device
    out = tbe(torch.tensor(ids + ids, device=device), torch.arange(2 * len(ids) + 1, device=device)).cpu()
    want = torch.tensor(ids)[:, None] + torch.arange(DIM)[None, :]
    assert torch.equal(out, torch.cat([want, want], dim=1).float())


def test_a_lookup_that_fails_claims_nothing(
    tbe: TurboSSDIntNBitTableBatchedEmbeddingBags, monkeypatch: pytest.MonkeyPatch
) -> None:
    look(tbe, [1, 2, 3])
    look(tbe, [1, 2, 3])

    def fail(*_: object) -> Tensor:
        raise MemoryError("planted")

    for name in ("_call", "_count"):
        owner = tbe if name == "_call" else tbe.rows
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(owner, name, fail)
            look(tbe, [1, 7, 8])
        tbe.rows.cache.check()
    look(tbe, [1, 7, 8])
    look(tbe, list(range(10)))
    look(tbe, list(range(30, 40)))
    tbe.rows.cache.check()


@pytest.mark.parametrize("offsets", [[0, 5, 2, 3, 4], [0, 1, 2, 3, 9], [1, 1, 2, 3, 4], [0, 1, 2, 3, 3]])
def test_bad_offsets_after_a_batch_of_hits(tbe: TurboSSDIntNBitTableBatchedEmbeddingBags, offsets: list[int]) -> None:
    """They come when the lookup is launched before its batch was judged."""
    look(tbe, [1, 2])
    look(tbe, [1, 2])
    ids = torch.tensor([1, 2, 1, 2], device=tbe.device)
    with pytest.raises(InputError):
        tbe(ids, torch.tensor(offsets, device=tbe.device))
    look(tbe, [1, 2])
    look(tbe, [3, 4])
    tbe.rows.cache.check()
