"""Hit rates of the eviction policies on synthetic streams and traces, each against LRU with as many slots."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.context import Context
from benchmarks.figures import Figure, Goal, SkipRow
from benchmarks.streams import Ints, Zipf, drifting, read_trace
from torchrec_turbossd.cache import DEFAULT_POLICY, POLICIES, SlotCache

GOAL = Goal(at_most=False, reach=1.0)
SHARES = (0.01, 0.05, 0.10, 0.25)
_LARGEST_BATCH = 1024


def run(context: Context) -> Iterator[Figure]:
    """The default policy on every stream at every share of slots; the others' rates are in the note."""
    for name, ids in _streams(context):
        if isinstance(ids, SkipRow):
            yield Figure(row="policies", case=name, skipped=str(ids))
            continue
        rows = int(ids.max()) + 1
        for share in SHARES:
            slots = max(1, round(rows * share))
            rates = {policy: hit_rate(policy, ids, rows, slots) for policy in POLICIES}
            best = static_optimum(ids, rows, slots)
            others = ", ".join(f"{p} {r:.4f}" for p, r in rates.items() if p not in (DEFAULT_POLICY, "lru"))
            yield Figure(
                row="policies",
                case=f"{DEFAULT_POLICY}, {name}, {ids.size:,} lookups of {rows:,} rows, slots for {share:.0%}",
                unit="hit rate",
                ours=rates[DEFAULT_POLICY],
                peer="lru",
                theirs=rates["lru"],
                goal=GOAL,
                note=f"{others}; the rows asked for most, known in hindsight: {best:.4f}".removeprefix("; "),
                details={"lookups": ids.size, "rows": rows, "slots": slots, "static optimum": best, **rates},
            )


def _streams(context: Context) -> Iterator[tuple[str, Ints | SkipRow]]:
    rows, count = context.pick(100_000, 5_000), context.pick(600_000, 12_000)
    for alpha in (0.8, 1.05, 1.2):
        yield f"Zipf {alpha}", Zipf(rows, alpha, context.seed).draw(count)
    yield "Zipf 1.05 that drifts", drifting(rows, 1.05, context.seed, count)
    for path in context.traces:
        try:
            yield path.name, read_trace(path)
        except SkipRow as reason:
            yield path.name, reason


def hit_rate(policy: str, ids: Ints, rows: int, slots: int) -> float:
    """Share of lookups answered from slots that start empty, in batches of half the slots and at most 1024.

    As everywhere, a row that a batch asks for several times and that is absent is one miss.
    """
    cache = SlotCache([rows], [slots], policy=policy)
    missed = 0
    for batch in torch.split(torch.from_numpy(ids), max(1, min(_LARGEST_BATCH, slots // 2))):
        found = cache.lookup(batch)
        absent = torch.unique(batch[found == 0])
        if absent.numel():
            here = found[found > 0].to(torch.int64)
            # The batch's own rows must not make room for each other.
            cache.pin(here, 1)
            cache.commit(cache.reserve(0, absent))
            cache.pin(here, -1)
        # As serving and training do: what the batch brought in was not read before.
        cache.touch(0, found)
        missed += absent.numel()
    return 1 - missed / ids.size


def static_optimum(ids: Ints, rows: int, slots: int) -> float:
    """Share of lookups of the `slots` rows that are asked for most, each missed once."""
    counts = np.sort(np.bincount(ids, minlength=rows))[::-1][:slots]
    return float((counts.sum() - np.count_nonzero(counts)) / ids.size)


__all__ = ["hit_rate", "run", "static_optimum"]
