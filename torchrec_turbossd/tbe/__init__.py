"""FBGEMM table batched embeddings that run on slots: remap, prefetch, training and quantised serving."""

from __future__ import annotations

__all__: list[str] = []
