"""The lookup of a stock serving TBE, without the Python that finds its arguments anew each time."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from torch import Tensor


class StockLookup:
    """Calls the operator behind a TBE whose tensors stay where they are, without caching, pruning or bounds checks.

    An operator of a later FBGEMM with other arguments is left to the TBE's own `forward`.
    """

    def __init__(self, tbe: IntNBitTableBatchedEmbeddingBagsCodegen) -> None:
        self._tbe = tbe
        self._args: list[Any] | None = None
        with contextlib.suppress(AttributeError, ValueError):
            self._op: Any = torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function.default
            names = [each.name for each in self._op._schema.arguments]
            self._varying = [names.index(name) for name in ("indices", "offsets", "indice_weights")]
            self._args = self._gathered(names)

    def _gathered(self, names: list[str]) -> list[Any]:
        tbe = self._tbe
        special = {
            "dev_weights": tbe.weights_host if tbe.host_size > 0 else tbe.weights_dev,
            "uvm_weights": tbe.weights_uvm,
            "pooling_mode": int(tbe.pooling_mode),
            "indices": None,
            "offsets": None,
            "indice_weights": None,
            # There is no cache.
            "lxu_cache_locations": torch.empty(0, dtype=torch.int32, device=tbe.weights_tys.device),
        }
        return [special[n] if n in special else getattr(tbe, n) for n in names]

    def __call__(self, slots: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        """As the TBE's `forward`; `slots` and `offsets` of the index type of its device, contiguous."""
        if self._args is None:
            # Not through the hooks of a module that nobody sees.
            out: Tensor = self._tbe.forward(slots, offsets, weights)
            return out
        args = self._args.copy()
        for place, value in zip(self._varying, (slots, offsets, weights), strict=True):
            args[place] = value
        found: Tensor = self._op(*args)
        return found


__all__ = ["StockLookup"]
