"""The gate that counts calls in flight."""

from __future__ import annotations

import threading

import pytest

from torchrec_turbossd.errors import ClosedError
from torchrec_turbossd.store.gate import Gate


class Visitor(threading.Thread):
    """Stays in a call until told to leave."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate
        self.entered, self.leave = threading.Event(), threading.Event()
        self.start()

    def run(self) -> None:
        with self.gate.call():
            self.entered.set()
            self.leave.wait(20)


def closer_of(gate: Gate, seen: list[bool]) -> threading.Thread:
    def close() -> None:
        with gate.closing() as first:
            seen.append(first)

    thread = threading.Thread(target=close)
    thread.start()
    return thread


def test_calls_run_side_by_side() -> None:
    gate = Gate("it")
    visitors = [Visitor(gate), Visitor(gate)]
    assert all(visitor.entered.wait(20) for visitor in visitors)
    for visitor in visitors:
        visitor.leave.set()
        visitor.join(20)


def test_closing_waits_for_calls_and_keeps_new_ones_waiting() -> None:
    gate, seen = Gate("it"), []
    first = Visitor(gate)
    assert first.entered.wait(20)
    closer = closer_of(gate, seen)
    closer.join(0.05)
    late: list[str] = []

    def call_late() -> None:
        try:
            with gate.call():
                late.append("entered")
        except ClosedError as error:
            late.append(str(error))

    caller = threading.Thread(target=call_late)
    caller.start()
    caller.join(0.05)
    assert seen == [] and late == []
    first.leave.set()
    closer.join(20)
    caller.join(20)
    assert seen == [True] and late == ["it is closed; open it again to use it"]


def test_of_two_that_close_one_is_first() -> None:
    gate, seen = Gate("it"), []
    first = Visitor(gate)
    assert first.entered.wait(20)
    closers = [closer_of(gate, seen) for _ in range(3)]
    first.leave.set()
    for closer in closers:
        closer.join(20)
    assert sorted(seen) == [False, False, True]


def test_a_closing_that_fails_leaves_it_open() -> None:
    gate = Gate("it")
    with pytest.raises(ZeroDivisionError), gate.closing():
        raise ZeroDivisionError
    with gate.call():
        pass
    with gate.alone():
        pass


def test_alone_is_alone_and_refused_after_closing() -> None:
    gate = Gate("it")
    with gate.alone():
        visitor = Visitor(gate)
        assert not visitor.entered.wait(0.05)
    assert visitor.entered.wait(20)
    visitor.leave.set()
    with gate.closing() as first:
        assert first
    for _ in range(2):
        with pytest.raises(ClosedError), gate.alone():
            pytest.fail("it is closed")
