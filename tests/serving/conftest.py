"""Fixtures of the serving module's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType

from tests.serving.serving_kit import SPECS
from torchrec_turbossd.serving import TurboSSDInferenceModule


@pytest.fixture
def module(tmp_path: Path) -> Iterator[TurboSSDInferenceModule]:
    """A module of `SPECS` with every row written."""
    with TurboSSDInferenceModule.from_embedding_specs(
        SPECS, tmp_path, device="cpu", name="m", output_dtype=SparseType.FP32
    ) as module:
        module.streaming_update(torch.arange(50), torch.randn(50, 8), "a")
        module.streaming_update(torch.arange(20), torch.randn(20, 4), "b")
        yield module
