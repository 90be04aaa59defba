"""On which devices a test runs: `both` is the CPU, and a GPU where one is asked for (`-m gpu`) and there is one."""

from __future__ import annotations

import pytest
import torch

on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="wants -m gpu, and a GPU that torch finds"),
]
both = pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=on_a_gpu)])
