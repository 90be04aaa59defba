"""What a job may set of the process that called it; imported by processes that are no tests."""

from __future__ import annotations

import resource
from typing import Any

import torch


def precisions() -> list[str]:
    backends = torch.backends
    parts = (
        backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul, backends.mkldnn.conv,
        backends.mkldnn.rnn,
    )  # fmt: skip
    return [part.fp32_precision for part in parts]


def process_settings() -> tuple[Any, ...]:
    return (
        precisions(), torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(), resource.getrlimit(resource.RLIMIT_NOFILE),
    )  # fmt: skip
