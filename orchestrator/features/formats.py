"""Which number format features are computed and kept in: float32, or bfloat16 where that is faster and as good.

As good means that on 256 samples no feature vector turns by more than a cosine of .998: images measured .9987 to .9992,
texts .9999. The answer is kept with the features, so that later jobs read those that are there.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from orchestrator.features.body_pass import compute
from orchestrator.features.sources import SampleSource, as_float32
from orchestrator.network import Body, Worker
from orchestrator.store import FORMAT_FILE, Format, write_shared

LEAST_COSINE = 0.998
_NUM_SAMPLES = 256
_BATCH = 64
_LEAST_GAIN = 1.1

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Choice:
    """A number format, and why."""

    format: Format
    cosine: float | None = None
    """The least between the two formats, over the samples tried; None where bfloat16 was not tried."""
    gain: float | None = None
    """How many times faster bfloat16 was."""


def choose(
    asked: str, body: Body, source: SampleSource, rows: Ints, worker: Worker, cache_group: Path,
    num_missing: Callable[[Format], int],
) -> Choice:  # fmt: skip
    """The format for these rows' features; the same on all workers.

    `asked` is the job's precision: fp32, bf16 or auto. `num_missing` tells how many features a set lacks.
    """
    choice = _choose(asked, body, source, rows, worker, cache_group, num_missing) if worker.rank == 0 else None
    chosen: Choice = worker.gather(choice)[0]
    return chosen


def _choose(
    asked: str, body: Body, source: SampleSource, rows: Ints, worker: Worker, cache_group: Path,
    num_missing: Callable[[Format], int],
) -> Choice:  # fmt: skip
    if asked == "fp32":
        return Choice("float32")
    before = _remembered(cache_group)
    if before is not None and before.format == "bfloat16" and num_missing("bfloat16") == 0:
        return before
    if asked == "auto" and before is not None and before.format == "float32":
        return before  # tried before: the same data must not change its format from one start to the next
    if asked == "auto" and not has_bfloat16(worker.device):
        return Choice("float32")
    if asked == "auto" and num_missing("float32") <= _NUM_SAMPLES:  # the trial would cost more than it could gain
        return Choice("float32")
    some = rows[:: max(1, len(rows) // _NUM_SAMPLES)][:_NUM_SAMPLES]  # of folders the first ones are of one class
    choice = _tried("bf16" if before is not None else asked, body, source, some, worker)
    if before is None:
        write_shared(cache_group / FORMAT_FILE, json.dumps(asdict(choice)))
    return choice


def _remembered(cache_group: Path) -> Choice | None:
    try:
        found = Choice(**json.loads((cache_group / FORMAT_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.format in ("float32", "bfloat16") else None


def _tried(asked: str, body: Body, source: SampleSource, rows: Ints, worker: Worker) -> Choice:
    """Both formats on the same batches, in turn."""
    cosines, gains = [], []
    for start in range(0, len(rows), _BATCH):
        batch = source.batch(rows[start : start + _BATCH], train=False)
        if batch is None:
            continue
        inputs = batch.to(worker.device).inputs
        values, seconds = {}, {}
        for format in ("float32", "bfloat16"):
            began = time.perf_counter()
            values[format] = as_float32(compute(body, inputs, format)).flatten(1)
            seconds[format] = time.perf_counter() - began
        cosine_of = torch.cosine_similarity(values["float32"], values["bfloat16"], dim=1)
        cosines.append(float(cosine_of.nan_to_num(nan=-1.0).min()))
        gains.append(seconds["float32"] / seconds["bfloat16"])
    if not cosines:
        return Choice("float32")
    cosine, gain = min(cosines), statistics.median(gains[1:] or gains)  # the first batch compiles kernels
    good = cosine >= LEAST_COSINE and (asked == "bf16" or gain >= _LEAST_GAIN)
    return Choice("bfloat16" if good else "float32", cosine, gain)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in it, and does not only emulate it, which is many times slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("bf16"))
    return False
