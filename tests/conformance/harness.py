"""Loads TorchRec's own tests from a checkout, and lets those written for GPUs run on a CPU.

TorchRec's wheels hold the harness (`torchrec.distributed.test_utils`) but not the tests; these come from a checkout of
its repository, found through `TURBOSSD_TORCHREC_TESTS`: the `torchrec/distributed` folder, which holds `tests/`.
"""

from __future__ import annotations

import functools
import importlib
import os
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch

DIRECTORY = "TURBOSSD_TORCHREC_TESTS"
SCRATCH = "TURBOSSD_CONFORMANCE_SCRATCH"
SHARE = "TURBOSSD_CONFORMANCE_SHARE"
STOCK = "TURBOSSD_CONFORMANCE_STOCK"

ROOT = "torchrec.distributed"
_PARTS = ("", "train_pipeline", "model_tracker", "composable")

_MOVED = (
    ("test_utils.test_model", "TestEBCSharder", "test_utils.emb_sharder", "TestEBCSharder"),
    ("test_utils.test_model", "TestEBCSharderMCH", "test_utils.emb_sharder", "TestEBCSharderMCH"),
    ("test_utils.test_model_parallel", "ModelParallelBase", "test_utils.test_model_parallel", "_ModelParallelBase"),
    ("model_tracker.types", "ModelTrackerConfig", "model_tracker.types", "DeltaTrackerConfig"),
)
"""Names that tests of one release look for in one module, and where another release has them."""


def checkout_directory() -> Path | None:
    """The folder that holds TorchRec's `tests/`, when the environment names one."""
    named = os.environ.get(DIRECTORY)
    return Path(named).resolve() if named else None


def why_not(directory: Path | None) -> str | None:
    """Why the tests cannot be run; None when they can."""
    if directory is None:
        return f"{DIRECTORY} is not set: it names the torchrec/distributed folder of a TorchRec checkout"
    if not (directory / "tests" / "test_sequence_model.py").is_file():
        return f"{directory} holds no tests/test_sequence_model.py: name the torchrec/distributed folder of a checkout"
    return None


@functools.cache
def load(name: str) -> ModuleType:
    """Import a test module (a name within `torchrec.distributed`) as if this machine had eight GPUs.

    So its decorators skip nothing. What runs later asks torch again, and finds the devices there are.
    """
    with (
        mock.patch.object(torch.cuda, "device_count", return_value=8),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
    ):
        return importlib.import_module(f"{ROOT}.{name}")


@functools.cache
def add_tests(directory: Path) -> None:
    """Make `torchrec.distributed.tests` and its like importable; what the wheel has still comes from the wheel."""
    for part in _PARTS:
        package = importlib.import_module(".".join(filter(None, (ROOT, part))))
        package.__path__.append(str(directory / part))
    for module, name, source, other in _MOVED:
        home = load(module)
        if hasattr(home, name):
            continue
        try:
            setattr(home, name, getattr(load(source), other))
        except (ImportError, AttributeError):
            # What needs the name says so when it is loaded.
            continue


_found = checkout_directory()
if _found is not None and why_not(_found) is None:
    # At import: the process of a rank meets pickled names of the tests before anything else.
    add_tests(_found)


__all__ = ["DIRECTORY", "ROOT", "SCRATCH", "SHARE", "STOCK", "add_tests", "checkout_directory", "load", "why_not"]
