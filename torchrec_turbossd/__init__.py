"""Embedding tables larger than memory: rows on SSD, the hot ones in HBM or DRAM, looked up by stock FBGEMM kernels."""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__"]
