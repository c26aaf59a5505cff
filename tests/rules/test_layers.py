"""Layers import downwards only, without cycles, and each foreign library has its place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rules.tree import PACKAGE, Import, imports_of, package_modules

LAYERS = (
    ("errors", "tables", "rows", "metrics"),
    ("store", "cache", "sizing"),
    ("tbe", "snapshot", "delta"),
    ("serving", "planner", "sharding"),
    ("cli",),
)
"""Bottom first. A part may import those of lower layers and itself."""

WITHIN_A_LAYER = {
    ("tables", "errors"),
    ("rows", "errors"),
    ("rows", "tables"),
    ("metrics", "errors"),
    ("metrics", "tables"),
    ("sharding", "planner"),
    ("sizing", "cache"),
}
"""(importer, imported) of one layer."""

HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}

PLACES = {
    "rocksdict": ("store.rocks", "store.rocks_settings"),
    "torchrec.distributed": ("planner", "sharding", "cli"),
}
"""Foreign module -> the only parts or modules that import it."""

MODULES = package_modules()


def part_of(module: str) -> str:
    """The first name below the package; empty for the package's own `__init__`."""
    return module.split(".")[1] if "." in module else ""


def is_within(module: str, outer: str) -> bool:
    return module == outer or module.startswith(outer + ".")


def layer_fault(importer: str, found: Import, modules: dict[str, Path]) -> str | None:
    """Why an import breaks the layers, or None."""
    target = found.target(modules)
    if not is_within(target, PACKAGE):
        return "is relative" if target.startswith(".") else None
    source, wanted = part_of(importer), part_of(target)
    if source == wanted or not source:
        return None
    if not wanted:
        return None if found.name == "__version__" else "takes from the package's own __init__"
    if HEIGHT[wanted] < HEIGHT[source] or (source, wanted) in WITHIN_A_LAYER:
        return None
    return f"reaches up or sideways from {source} to {wanted}"


def place_fault(importer: str, found: Import) -> str | None:
    """Why an import of a foreign module is out of its place, or None."""
    dotted = f"{found.module}.{found.name}"
    for foreign, places in PLACES.items():
        allowed = any(is_within(importer, f"{PACKAGE}.{place}") for place in places)
        if is_within(dotted, foreign) and not allowed:
            return f"imports {foreign}, which only {' and '.join(places)} may"
    return None


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """The first cycle found, as the names along it with the first one repeated at the end."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for following in sorted(graph.get(node, ())):
            cycle = walk(following, [*path, node])
            if cycle:
                return cycle
        done.add(node)
        return None

    cycles: Iterator[list[str] | None] = (walk(node, []) for node in sorted(graph))
    return next((cycle for cycle in cycles if cycle), None)


def test_every_part_has_a_layer() -> None:
    unknown = {part_of(m) for m in MODULES} - set(HEIGHT) - {""}
    assert not unknown, f"put {sorted(unknown)} into LAYERS"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_stay_in_their_layers(module: str) -> None:
    found = imports_of(MODULES[module].read_text(encoding="utf-8"))
    faults = [
        f"line {i.line}: {i.module} {i.name or ''} {fault}"
        for i in found
        for fault in (layer_fault(module, i, MODULES), place_fault(module, i))
        if fault
    ]
    assert not faults, "\n".join(faults)


def test_no_import_cycles() -> None:
    graph = {
        module: {i.target(MODULES) for i in imports_of(path.read_text(encoding="utf-8")) if i.at_import} & set(MODULES)
        for module, path in MODULES.items()
    }
    cycle = find_cycle(graph)
    assert cycle is None, " -> ".join(cycle or [])


@pytest.mark.parametrize(
    ("importer", "source", "part"),
    [
        ("store.rocks", "from torchrec_turbossd.tbe import X", "reaches up"),
        ("cache.lru", "import torchrec_turbossd.store.contract", "sideways"),
        ("planner.estimator", "from torchrec_turbossd import sharding", "sideways"),
        ("errors", "from torchrec_turbossd.tables import TableSpec", "sideways"),
        ("tbe.remap", "def f():\n    from torchrec_turbossd.serving import X", "reaches up"),
        ("tbe.remap", "from torchrec_turbossd import TurboSSDInferenceModule", "own __init__"),
        ("tbe.remap", "from .layout import X", "relative"),
        ("store.memory", "import rocksdict", "store.rocks"),
        ("serving.module", "from torchrec.distributed.types import X", "planner and sharding"),
        ("serving.module", "from torchrec import distributed", "planner and sharding"),
    ],
)
def test_a_planted_fault_is_found(importer: str, source: str, part: str) -> None:
    modules = dict.fromkeys((f"{PACKAGE}.{p}" for p in HEIGHT), Path())
    (found,) = imports_of(source)
    name = f"{PACKAGE}.{importer}"
    assert part in (layer_fault(name, found, modules) or place_fault(name, found) or "")


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("sharding.lookup", "from torchrec_turbossd.planner import TURBO_SSD"),
        ("sharding.lookup", "from torchrec.distributed.types import X"),
        ("store.rocks", "from rocksdict import Rdict"),
        ("cli.plan", "from torchrec_turbossd import __version__, serving"),
        ("tables", "from torchrec_turbossd.errors import ConfigError"),
    ],
)
def test_downward_imports_pass(importer: str, source: str) -> None:
    modules = dict.fromkeys((f"{PACKAGE}.{p}" for p in HEIGHT), Path())
    name = f"{PACKAGE}.{importer}"
    assert [layer_fault(name, i, modules) or place_fault(name, i) for i in imports_of(source)].count(None) >= 1
    assert not any(layer_fault(name, i, modules) or place_fault(name, i) for i in imports_of(source))


def test_a_planted_cycle_is_found() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_imports_that_run_later_make_no_cycle() -> None:
    source = "if TYPE_CHECKING:\n    import a\ndef f():\n    import b\nif True:\n    import c\n"
    assert [(i.module, i.at_import) for i in imports_of(source)] == [("a", False), ("b", False), ("c", True)]
