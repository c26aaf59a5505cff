"""TorchRec's own tests pass with tables on SSD; each group in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conformance.cases import GROUPS
from tests.conformance.harness import checkout_directory, why_not

ROOT = Path(__file__).resolve().parents[2]
REASON = why_not(checkout_directory())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("name", [group.name for group in GROUPS])
def test_group(name: str) -> None:
    command = [sys.executable, "-m", "tests.conformance", "--only", f"{name}::"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=880)
    failed = [line for line in run.stdout.splitlines() if line.startswith("failed")]
    assert run.returncode == 0, "\n".join(failed) or f"{run.stdout[-2000:]}\n{run.stderr[-2000:]}"
