"""The programs that we are measured against, and a cold page cache: `db_bench`, `fio`, `posix_fadvise`."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.figures import SkipRow
from torchrec_turbossd.store.rocks_options import RocksOptions

_PACKAGES = {"db_bench": "rocksdb-tools", "fio": "fio"}
_RATE = re.compile(r"^(\w+)\s*:\s*[\d.]+ micros/op (\d+) ops/sec", re.MULTILINE)
_FOUND = re.compile(r"\((\d+) of (\d+) found\)")
KEY_BYTES = 8


def need(tool: str) -> str:
    """The path of a program; raises `SkipRow` that says how to install it."""
    found = shutil.which(tool)
    if found is None:
        raise SkipRow(f"{tool} is not installed; on Debian and Ubuntu: apt-get install {_PACKAGES[tool]}")
    return found


def db_bench(benchmarks: str, db: Path, *, rows: int, row_bytes: int, **options: Any) -> dict[str, float]:
    """Run RocksDB's own benchmark on the database at `db`; returns operations a second by benchmark, the last of each.

    Its settings are those of our store where `options` say nothing else, so that the peer is tuned as well as we are.
    """
    ours = RocksOptions()
    settings = {
        "db": db,
        "num": rows,
        "key_size": KEY_BYTES,
        "value_size": row_bytes,
        "compression_type": "none",
        "bloom_bits": ours.bloom_bits,
        "block_size": ours.block_bytes,
        "cache_size": ours.block_cache_bytes,
        "write_buffer_size": ours.write_buffer_bytes,
        "max_write_buffer_number": ours.max_write_buffers,
        "use_data_block_hash_index": 1,
        "open_files": -1,
        **options,
    }
    command = [
        need("db_bench"),
        f"--benchmarks={benchmarks}",
        *(f"--{name}={value}" for name, value in settings.items()),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    rates = {name: float(rate) for name, rate in _RATE.findall(done.stdout)}
    if done.returncode != 0 or not rates:
        raise RuntimeError(f"{' '.join(command)} failed: {(done.stdout + done.stderr)[-500:]}")
    for found, asked in _FOUND.findall(done.stdout):
        if found != asked:
            raise RuntimeError(f"db_bench found {found} of {asked} rows; its database at {db} is not whole")
    return rates


def fill_db_bench(db: Path, *, rows: int, row_bytes: int, seed: int) -> float:
    """Make a database in order of its keys, without a log and a thousand rows a batch; returns rows a second."""
    settings = {"disable_wal": 1, "batch_size": 1000, "seed": seed}
    return db_bench("fillseq,flush", db, rows=rows, row_bytes=row_bytes, **settings)["fillseq"]


def fio_random_reads(file: Path, *, seconds: float, depth: int, seed: int) -> dict[str, float]:
    """4 KiB random reads of `file` past the page cache: reads a second, and their mean and p99 in milliseconds."""
    command = [need("fio"), "--name=read", f"--filename={file}", "--readonly", "--rw=randread", "--bs=4k", "--direct=1"]
    command += ["--ioengine=libaio", f"--iodepth={depth}", f"--runtime={seconds}", "--time_based", f"--randseed={seed}"]
    done = subprocess.run([*command, "--output-format=json"], capture_output=True, text=True)
    if done.returncode != 0:
        raise SkipRow(f"fio refuses {file}: {done.stderr.strip()[-300:]}; give --directory on a disk with O_DIRECT")
    # Warnings may come before the JSON.
    read = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["read"]
    return {
        "iops": read["iops"],
        "mean ms": read["lat_ns"]["mean"] / 1e6,
        "p99 ms": read["clat_ns"]["percentile"]["99.000000"] / 1e6,
    }


def drop_caches(directory: Path) -> None:
    """Write every file under `directory` out, and let go of its pages in the page cache.

    Pages that a process has mapped stay; maps of this one that nothing refers to any more are undone first.
    """
    gc.collect()
    for file in sorted(f for f in directory.rglob("*") if f.is_file()):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def disk_bytes_read() -> int:
    """Bytes that this process has had read from disks, or 0 where the kernel does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)


__all__ = ["KEY_BYTES", "db_bench", "disk_bytes_read", "drop_caches", "fill_db_bench", "fio_random_reads", "need"]
