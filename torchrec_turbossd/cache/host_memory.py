"""Host memory that a GPU reads and writes in place, of just the bytes that were asked for."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import mmap
import weakref
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_MEMORY = Path("/proc/meminfo")
_CONCURRENT_MANAGED_ACCESS = 89
"""CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS of CUDA's driver API."""


def free_bytes() -> int | None:
    """Bytes of memory that the machine has available; None where it does not say."""
    try:
        lines = _MEMORY.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return found[0] * 1024 if found else None


def host_rows(rows: int, row_bytes: int, device: torch.device) -> Tensor:
    """Uninitialised rows [rows, row_bytes] uint8 in host memory, which `device` reads and writes in place if a GPU.

    Managed memory that stays on the host, where host and GPU may use that at once: its pages are large ones to the
    GPU, which reads rows at random from a few GiB of it several times as fast as from memory that was pinned page by
    page. Elsewhere pinned memory.

    Raises:
        MemoryError: there is not so much, or it cannot be pinned.
    """
    size = rows * row_bytes
    if device.type == "cpu" or not size:
        return torch.empty(rows, row_bytes, dtype=torch.uint8)
    free = free_bytes()
    if free is not None and size > free:
        # Managed memory is only taken when it is written, and the process dies if it cannot be.
        raise MemoryError(f"cannot allocate {size:,} bytes of host memory, of which {free:,} are available")
    if _has_concurrent_managed_memory(device):
        # Its operators are wanted here alone: sizes are planned without them.
        importlib.import_module("fbgemm_gpu")
        with torch.cuda.device(device):
            like = torch.empty(0, dtype=torch.uint8, device=device)
            managed = torch.ops.fbgemm.new_managed_tensor(like, [rows, row_bytes])
            # The driver takes its pages from this process when it forks, and gives them back one by one.
            with contextlib.suppress(AttributeError, RuntimeError):
                torch.ops.fbgemm.uvm_mem_advice_dont_fork(managed)
            table: Tensor = torch.ops.fbgemm.uvm_to_cpu(managed)
        return table
    return _pinned(size, device).view(rows, row_bytes)


def _has_concurrent_managed_memory(device: torch.device) -> bool:
    try:
        driver, value = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
    except OSError:
        return False
    failed = driver.cuDeviceGetAttribute(ctypes.byref(value), _CONCURRENT_MANAGED_ACCESS, device.index or 0)
    return not failed and bool(value.value)


def _pinned(size: int, device: torch.device) -> Tensor:
    """[size] uint8. PyTorch's own pinned memory comes in powers of two, up to twice what was asked for."""
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"cannot allocate {size:,} bytes of host memory: {error}") from error
    # A forked process would have them copied on the next write, and the GPU would go on with the old pages.
    memory.madvise(mmap.MADV_DONTFORK)
    held = np.frombuffer(memory, dtype=np.uint8)
    address = held.ctypes.data
    # Registering needs a context, which is made by the first use of the device.
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()
        failed = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
    if failed:
        raise MemoryError(f"cannot allocate pinned memory: {size:,} bytes of host memory, CUDA error {failed}")
    table = torch.from_numpy(held)
    weakref.finalize(held, _unregister, address, memory).atexit = False
    return table


def _unregister(address: int, memory: mmap.mmap) -> None:
    """`memory` is held by the call, so that its pages are still there."""
    torch.cuda.cudart().cudaHostUnregister(address)


__all__ = ["free_bytes", "host_rows"]
