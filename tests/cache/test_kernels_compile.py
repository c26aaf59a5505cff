"""The kernels compile for GPUs of NVIDIA and AMD, wherever tests run: an interpreter forgives much."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

# In a process of its own: where kernels are interpreted, they are not what a compiler takes.
_COMPILE = """
import json
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from torchrec_turbossd.cache import kernels, kernels_rows

target = GPUTarget(*json.loads(sys.argv[1]))
batch = {"lookups": "i32", "bags": "i32"}


def compiled(kernel, signature, constants, warps=4):
    every = {"at": "*i64", **signature, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=kernel, signature=every, constexprs=constants)
    triton.compile(source, target=target, options={"num_warps": warps})


for ids in ("*i32", "*i64"):
    given = {"ids": ids, "offsets": ids, "safe": ids, "slots": ids, **batch, "stamp": "i32"}
    for touch, mark in ((False, False), (True, False), (True, True)):
        compiled(kernels.remap, given, {"TOUCH": touch, "MARK": mark, "BLOCK": kernels.BLOCK})
    compiled(kernels.refill, {"ids": ids, "offsets": ids, "slots": ids, **batch}, {"BLOCK": kernels.BLOCK})
    compiled(kernels.restamp, {"offsets": ids, "slots": ids, **batch, "stamp": "i32"}, {"BLOCK": kernels.BLOCK})
    compiled(kernels.unclaim, {"offsets": ids, **batch}, {"BLOCK": kernels.BLOCK})
    chosen = {"given": "*i64", "given_first": "*i32", "offsets": ids, **batch, "oldest": "i32"}
    compiled(kernels_rows.choose, chosen, {"BLOCK": kernels_rows.QUEUE_BLOCK}, kernels_rows.QUEUE_WARPS)
    shape = {"ROWS": kernels_rows.EXCHANGE_ROWS, "COLS": kernels_rows.EXCHANGE_WORDS}
    for word in (tl.int8, tl.int16, tl.int32, tl.int64):
        moved = {"offsets": ids, **batch, "stamp": "i32"}
        constants = {"MARK": True, "PARTS": 2, "WORD": word, **shape}
        compiled(kernels_rows.exchange, moved, constants, kernels_rows.EXCHANGE_WARPS)
"""


@pytest.mark.parametrize("target", [["cuda", 90, 32], ["hip", "gfx942", 64]], ids=["H200", "MI300"])
def test_kernels_compile(target: list[object]) -> None:
    # Other tests have kernels interpreted, and say so in the environment.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _COMPILE, json.dumps(target)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
