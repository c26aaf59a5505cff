"""A generation that is filled by updates of its own and then served: publishing without a snapshot."""

from __future__ import annotations

import threading
from collections.abc import Callable

from torchrec_turbossd.errors import ClosedError
from torchrec_turbossd.serving.updates import UpdateBatch
from torchrec_turbossd.tbe.successor import Successor


class GenerationBuilder:
    """Made by `TurboSSDInferenceModule.begin_generation`; filled by its `streaming_update(..., generation=...)`.

    It begins without rows: those that it is not given answer with the rule for rows never written. Rows that the live
    generation is updated with meanwhile are set here too and stay, unless their version is not newer than this one's.
    As a context manager it is aborted where it was not committed.
    """

    def __init__(
        self,
        successor: Successor,
        *,
        commit: Callable[[], None],
        discard: Callable[[], None],
        end: Callable[[], None],
    ) -> None:
        self._successor, self._commit, self._discard, self._end = successor, commit, discard, end
        self._lock = threading.Lock()
        self._ended = False

    def update(self, batch: UpdateBatch) -> None:
        """Set rows, checked already."""
        with self._lock:
            self._check_open()
            self._successor.put(batch)

    def commit(self) -> None:
        """Serve this generation from now on, as `load_snapshot` does a snapshot; lookups do not wait.

        Raises:
            ClosedError: it was committed or aborted before.
            StoreError: why it could not be; the module goes on serving what it served, and this one is gone.
        """
        with self._lock:
            self._check_open()
            try:
                self._commit()
            except BaseException:
                self._discard()
                raise
            finally:
                self._ended = True
                self._end()

    def abort(self) -> None:
        """Forget this generation. Aborting one that has ended is allowed."""
        with self._lock:
            if self._ended:
                return
            try:
                self._discard()
            finally:
                self._ended = True
                self._end()

    def _check_open(self) -> None:
        if self._ended:
            raise ClosedError("this generation was committed or aborted; begin another one")

    def __enter__(self) -> GenerationBuilder:
        return self

    def __exit__(self, *error: object) -> None:
        self.abort()


__all__ = ["GenerationBuilder"]
