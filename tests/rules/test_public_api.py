"""The public surface is a deliberate act: every `__all__` is true and sorted, the top-level one is written here."""

from __future__ import annotations

import importlib
import re

import pytest

import torchrec_turbossd
from tests.rules.tree import package_modules, packages

TOP_LEVEL = [
    "AccessProfile",
    "BudgetItem",
    "HitRateCurve",
    "TurboSSDInferenceModule",
    "__version__",
    "split_budget",
]
"""What `import torchrec_turbossd` offers. Names are added here on purpose, and removed in a major release only."""


def sort_key(name: str) -> tuple[int, list[tuple[int, str]]]:
    """Constants, then classes, then the rest, each in natural order: as ruff's RUF022 sorts."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2
    pieces = re.findall(r"\d+|\D+", name)
    return kind, [(int(p), "") if p.isdigit() else (-1, p) for p in pieces]


def public_modules() -> list[str]:
    """Every module of the package but programs, which importing would run."""
    return sorted(name for name in package_modules() if not name.endswith("__main__"))


def test_top_level_names() -> None:
    assert sorted(torchrec_turbossd.__all__) == sorted(TOP_LEVEL)


@pytest.mark.parametrize("name", public_modules())
def test_all_is_sorted_and_importable(name: str) -> None:
    module = importlib.import_module(name)
    names = getattr(module, "__all__", None)
    if names is None:
        assert name not in packages(), f"{name} needs an __all__"
        return
    assert list(names) == sorted(set(names), key=sort_key)
    missing = [n for n in names if not hasattr(module, n)]
    assert not missing, f"{name}.__all__ names {missing}, which it does not hold"


def test_sort_key_is_ruffs() -> None:
    names = ["MAX_SLOTS", "Int4", "Int16", "TableSpec", "__version__", "find_table"]
    assert sorted(reversed(names), key=sort_key) == names
