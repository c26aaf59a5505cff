"""A generation that is open, and one on its way to be served, as far as it has come."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torchrec_turbossd.errors import StoreError
from torchrec_turbossd.serving.carried import CarriedUpdates
from torchrec_turbossd.serving.generations import GenerationInfo
from torchrec_turbossd.store.layered import LayeredRowStore
from torchrec_turbossd.tbe.successor import Successor


@dataclass
class OpenGeneration:
    """One version of the rows, open."""

    folder: Path
    info: GenerationInfo
    store: LayeredRowStore

    def close(self) -> None:
        self.store.close()


@dataclass
class Following:
    """A generation on its way to be served, as far as it has come."""

    carried: CarriedUpdates
    folder: Path | None = None
    generation: OpenGeneration | None = None
    successor: Successor | None = None

    def begin(self, folder: Path) -> Path:
        """It lies in `folder`."""
        self.folder = folder
        return folder

    @property
    def open_folder(self) -> Path:
        if self.folder is None:
            raise StoreError("this generation has no folder yet")
        return self.folder

    @property
    def open_generation(self) -> OpenGeneration:
        if self.generation is None:
            raise StoreError("this generation is not open yet")
        return self.generation

    @property
    def open_successor(self) -> Successor:
        if self.successor is None:
            raise StoreError("this generation has no slots yet")
        return self.successor


__all__ = ["Following", "OpenGeneration"]
