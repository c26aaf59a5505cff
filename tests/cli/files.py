"""Files and models of the command's tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig

TABLES = [
    {"name": "big", "rows": 400_000, "dim": 64, "lookups": 4, "access": {"zipf": 0.9}},
    {"name": "wide", "rows": 100_000, "dim": 128, "features": ["w1", "w2"], "lookups": [2, 1], "data_type": "fp16"},
    {"name": "events", "rows": 50_000, "dim": 32, "kind": "sequence", "lookups": 10},
    {"name": "clicks", "rows": 2_000, "dim": 16, "kind": "sequence"},
    {"name": "tiny", "rows": 200, "dim": 64, "pooling": "mean"},
]
"""Five tables: 104 MB, 26 MB, 7 MB and little, with row-wise Adagrad."""


def described(device: str, *, fast: str = "32 MiB", ranks: int = 2, **more: Any) -> dict[str, Any]:
    """What is to be planned: the tables on `ranks` ranks with `fast` bytes where slots are."""
    sizes = {"hbm": fast, "dram": "1 GiB"} if device == "cuda" else {"dram": fast}
    topology = {"device": device, "ranks": ranks, "ssd": "10 GiB", "ssd_reads_per_second": 100_000, **sizes}
    given = {"batch_size": 128, "optimizer": "exact_row_wise_adagrad", "tables": TABLES, "topology": topology}
    return {**given, "reserve": 10, **more}


def write(path: Path, whole: dict[str, Any]) -> Path:
    """Write a file as JSON, which is YAML too."""
    path.write_text(json.dumps(whole))
    return path


def make_model() -> nn.Module:
    """Two bags and a sequence inside a larger model."""
    model = nn.Module()
    model.dense = nn.Linear(4, 4)
    model.bags = EmbeddingBagCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingBagConfig(name="big", num_embeddings=400_000, embedding_dim=64, feature_names=["a", "b"]),
            EmbeddingBagConfig(name="tiny", num_embeddings=200, embedding_dim=64, feature_names=["c"]),
        ],
    )
    model.events = EmbeddingCollection(
        device=torch.device("meta"),
        tables=[EmbeddingConfig(name="events", num_embeddings=50_000, embedding_dim=32, feature_names=["e"])],
    )
    return model


def make_nothing() -> str:
    """A factory that returns something else than a module."""
    return "nothing"


def fail() -> nn.Module:
    """A factory that fails."""
    raise RuntimeError("no luck")


def leave() -> nn.Module:
    """A factory that ends the process as if all were well, as parsers of arguments do."""
    raise SystemExit(0)


def leave_with_1() -> nn.Module:
    """A factory that ends the process."""
    raise SystemExit(1)
