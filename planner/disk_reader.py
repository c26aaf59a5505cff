"""A process that reads a file from several threads at once, and prints how much it read.

`planner.disk` starts several of them by this file's path, so that Python's global lock of one process is not what is
measured. It needs the standard library alone, and starts in a few hundredths of a second.
"""

from __future__ import annotations

import itertools
import mmap
import os
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

RANDOM, IN_ORDER = "random", "in_order"


def read_for(seconds: float, parent: int, file: int, size: int, block: int, numbers: Iterator[int]) -> int:
    """Read blocks of `block` bytes of a file of `size`, by number, for `seconds`, or until `parent` is no longer this
    process's parent; returns how many.

    Raises:
        OSError: a read that fails, or gives less than a block.
    """
    # O_DIRECT wants memory that starts on a page.
    with mmap.mmap(-1, block) as page:
        whole, count, end = [page], 0, time.monotonic() + seconds
        for number in numbers:
            if os.preadv(file, whole, number % (size // block) * block) != block:
                raise OSError(f"block {number} of the file gave less than {block} bytes")
            count += 1
            if time.monotonic() >= end or os.getppid() != parent:
                return count
    return count


def _numbers(order: str, blocks: int, place: float, seed: int) -> Iterator[int]:
    """Numbers of blocks: at random, or in order from the share `place` of the file on."""
    if order == IN_ORDER:
        return itertools.count(int(place * blocks))
    draw = random.Random(seed).random
    return (int(draw() * blocks) for _ in itertools.repeat(None))


def main(arguments: list[str]) -> None:
    """Read as `arguments` say, all by position: id of the parent, file descriptor, bytes of the file, bytes of a block,
    threads, number of this process, number of processes, order, seconds, and the `time.monotonic()` to start at."""
    parent, file, size, block, threads, process, processes = (int(a) for a in arguments[:7])
    order, (seconds, start) = arguments[7], (float(a) for a in arguments[8:])
    seeds = [process * threads + n for n in range(threads)]
    streams = [_numbers(order, size // block, seed / (threads * processes), seed) for seed in seeds]
    with ThreadPoolExecutor(threads) as pool:
        time.sleep(max(0.0, start - time.monotonic()))
        begin = time.monotonic()
        count = sum(pool.map(partial(read_for, seconds, parent, file, size, block), streams))
        print(count, time.monotonic() - begin)


if __name__ == "__main__":
    main(sys.argv[1:])
