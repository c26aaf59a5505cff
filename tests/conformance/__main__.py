"""Runs TorchRec's own tests against sharders of ours: `python -m tests.conformance --torchrec-tests DIR`."""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from tests.conformance.runner import Outcome


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--torchrec-tests", type=Path, help="the torchrec/distributed folder of a TorchRec checkout")
    parser.add_argument("--only", default="", help="only cases whose name holds this")
    parser.add_argument("--list", action="store_true", help="list the cases, run none")
    parser.add_argument("--stock", action="store_true", help="TorchRec's own sharders: what passes without ours")
    parser.add_argument("--share", type=float, default=0.5, help="share of each shard's rows in slots (%(default)s)")
    parser.add_argument("--examples", type=int, default=3, help="most examples for a hypothesis test (%(default)s)")
    parser.add_argument("--limit", type=int, default=120, help="seconds for one case (%(default)s)")
    parser.add_argument("--details", type=Path, help="file for tracebacks")
    parser.add_argument("--log", type=Path, default=os.devnull, help="file for what the ranks print")
    return parser.parse_args()


def main() -> int:
    """Run and print; 1 when a case failed, 2 when nothing could be run."""
    arguments = _arguments()
    # Before anything of the harness is imported: its modules read these.
    if arguments.torchrec_tests:
        os.environ["TURBOSSD_TORCHREC_TESTS"] = os.fspath(arguments.torchrec_tests.resolve())
    os.environ["TURBOSSD_CONFORMANCE_SHARE"] = str(arguments.share)
    os.environ["TURBOSSD_CONFORMANCE_STOCK"] = "1" if arguments.stock else ""
    from tests.conformance import harness

    reason = harness.why_not(harness.checkout_directory())
    if reason is not None:
        print(f"nothing to run: {reason}", file=sys.stderr)
        return 2
    scratch = tempfile.mkdtemp(prefix="turbossd-conformance-")
    os.environ[harness.SCRATCH] = scratch
    try:
        return _list() if arguments.list else _run(arguments)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _list() -> int:
    from tests.conformance.cases import ELSEWHERE, GROUPS
    from tests.conformance.runner import tests_of

    for group in GROUPS:
        try:
            for name in tests_of(group):
                print(f"{group.name}::{name}")
        except (ImportError, AttributeError) as error:
            print(f"{group.name}: cannot be loaded here: {error}")
    for name, reason in ELSEWHERE.items():
        print(f"{name}: does not apply: {reason}")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    import torch
    import torchrec

    from tests.conformance.runner import Settings, run

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    # Ranks are forked from one process that has done the slow imports.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.conformance.cases"])
    settings = Settings(examples=arguments.examples, limit_s=arguments.limit, ours=not arguments.stock)
    print(f"TorchRec {torchrec.__version__}, torch {torch.__version__}", flush=True)
    with _ranks_print_to(arguments.log) as table:
        return _print_outcomes(run(arguments.only, settings), arguments, table)


@contextlib.contextmanager
def _ranks_print_to(log: Path) -> Iterator[TextIO]:
    """Send what this process and the ranks print to a file; yields where the table goes."""
    kept = os.dup(1), os.dup(2)
    with open(log, "a") as target, os.fdopen(os.dup(1), "w") as table:
        os.dup2(target.fileno(), 1)
        os.dup2(target.fileno(), 2)
        try:
            yield table
        finally:
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)


def _print_outcomes(outcomes: Iterable[Outcome], arguments: argparse.Namespace, table: TextIO) -> int:
    from tests.conformance.cases import ELSEWHERE

    verdicts: Counter[str] = Counter()
    for outcome in outcomes:
        verdicts[outcome.verdict] += 1
        note = f": {outcome.note}" if outcome.note else ""
        print(f"{outcome.verdict:14} {outcome.seconds:6.1f} s  {outcome.case}{note}", flush=True, file=table)
        if outcome.details and arguments.details:
            with arguments.details.open("a") as details:
                details.write(f"=== {outcome.case}\n{outcome.details}\n")
    if not arguments.only:
        for name, reason in ELSEWHERE.items():
            print(f"{'does not apply':14} {'':8}  {name}: {reason}", file=table)
    print(
        ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items())) or "no case of that name",
        file=table,
    )
    return 1 if verdicts["failed"] or not verdicts else 0


if __name__ == "__main__":
    raise SystemExit(main())
