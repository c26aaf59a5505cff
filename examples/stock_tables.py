"""The yardstick of the demo's server: whole tables, trained in memory and quantised, in FBGEMM's own module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from torch import Tensor

from torchrec_turbossd.rows import quantise

TableSpecs = Sequence[tuple[str, int, int, SparseType]]


class StockTables:
    """FBGEMM's inference module with all rows of all tables in memory.

    Args:
        specs: (name, rows, dim, type) of each table.
        feature_table_map: for each feature, its table.
        device: where the rows are.
    """

    def __init__(self, specs: TableSpecs, feature_table_map: Sequence[int], device: str) -> None:
        where = EmbeddingLocation.DEVICE if device == "cuda" else EmbeddingLocation.HOST
        self.specs = specs
        self._module = IntNBitTableBatchedEmbeddingBagsCodegen(
            [(*spec, where) for spec in specs],
            feature_table_map=list(feature_table_map),
            output_dtype=SparseType.FP32,
            device=device,
        )
        self._module.initialize_weights()
        rows = self._module.split_embedding_weights_with_scale_bias(split_scale_bias_mode=0)
        self._rows = {name: weights for (name, *_), (weights, _, _) in zip(specs, rows, strict=True)}

    def fill(self, directory: Path) -> None:
        """Take the shards of every rank, as training left them in `directory`, for the rows of all tables."""
        for name, rows, dim, _ in self.specs:
            whole = torch.empty(rows, dim)
            for path in directory.glob(f"{name}-*.pt"):
                for row, col, part in torch.load(path, map_location="cpu"):
                    whole[row : row + part.shape[0], col : col + part.shape[1]] = part
            self._put(name, slice(None), whole)

    def replace(self, changed: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Take new rows; returns, for each table, the ids [N] of rows whose quantised bytes are others now."""
        different = {}
        for name, (ids, rows) in changed.items():
            places = ids.to(self._rows[name].device)
            before = self._rows[name][places]
            self._put(name, places, rows)
            different[name] = ids[(self._rows[name][places] != before).any(1).cpu()]
        return different

    def _put(self, name: str, places: Tensor | slice, rows: Tensor) -> None:
        data_type = next(spec[3] for spec in self.specs if spec[0] == name)
        quantised = quantise(rows, data_type)
        # On CUDA, FBGEMM pads rows.
        self._rows[name][places, : quantised.shape[1]] = quantised.to(self._rows[name].device)

    def look_up(self, indices: Tensor, offsets: Tensor) -> Tensor:
        """Pooled rows: [B, sum of the features' dims] float32."""
        found: Tensor = self._module(indices.int(), offsets.int())
        return found


__all__ = ["StockTables", "TableSpecs"]
