"""A day of clicks on disk: what a generator or a file's reader writes once, and every rank maps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torchrec import KeyedJaggedTensor
from torchrec.datasets.utils import Batch

DENSE, CATEGORICAL = 13, 26
"""Features of Criteo's data."""

FEATURES = tuple(f"C{n:02}" for n in range(1, CATEGORICAL + 1))
"""Categorical features; each has a table of its own, of the same name."""

Dense = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]
Labels = npt.NDArray[np.uint8]

_PARTS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "dense": (np.float32, (DENSE,)),
    "ids": (np.int32, (CATEGORICAL,)),
    "labels": (np.uint8, ()),
}


@dataclass(frozen=True, kw_only=True)
class Day:
    """Samples in the order of time.

    Attributes:
        dense: [N, 13] float32, on a logarithmic scale.
        ids: [N, 26] int32, the row of each feature's table.
        labels: [N] uint8, 1 for a click.
        rows: of each feature's table.
        name: what it is, the same for the same samples.
        unfolded: features whose tables have a row for everything that is asked for; empty where that is not known.
    """

    dense: Dense
    ids: Ids
    labels: Labels
    rows: tuple[int, ...]
    name: str
    unfolded: tuple[int, ...] = ()

    def __len__(self) -> int:
        return int(self.labels.size)

    @classmethod
    def map(cls, directory: Path) -> Day:
        """Map what a `DayWriter` wrote, to be read."""
        told = json.loads((directory / "day.json").read_text())
        parts = {
            part: np.memmap(directory / part, dtype=dtype, mode="r", shape=(told["samples"], *shape))
            for part, (dtype, shape) in _PARTS.items()
        }
        return cls(**parts, rows=tuple(told["rows"]), name=told["name"], unfolded=tuple(told["unfolded"]))

    def batch(self, first: int, size: int) -> Batch:
        """Samples `first` to `first + size` as TorchRec's DLRM takes them, on the CPU."""
        chosen = slice(first, first + size)
        return Batch(
            dense_features=torch.from_numpy(np.array(self.dense[chosen])),
            sparse_features=KeyedJaggedTensor(
                keys=list(FEATURES),
                values=torch.from_numpy(self.ids[chosen].T.astype(np.int64, order="C").reshape(-1)),
                lengths=torch.ones(CATEGORICAL * size, dtype=torch.int64),
            ),
            labels=torch.from_numpy(self.labels[chosen].astype(np.float32)),
        )


class DayWriter:
    """Writes a day to a folder, block after block; there is no day before `finish`."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self.directory = directory
        self.samples = 0
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> DayWriter:
        for part in _PARTS:
            self._files[part] = (self.directory / part).open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()

    def append(self, dense: Dense, ids: Ids, labels: Labels) -> None:
        """The next samples, as `Day` has them."""
        for part, values in (("dense", dense), ("ids", ids), ("labels", labels)):
            self._files[part].write(np.ascontiguousarray(values, dtype=_PARTS[part][0]).tobytes())
        self.samples += int(labels.size)

    def written_ids(self) -> Ids:
        """All ids so far, [N, 26] int32, to be changed in place: for ids that depend on all of them."""
        self._files["ids"].flush()
        return np.memmap(self.directory / "ids", dtype=np.int32, mode="r+", shape=(self.samples, CATEGORICAL))

    def finish(self, rows: tuple[int, ...], name: str, unfolded: tuple[int, ...] = ()) -> None:
        """Note what the samples are."""
        for file in self._files.values():
            file.flush()
        told = {"samples": self.samples, "rows": rows, "name": name, "unfolded": unfolded}
        (self.directory / "day.json").write_text(json.dumps(told))


__all__ = ["CATEGORICAL", "DENSE", "FEATURES", "Day", "DayWriter", "Dense", "Ids", "Labels"]
