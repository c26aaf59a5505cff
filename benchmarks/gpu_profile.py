"""Which kernels a batch spends its time in, and how near they come to what the memory and the bus can move."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.figures import Figure
from benchmarks.gpu_context import GpuContext, caller
from benchmarks.gpu_serving import all_hit, zipf
from benchmarks.gpu_streams import Shape
from benchmarks.gpu_tables import hits_of
from benchmarks.gpu_timing import copy_rates, wait
from benchmarks.gpu_training import training

_BATCHES = 4
_SECTOR = 32
_PARTS = (
    ("TBE backward", ("backward", "sort", "runlength", "run_length", "linearize", "transpose")),
    ("TBE forward", ("nbit", "split_embedding", "embedding_forward", "embedding_codegen")),
    ("remap", ("remap", "refill")),
    ("row exchange", ("exchange", "choose", "unclaim")),
)
"""Parts of a batch, by words in the names of their kernels; the first that fits."""


@dataclass(frozen=True)
class Kernel:
    """A kernel, or a copy that the device did: calls and microseconds a batch."""

    name: str
    calls: float
    us: float

    @property
    def part(self) -> str:
        name = self.name.lower()
        return next((part for part, words in _PARTS if any(word in name for word in words)), "other")


def short_name(name: str) -> str:
    """A kernel's name without its return type, name spaces, template arguments and parameters."""
    name = re.sub(r"\(anonymous namespace\)::", "", name)
    name = re.sub(r"^void ", "", name)
    while (plain := re.sub(r"<[^<>]*>", "", name)) != name:
        name = plain
    name = name.split("<")[0].split("(")[0]
    return name.split("::")[-1].strip()[:60] or "unnamed"


def kernels_of(
    work: Callable[[Sequence[Tensor]], object], batches: Sequence[Tensor], device: torch.device
) -> list[Kernel]:
    """What the device does for a batch, on the mean of all; the longest first."""
    cuda = device.type == "cuda"
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        work(batches)
        wait(device)
    calls: dict[str, int] = {}
    spent: dict[str, float] = {}
    for event in found.events() or ():
        if event.device_type == kind and not getattr(event, "is_user_annotation", False):
            name = short_name(event.name)
            calls[name] = calls.get(name, 0) + 1
            spent[name] = spent.get(name, 0.0) + event.time_range.elapsed_us()
    share = 1 / len(batches)
    kernels = [Kernel(name, calls[name] * share, spent[name] * share) for name in calls]
    return sorted(kernels, key=lambda kernel: -kernel.us)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that the parts of a batch move at least: through the memory of the device, or over the bus.

    Args:
        shape: of the batch. misses: rows brought in. distinct: different rows asked for.
        row_bytes: of a row in its slot. dram_bytes: of a row in the DRAM tier. out_bytes: of one output number.
        dim: numbers of a row. state_bytes: of the optimizer, of a row.
    """

    shape: Shape
    misses: float
    distinct: int
    row_bytes: int
    dram_bytes: int
    out_bytes: int
    dim: int
    state_bytes: int = 0

    @property
    def outputs(self) -> int:
        return self.shape.tables * self.shape.bags * self.dim * self.out_bytes

    def parts(self) -> dict[str, tuple[float, bool]]:
        """(bytes, over the bus) of each part.

        Remap: an id of 8 bytes read and a slot of 4 written for each lookup, and the sector of its slot map entry.
        Row exchange: a row over the bus, while another may go the other way. TBE forward: a slot of 4 bytes and a row
        for each lookup, and the outputs. TBE backward: the gradients once for each lookup, each row and its state
        read and written.
        """
        lookups = self.shape.lookups
        gradients = lookups * self.dim * self.out_bytes
        return {
            "remap": (lookups * (8 + 4 + _SECTOR), False),
            "row exchange": (self.misses * self.dram_bytes, True),
            "TBE forward": (lookups * (4 + self.row_bytes) + self.outputs, False),
            "TBE backward": (gradients + 2 * self.distinct * (self.row_bytes + self.state_bytes), False),
        }


def _distinct(batch: Tensor, tables: int) -> int:
    return sum(torch.unique(part).numel() for part in batch.view(tables, -1))


def _workloads(
    gpu: GpuContext,
) -> Iterator[tuple[str, Any, Callable[[Sequence[Tensor]], object], list[Tensor], Traffic]]:
    """(name, module, call, batches, traffic without its misses)."""
    hit, part = all_hit(gpu), zipf(gpu)
    for name, served, stream, batches in (
        ("all-hit", hit.served, hit.stream, hit.batches),
        ("zipf, 10 %", part.ours(gpu, 0.1), part.stream, part.batches.timed),
    ):
        traffic = Traffic(
            shape=stream.shape,
            misses=0,
            distinct=_distinct(batches[0], stream.shape.tables),
            row_bytes=144,
            dram_bytes=144,
            out_bytes=2,
            dim=128,
        )
        yield name, served.module, caller(served.module, stream.offsets), batches, traffic
    gpu.check_time()
    made = training(gpu)
    shape, dim = made.stream.shape, made.kind.dim
    traffic = Traffic(
        shape=shape,
        misses=0,
        distinct=_distinct(made.timed[0], shape.tables),
        row_bytes=dim * 4,
        dram_bytes=dim * 4 + 16,
        out_bytes=4,
        dim=dim,
        state_bytes=4,
    )
    yield "training", made.ours["ours"].module, made.sides["ours"], made.timed, traffic


def run_profile(gpu: GpuContext) -> Iterator[Figure]:
    memory, bus = copy_rates(gpu.device, gpu.pick(4 << 30, 1 << 24))
    ceilings = f"ceilings measured: {memory:,.0f} GB/s within the device, {bus:.3g} GB/s from host memory"
    for name, module, work, batches, traffic in _workloads(gpu):
        work(batches[-_BATCHES:])
        before = hits_of(module)
        kernels = kernels_of(work, batches[:_BATCHES], gpu.device)
        hits, reads = (b - a for a, b in zip(before, hits_of(module), strict=True))
        traffic = Traffic(**{**vars(traffic), "misses": (reads - hits) / _BATCHES})
        yield Figure(
            row="profile",
            case=f"{name}: all kernels",
            unit="us a batch",
            ours=sum(kernel.us for kernel in kernels),
            note=f"{traffic.shape}; {traffic.misses:,.0f} rows brought in, {traffic.distinct:,} different; {ceilings}",
            details={"kernels": [vars(k) | {"part": k.part} for k in kernels], "GB/s": [memory, bus]},
        )
        for part, (count, over_bus) in traffic.parts().items():
            spent = sum(kernel.us for kernel in kernels if kernel.part == part)
            if spent and count:
                yield _part(f"{name}: {part}", spent, count, bus if over_bus else memory)


def _part(case: str, us: float, count: float, ceiling: float) -> Figure:
    reached = count / us / 1e3
    return Figure(
        row="profile",
        case=case,
        unit="us a batch",
        ours=us,
        peer="moving its bytes at the ceiling",
        theirs=count / ceiling / 1e3,
        note=f"{count / 1e6:,.3g} MB, {reached:,.3g} GB/s, {reached / ceiling:.0%} of the ceiling",
        details={"bytes": count, "GB/s": reached, "ceiling": ceiling},
    )


__all__ = ["Kernel", "Traffic", "kernels_of", "run_profile", "short_name"]
