"""Updates that arrive while another generation is made, brought to that one as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torchrec_turbossd.errors import StoreError
from torchrec_turbossd.serving.updates import UpdateBatch
from torchrec_turbossd.tbe.successor import Successor


class CarriedUpdates:
    """The caller holds the module's updating lock in every method.

    Args:
        version: the generation's; updates that are not newer are in it already.
    """

    def __init__(self, version: int) -> None:
        self.version = self.newest = version
        self.failure: StoreError | None = None
        self._successor: Successor | None = None
        self._waiting: list[UpdateBatch] = []

    @contextmanager
    def carrying(self, batch: UpdateBatch, version: int | None) -> Iterator[None]:
        """Carry an update that the body gives to the live generation. A failure is the load's, not the update's."""
        try:
            yield
        except Exception:
            raise
        except BaseException:
            self.failure = StoreError("an update was interrupted while this generation was made; load it again")
            raise
        if version is not None and version <= self.version:
            return
        self.newest = max(self.newest, version or 0)
        if self._successor is None:
            self._waiting.append(batch)
        elif self.failure is None:
            try:
                self._successor.carry(batch)
            except StoreError as error:
                self.failure = error
            except Exception as error:
                self.failure = StoreError(f"an update could not be brought to the new generation: {error!r}; try again")

    def attach(self, successor: Successor) -> None:
        """The new generation is open: it takes what has waited, and from now on every update at once."""
        self._successor = successor
        while self._waiting:
            successor.carry(self._waiting.pop(0))

    def raise_failure(self) -> None:
        """Raise what kept an update from being carried."""
        if self.failure is not None:
            raise self.failure


__all__ = ["CarriedUpdates"]
