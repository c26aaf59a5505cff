"""How long plans take to make, by tables, ranks and memory: `python -m benchmarks.planning`.

Models are made up, on the meta device, and nothing is allocated: ranks and memory exist on paper only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, ShardingOption, Topology

from benchmarks import machine
from torchrec_turbossd.errors import BudgetError
from torchrec_turbossd.planner import TURBO_SSD, turbo_ssd_planner
from torchrec_turbossd.planner.perf import TurboSSDPerfModel
from torchrec_turbossd.sharding import get_turbo_ssd_sharders

_ROOT = Path(__file__).absolute().parents[1]
_DIMS = (32, 64, 128)
_HOST = 8


@dataclass(frozen=True)
class Case:
    """What is planned; `share` is the fast memory of all ranks by the bytes of all tables."""

    tables: int
    ranks: int
    device: str
    share: float


@dataclass(frozen=True)
class Outcome:
    """What came of it; times in seconds, the rating in milliseconds, both before and after the caches got what was
    left over."""

    case: Case
    fast_gib_a_rank: float
    seconds: float
    cpu_seconds: float
    proposals: int
    fitting: int
    on_ssd: int | None
    rating: float | None
    rating_with_leftover: float | None
    error: str


class _Rated(TurboSSDPerfModel):
    """Keeps the best rating."""

    best: float | None = None

    def rate(self, plan: list[ShardingOption]) -> float:
        rating = super().rate(plan)
        self.best = rating if self.best is None else min(self.best, rating)
        return rating


class _Model(nn.Module):
    """`rows` are spread evenly over orders of magnitude, from a thousand to a hundred million."""

    def __init__(self, count: int, seed: int) -> None:
        super().__init__()
        draws = torch.rand(count, generator=torch.Generator().manual_seed(seed))
        self.tables = [
            EmbeddingBagConfig(
                name=f"t{n}", num_embeddings=rows, embedding_dim=_DIMS[n % len(_DIMS)], feature_names=[f"f{n}"]
            )
            for n, rows in enumerate((10 ** (3 + 5 * draws)).long().tolist())
        ]
        self.ebc = EmbeddingBagCollection(tables=self.tables, device=torch.device("meta"))

    @property
    def size(self) -> int:
        """Bytes of all tables."""
        return sum(4 * table.num_embeddings * table.embedding_dim for table in self.tables)


def measure(case: Case, batch: int, seed: int) -> Outcome:
    """Plan one case; `batch` is of all ranks together."""
    model = _Model(case.tables, seed)
    fast = int(case.share * model.size / case.ranks)
    caps = {"hbm_cap": fast, "ddr_cap": 128 << 30} if case.device == "cuda" else {"ddr_cap": fast}
    where = Topology(
        world_size=case.ranks,
        local_world_size=min(_HOST, case.ranks),
        compute_device=case.device,
        ssd_cap=4 << 40,
        **caps,
    )
    rated = _Rated(where)
    planner = turbo_ssd_planner(
        where,
        max(1, batch // case.ranks),
        {t.name: ParameterConstraints(pooling_factors=[1.0 + n * 7 % 20]) for n, t in enumerate(model.tables)},
        performance_model=rated,
        storage_reservation=FixedPercentageStorageReservation(0.0),
    )
    sharders: Any = get_turbo_ssd_sharders(ssd_directory=".")
    clock, cpu, plan, error = time.perf_counter(), time.process_time(), None, ""
    try:
        plan = planner.plan(model, sharders)
    except BudgetError as found:
        error = str(found)
    best = planner._best_plan if plan is not None else None
    return Outcome(
        case=case,
        fast_gib_a_rank=fast / 2**30,
        seconds=time.perf_counter() - clock,
        cpu_seconds=time.process_time() - cpu,
        proposals=planner._num_proposals,
        fitting=planner._num_plans,
        on_ssd=sum(option.compute_kernel == TURBO_SSD for option in best) if best else None,
        rating=rated.best if best else None,
        rating_with_leftover=TurboSSDPerfModel(where).rate(best) if best else None,
        error=error,
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planning", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tables", type=int, nargs="+", default=[100, 500], help="(100 500)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64], help="8 of a host (8 64)")
    parser.add_argument("--devices", nargs="+", choices=["cpu", "cuda"], default=["cuda", "cpu"])
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=[2.5, 0.5, 0.2, 0.001],
        help="fast memory of all ranks by bytes of all tables: all fit, some, few, none (2.5 0.5 0.2 0.001)",
    )
    parser.add_argument("--batch", type=int, default=32768, help="samples of all ranks together (32768)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=_ROOT / "bench-out" / "planning.json", help="(bench-out)")
    return parser.parse_args(arguments)


def shown(outcomes: Sequence[Outcome]) -> Table:
    """A line for each case."""
    table = Table(title="Planning")
    heads = ("tables", "ranks", "device", "memory/tables", "GiB/rank", "s", "CPU s", "proposals", "on SSD", "ms", "ms*")
    for head in heads:
        table.add_column(head, justify="left" if head == "device" else "right")
    for found in outcomes:
        case = found.case
        cells = (str(case.tables), str(case.ranks), case.device, f"{case.share:g}", f"{found.fast_gib_a_rank:.2f}")
        times = (f"{found.seconds:.1f}", f"{found.cpu_seconds:.1f}", f"{found.proposals}")
        ratings = (f"{each:,.2f}" if each is not None else "-" for each in (found.rating, found.rating_with_leftover))
        table.add_row(*cells, *times, "no plan" if found.on_ssd is None else str(found.on_ssd), *ratings)
    table.caption = "ms: the plan's rating when it was chosen; ms*: once caches got the memory left over"
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    asked = parse_arguments(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    # TorchRec sets up its logs and tables of hardware with the first plan.
    measure(Case(2, 2, "cpu", 2.5), asked.batch, asked.seed)
    before = machine.load()
    outcomes = []
    for count, ranks, device, share in itertools.product(asked.tables, asked.ranks, asked.devices, asked.shares):
        outcomes.append(measure(Case(count, ranks, device, share), asked.batch, asked.seed))
        print(f"{asdict(outcomes[-1])}", file=sys.stderr)
    Console(width=None if sys.stdout.isatty() else 120).print(shown(outcomes))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    whole = {
        "format": "torchrec_turbossd planning times",
        "version": 1,
        "commit": machine.commit(),
        "machine": machine.describe(asked.out.parent),
        "versions": machine.versions(),
        "load before": before,
        "load after": machine.load(),
        "batch of all ranks": asked.batch,
        "seed": asked.seed,
        "cases": [asdict(found) for found in outcomes],
    }
    asked.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(asked.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
