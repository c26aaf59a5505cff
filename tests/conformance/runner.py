"""Runs the cases one after the other and says of each: passed, refused as it must be, failed, or does not apply."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import os
import re
import signal
import time
import traceback
import unittest
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import hypothesis
import torch

from tests.conformance.cases import GROUPS, Group
from tests.conformance.harness import SCRATCH, STOCK
from tests.conformance.on_cpu import NOT_POSSIBLE, RAISED
from tests.conformance.sharders import ROWS

_REJECTED = re.compile(r"hypothesis\.errors\.(Unsatisfi\w+)")
"""No example is left: every one was rejected."""


@dataclass(frozen=True)
class Outcome:
    """What one case did.

    verdict: "passed", "failed" or "does not apply". note: why, in a line. details: a traceback, when it failed.
    """

    case: str
    verdict: str
    seconds: float
    note: str = ""
    details: str = ""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """examples: most examples that hypothesis draws for a test. limit_s: for one case. ours: with sharders of ours;
    else with TorchRec's."""

    examples: int = 3
    limit_s: int = 120
    ours: bool = True


class _Result(unittest.TestResult):
    """Keeps the first thing that went wrong, or the reason of a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.fault: str | None = None
        self.lines: list[str] = []
        self.skip_reason: str | None = None

    def addSkip(self, test: Any, reason: str) -> None:
        super().addSkip(test, reason)
        self.skip_reason = reason

    def _keep(self, error: Any) -> None:
        if self.fault is None:
            self.fault, self.lines = "".join(traceback.format_exception(*error)), _lines(error[1])

    def addError(self, test: Any, err: Any) -> None:
        super().addError(test, err)
        self._keep(err)

    def addFailure(self, test: Any, err: Any) -> None:
        super().addFailure(test, err)
        self._keep(err)


def matching(name: str, notes: Mapping[str, str]) -> str | None:
    """The note of the first pattern that fits a test's name."""
    return next((note for pattern, note in notes.items() if fnmatch.fnmatch(name, pattern)), None)


def tests_of(group: Group) -> list[str]:
    """Names of the tests of a group; imports TorchRec's module."""
    names = unittest.TestLoader().getTestCaseNames(group.make())
    return [name for name in names if not group.only or name in group.only]


def run(only: str = "", settings: Settings | None = None) -> Iterator[Outcome]:
    """Outcomes of the cases whose `group::test` holds `only`, as they come."""
    settings = settings or Settings()
    for group in GROUPS:
        try:
            made = group.make()
            names = [name for name in tests_of(group) if only in f"{group.name}::{name}"]
        except (ImportError, AttributeError) as error:
            if only in group.name:
                yield Outcome(group.name, "does not apply", 0.0, f"cannot be loaded here: {error}")
            continue
        for name in names:
            yield _run_one(group, made, name, settings)


def _run_one(group: Group, made: type[unittest.TestCase], name: str, settings: Settings) -> Outcome:
    case = f"{group.name}::{name}"
    reason = matching(name, group.not_here)
    if reason is None and not torch.cuda.is_available():
        reason = matching(name, group.needs_cuda)
    if reason is not None:
        return Outcome(case, "does not apply", 0.0, reason)
    _fewer_examples(made, name, settings.examples)
    began, before = time.monotonic(), _modules_on_ssd()
    result = _result_of(made(name), settings.limit_s)
    wanted = matching(name, group.refused) if settings.ours else None
    outcome = _judge(case, result, time.monotonic() - began, wanted)
    if outcome.verdict == "passed" and settings.ours and _modules_on_ssd() == before:
        return dataclasses.replace(
            outcome, verdict="does not apply", note="no table of it is sharded but data-parallel"
        )
    if outcome.verdict == "failed" and outcome.details and settings.ours:
        return _unless_stock_fails_too(outcome, result.lines, _stock_result(made(name), settings.limit_s))
    return outcome


def _modules_on_ssd() -> int:
    """How many sharded modules with tables on SSD there have been, in all ranks."""
    return sum(name.startswith(ROWS) for name in os.listdir(os.environ[SCRATCH]))


