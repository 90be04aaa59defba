"""The number format that features are computed and kept in: float32, or bfloat16 where that is faster and as good.

As good means that on 64 to 256 samples the cosine similarity of a sample's features in float32 and in bfloat16 is never
below .998: measured .9987 to .9992 on images, .9999 on texts. The answer is kept with the features, so that later jobs
read those that are there.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from orchestrator.data import Ints
from orchestrator.features.bodies import Compiled
from orchestrator.features.sources import SampleSource, as_float32
from orchestrator.job import write_file
from orchestrator.network import Body, Inputs, Worker, channels_last
from orchestrator.store import FORMAT_FILE, Format, Values, write_first

LEAST_COSINE = 0.998
_WORTH_NUM = 256
"""Of fewer features that are missing a trial costs more than it could gain."""
_LEAST_NUM, _MOST_NUM, _SHARE = 64, 256, 32
"""One in 32 is tried: in float32 too it takes some 4 % of what the pass takes in bfloat16 then."""
_NUM_BATCHES = 4
_LEAST_GAIN = 1.1

# --- computing in a format ---


@contextlib.contextmanager
def number_format(inputs: Inputs, format: Format) -> Iterator[None]:
    """What a body computes from these inputs, it computes in that format, without gradients."""
    device = next(iter(inputs.values())).device
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=format == "bfloat16"):
        yield


def compute(body: Body, inputs: Inputs, format: Format, compiled: Compiled | None = None) -> Values:
    """The body's output, [samples, ...]: float32, or the bits of bfloat16.

    `compiled` is used for inputs of the shape that it was made for.
    """
    inputs = channels_last(inputs)
    with number_format(inputs, format):
        features = compiled(inputs) if compiled is not None and compiled.fits(inputs) else body(inputs)
    return as_values(features, format)


def as_values(features: Tensor, format: Format) -> Values:
    """A tensor as the store keeps it: float32, or the bits of bfloat16 as uint16."""
    if format == "bfloat16":
        return features.to(torch.bfloat16).cpu().contiguous().view(torch.uint16).numpy()
    return features.float().cpu().contiguous().numpy()


# --- deciding for one ---


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
    """The format for these rows' features, decided by the worker of rank 0.

    `asked` is the job's precision: fp32, bf16 or auto. `num_missing` tells how many features a set lacks.
    """
    choice = _choose(asked, body, source, rows, worker, cache_group, num_missing) if worker.rank == 0 else None
    chosen: Choice = worker.all_gather(choice)[0]
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
    missing = num_missing("float32")
    if asked == "auto" and missing <= _WORTH_NUM:
        return Choice("float32")
    num = min(_MOST_NUM, max(_LEAST_NUM, missing // _SHARE))
    tried_rows = rows[:: max(1, len(rows) // num)][:num]  # a folder's first ones are of one class
    choice = _tried("bf16" if before is not None else asked, body, source, tried_rows, worker)
    return choice if before is not None else _published(choice, asked, cache_group)


def _published(choice: Choice, asked: str, cache_group: Path) -> Choice:
    """The choice, kept for later jobs; or that of a job that tried at the same time and was done first.

    Timings differ, and two jobs that choose unlike formats would compute everything twice.
    """
    file = cache_group / FORMAT_FILE
    write_first(file, json.dumps(asdict(choice)))
    first = _remembered(cache_group)
    if first is None:  # what was there is no answer
        write_file(file, json.dumps(asdict(choice)).encode())
    return first if first is not None and asked == "auto" else choice


def _remembered(cache_group: Path) -> Choice | None:
    """What was decided for this cache group; None where nothing was, or where that cannot be read."""
    try:
        choice = Choice(**json.loads((cache_group / FORMAT_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return choice if choice.format in ("float32", "bfloat16") else None


def _tried(asked: str, body: Body, source: SampleSource, rows: Ints, worker: Worker) -> Choice:
    """What comes of both formats on the same batches, in turn."""
    cosines, gains = [], []
    for some in np.array_split(source.samples.order_by_length(rows), _NUM_BATCHES):  # else most of a text is padding
        batch = source.batch(some, train=False) if len(some) else None
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
    if device.type != "cpu":
        return False
    # What the processor has, and what oneDNN, which multiplies, may use of it: with ONEDNN_MAX_CPU_ISA=AVX2 on a
    # processor with AMX it said no, and a product of matrices took 1,900 ms instead of 1.4 (float32: 12). It is not
    # asked what torch's own kernels use (ATEN_CPU_CAPABILITY): that changed nothing in these times.
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    has_instructions = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    in_force = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # a torch without oneDNN has none
    return has_instructions and in_force is not None and bool(in_force())
