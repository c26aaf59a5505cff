"""A gate counts the calls in flight on an object, so that closing it waits for them and refuses later ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torchrec_turbossd.errors import ClosedError


class Gate:
    """Many calls at once, or one that is alone, or closed.

    Args:
        name: what is behind the gate, for the message of `ClosedError`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._calls = 0
        self._alone = False
        self._closed = False

    @contextmanager
    def call(self) -> Iterator[None]:
        """One of many calls in flight; raises `ClosedError` after closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._alone)
            self._raise_if_closed()
            self._calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait for the calls in flight and keep new ones waiting; raises `ClosedError` after closing."""
        with self._changed:
            self._take_alone()
            self._raise_if_closed(release=True)
        try:
            yield
        finally:
            self._leave_alone()

    @contextmanager
    def closing(self) -> Iterator[bool]:
        """Alone, and closed when the body ends; False when it was closed before. A body that raises leaves it open."""
        with self._changed:
            self._take_alone()
            first = not self._closed
        try:
            yield first
            self._closed = True
        finally:
            self._leave_alone()

    def shut(self) -> None:
        """Refuse later calls, without waiting for those in flight."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _take_alone(self) -> None:
        self._changed.wait_for(lambda: not self._alone)
        self._alone = True
        try:
            self._changed.wait_for(lambda: not self._calls)
        except BaseException:
            self._alone = False
            self._changed.notify_all()
            raise

    def _leave_alone(self) -> None:
        with self._changed:
            self._alone = False
            self._changed.notify_all()

    def _raise_if_closed(self, release: bool = False) -> None:
        if self._closed:
            if release:
                self._alone = False
                self._changed.notify_all()
            raise ClosedError(f"{self._name} is closed; open it again to use it")


__all__ = ["Gate"]