def _result_of(test: unittest.TestCase, limit_s: int) -> _Result:
    result = _Result()
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(limit_s)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            test.run(result)
    except _TooLong:
        result.fault = f"the case took longer than {limit_s} s"
        result.lines = [result.fault]
        with contextlib.suppress(Exception):
            test.tearDown()
        test.doCleanups()
    finally:
        signal.alarm(0)
    return result


def _stock_result(test: unittest.TestCase, limit_s: int) -> _Result:
    os.environ[STOCK] = "1"
    try:
        return _result_of(test, limit_s)
    finally:
        os.environ[STOCK] = ""


def _unless_stock_fails_too(outcome: Outcome, lines: list[str], stock: _Result) -> Outcome:
    """A case that fails in the same way with TorchRec's own sharders says nothing against ours."""
    if stock.fault is None:
        return outcome
    theirs, details = stock.lines[0], f"{outcome.details}\n--- TorchRec's own sharders:\n{stock.fault}"
    outcome = dataclasses.replace(outcome, details=details)
    if any("not close" in line for line in [*lines, *stock.lines]):
        if lines == stock.lines:
            note = f"the numbers of TorchRec's own sharders, to the last digit; they fail too: {theirs}"
            return dataclasses.replace(outcome, verdict="passed", note=note)
    elif _kinds(lines) <= _kinds(stock.lines):
        note = f"TorchRec's own sharders fail too: {theirs}"
        return dataclasses.replace(outcome, verdict="does not apply", note=note)
    return dataclasses.replace(outcome, note=f"{outcome.note} (TorchRec's own sharders: {theirs})")


def _kinds(lines: list[str]) -> set[str]:
    """Error lines whatever their numbers, but for those of ranks that another rank's end took along."""
    return {re.sub(r"\d+", "", line) for line in lines if "Connection closed" not in line}


def _judge(case: str, result: _Result, seconds: float, wanted: str | None) -> Outcome:
    if result.skip_reason is not None and result.fault is None:
        return Outcome(case, "does not apply", seconds, result.skip_reason)
    if result.fault is not None and _REJECTED.search(result.fault):
        return Outcome(case, "does not apply", seconds, NOT_POSSIBLE)
    if wanted is not None:
        if result.fault is None:
            return Outcome(case, "failed", seconds, f"was to be refused ({wanted}), but ran")
        if "UnsupportedError" in result.fault and wanted in result.fault:
            return Outcome(case, "passed", seconds, f"refused: {wanted}")
    if result.fault is None:
        return Outcome(case, "passed", seconds)
    return Outcome(case, "failed", seconds, result.lines[0], result.fault)


def _lines(error: BaseException) -> list[str]:
    """What went wrong, in a line; in the ranks, a line for each kind of error, where it was there."""
    inner = getattr(error, "exceptions", None)
    if inner:
        return _lines(inner[0])
    raised = re.findall(f"{RAISED}(.*)", str(error)) or [traceback.format_exception_only(error)[0].strip()]
    apart = re.search(r"Greatest absolute difference: .*", str(error))
    found = {(line.splitlines() or [type(error).__name__])[0][:300] for line in raised}
    return sorted(f"{line} {apart.group()}" if apart else line for line in found)


class _TooLong(KeyboardInterrupt):
    """Of this kind, since hypothesis would take others for a failing example, and run it again."""


def _too_long(*_: Any) -> None:
    raise _TooLong


def _fewer_examples(made: type[unittest.TestCase], name: str, most: int) -> None:
    test = getattr(made, name)
    given = getattr(test, "_hypothesis_internal_use_settings", None)
    if given is not None:
        test._hypothesis_internal_use_settings = hypothesis.settings(
            given,
            max_examples=most,
            derandomize=True,
            database=None,
            deadline=None,
            verbosity=hypothesis.Verbosity.normal,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        )


__all__ = ["Outcome", "Settings", "matching", "run", "tests_of"]
