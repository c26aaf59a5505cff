"""Memory for a 90 % hit rate: on paper over 1.6 billion rows, and measured over fewer."""

from __future__ import annotations

import math

import numpy as np
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import rounded_row_size_in_bytes

from benchmarks.context import Context
from benchmarks.measured import Traffic, overall, second_half_of_module
from benchmarks.page import Page, Section
from benchmarks.served import write_tables
from benchmarks.streams import Zipf
from torchrec_turbossd import TurboSSDInferenceModule
from torchrec_turbossd.sizing import SLOT_MAP_BYTES_PER_ROW, AccessProfile, HitRateCurve
from torchrec_turbossd.tables import TableSpec

ROWS, ALPHA, HIT_RATE = 1_600_000_000, 1.05, 0.9
MOST = 0.1
"""What our memory may be of FBGEMM's."""

_HBM_ALIGNMENT = 16
_GIB = 1 << 30
_GOAL = 3.0


def static_optimum(profile: AccessProfile, hit_rate: float) -> int:
    """The least rows that take `hit_rate` of the lookups: what a cache that knew popularity would keep."""
    rows = np.append(0, np.cumsum(profile.sizes))
    hits = np.append(0.0, np.cumsum(profile.sizes * profile.chances))
    # Sums of chances are off in their last digits.
    return math.ceil(float(np.interp(hit_rate, hits, rows)) - 1e-6)


def hbm_section(page: Page) -> Section:
    """What `estimate_hbm_gb` says against FBGEMM's TurboSSD, whose slots are rows x hit rate."""
    profile = AccessProfile.zipf(ROWS, ALPHA)
    slots, best = HitRateCurve(profile).slots_for(HIT_RATE), static_optimum(profile, HIT_RATE)
    map_bytes = SLOT_MAP_BYTES_PER_ROW * ROWS
    lines, data = [], []
    for data_type in (SparseType.INT8, SparseType.FP16):
        for dim in (64, 128):
            row_bytes = int(rounded_row_size_in_bytes(dim, data_type, _HBM_ALIGNMENT))
            spec = ("t", ROWS, dim, data_type)
            ours = TurboSSDInferenceModule.estimate_hbm_gb([spec], HIT_RATE, {"t": profile})
            theirs = int(ROWS * HIT_RATE) * row_bytes / _GIB
            ratio, without = ours / theirs, (ours - map_bytes / _GIB) / theirs
            held = "held" if ratio <= MOST else ("missed: the slot map" if without <= MOST else "missed")
            sizes = [f"{size:.1f} GiB" for size in (ours - map_bytes / _GIB, map_bytes / _GIB, ours, theirs)]
            name = f"{data_type.name} x {dim}"
            lines.append([name, str(row_bytes), *sizes, f"1/{1 / ratio:.1f}", f"1/{1 / without:.1f}", held])
            data.append({"rows": name, "ours GiB": ours, "theirs GiB": theirs, "ratio": ratio, "without map": without})
    page.data["memory for 90 %"] = {"slots": slots, "static optimum": best, "by row": data}
    return Section(
        title="HBM for a 90 % hit rate, on paper",
        columns=["row", "bytes", "slots", "slot map", "ours", "rows x hit rate", "ratio", "without map", "≤ 1/10"],
        rows=lines,
        before=f"{ROWS:,} rows, Zipf {ALPHA}. Ours: `TurboSSDInferenceModule.estimate_hbm_gb`, with {slots:,} slots "
        f"({slots / ROWS:.2%} of the rows, {slots / best:.2f} times the {best:,} that a cache would need which knew "
        f"popularity). FBGEMM's TurboSSD: {int(ROWS * HIT_RATE):,} rows, padded like ours, without any bookkeeping.",
        after=f"The slot map takes {SLOT_MAP_BYTES_PER_ROW} bytes for each row of the table, in slots or not: "
        f"{map_bytes / _GIB:.1f} GiB whatever the width, which weighs more the narrower rows are.",
    )


def scaled_section(page: Page, context: Context) -> Section:
    """A thousandth of those rows, served with the slots that the curve gives."""
    rows, count, batch = context.pick((ROWS // 1000, 16_000_000, 16_384), (20_000, 200_000, 512))
    table = TableSpec(name="t", rows=rows, dim=8, data_type=SparseType.INT8)
    profile = AccessProfile.zipf(rows, ALPHA)
    traffic = Traffic(table=table, ids=Zipf(rows, ALPHA, context.seed).draw(count), batch=batch)
    with context.scratch("scaled") as folder:
        write_tables(folder / "snapshot", [table], 1)
        with TurboSSDInferenceModule.from_embedding_specs(
            [table], ssd_directory=folder, cache_hit_rate=HIT_RATE, access={"t": profile}, device="cpu"
        ) as module:
            module.load_snapshot(folder / "snapshot")
            measured, slots = overall(second_half_of_module(module, [traffic])), module.slots["t"]
    off, best = 100 * (HIT_RATE - measured), static_optimum(profile, HIT_RATE)
    page.data["measured at 90 %"] = {
        "rows": rows,
        "slots": slots,
        "static optimum": best,
        "lookups": count,
        "batch": batch,
        "measured": measured,
    }
    if abs(off) > _GOAL:
        page.missed.append(f"slots for {HIT_RATE:.0%} of {rows:,} rows: off by {off:.1f} points, {_GOAL:g} allowed")
    return Section(
        title="The same, measured over fewer rows",
        columns=["rows", "slots", "static optimum", "lookups, batch", "measured", "curve", "slots / rows"],
        rows=[
            [
                f"{rows:,}",
                f"{slots:,} ({slots / rows:.1%})",
                f"{best:,}",
                f"{count:,}, {batch:,}",
                f"{measured:.1%}",
                f"{off:+.1f}",
                f"{100 * (slots / rows - measured):+.1f}",
            ]
        ],
        before="`TurboSSDInferenceModule` with `cache_hit_rate=0.9` and the Zipf profile; hits of the second half.",
    )


__all__ = ["ALPHA", "HIT_RATE", "MOST", "ROWS", "hbm_section", "scaled_section", "static_optimum"]
