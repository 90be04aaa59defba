"""What the loop trains on: samples that are decoded in every step, or features that a frozen body gave once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orchestrator.errors import BadSampleError, TrainingError
from orchestrator.modality import Collate, Decode
from orchestrator.model import Inputs, Network
from orchestrator.samples import Samples
from orchestrator.worker import Worker

SPLIT_TOLERANCE = 1e-4
_NUM_PROOF_SAMPLES = 16

Ints = npt.NDArray[np.int64]
Progress = Callable[[int], None]


@dataclass
class Batch:
    """What one forward pass takes. Samples that could not be read are not in it."""

    inputs: Inputs
    targets: Tensor
    """int64 [samples], the class; multi-label and regression: float32 [samples, classes]."""
    rows: Ints
    """Of the sample table, int64 [samples]."""

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        return Batch(inputs, self.targets.to(device), self.rows)


@dataclass
class SampleSource:
    """Samples, read, decoded and collated when they are asked for."""

    samples: Samples
    decode: Decode
    collate: Collate
    skip: bool
    """Whether a sample that cannot be read is left out, or ends the run."""
    pool: ThreadPoolExecutor
    skipped: dict[int, str] = field(default_factory=dict)
    """Row -> why it was left out."""

    def batch(self, rows: Ints, train: bool) -> Batch | None:
        """The rows that can be read, None if there is none. Raises `TrainingError` unless `skip`."""
        decoded, kept = [], []
        for row, one in zip(rows.tolist(), self.pool.map(self._decode, rows.tolist()), strict=True):
            if isinstance(one, BadSampleError):
                if not self.skip:
                    raise TrainingError(
                        f"{self.samples.place(row)}: {one.message}",
                        expected="samples that can all be read",
                        mend="mend or remove it and start with --fresh, or leave such out: --on-bad-sample skip",
                    )
                self.skipped[row] = one.message
                continue
            decoded.append(one)
            kept.append(row)
        if not kept:
            return None
        index = np.array(kept, dtype=np.int64)
        return Batch(self.collate(decoded, train), torch.from_numpy(self.samples.targets[index]), index)

    def _decode(self, row: int) -> object:
        try:
            return self.decode(self.samples.read(row))
        except BadSampleError as error:
            return error


@dataclass
class FeatureSource:
    """Features of the samples, float32 [samples, ...], one row for each of `rows`."""

    samples: Samples
    rows: Ints
    values: npt.NDArray[np.float32]

    def batch(self, rows: Ints, train: bool) -> Batch | None:  # noqa: ARG002  # as SampleSource's
        """The rows that have features, None if there is none."""
        at = np.searchsorted(self.rows, rows)
        there = (at < len(self.rows)) & (self.rows[np.minimum(at, len(self.rows) - 1)] == rows)
        rows, at = rows[there], at[there]
        if not len(rows):
            return None
        features = torch.from_numpy(np.ascontiguousarray(self.values[at]))
        return Batch({"features": features}, torch.from_numpy(self.samples.targets[rows]), rows)


Source = SampleSource | FeatureSource


def prove_split(network: Network, source: SampleSource, rows: Ints, device: torch.device) -> float:
    """The largest difference, relative to the largest logit, of head(body(x)) from the whole model.

    In fp32 on real samples. infinity where the model has no single head module to be split at, or where its
    head's input does not suffice.
    """
    batch = source.batch(rows[:_NUM_PROOF_SAMPLES], train=False)
    if network.split is None or batch is None:
        return float("inf")
    inputs = batch.to(device).inputs
    with torch.no_grad():
        whole = network.logits(inputs)
        try:
            split = network.head_module()(network.features(inputs))
        except (TypeError, RuntimeError):
            return float("inf")
    if not isinstance(split, Tensor) or split.shape != whole.shape:
        return float("inf")
    return float((whole - split).abs().max() / whole.abs().max().clamp(min=1.0))


def extract(
    network: Network,
    source: SampleSource,
    rows: Sequence[Ints],
    worker: Worker,
    folder: Path,
    progress: Progress,
    by_length: bool = False,
) -> list[FeatureSource]:
    """The features of several splits, each sample once; every worker does its share and reads all.

    `folder` is on the run's storage. A worker's finished share is kept there, so that a run that goes on
    does not repeat it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, all_rows in enumerate(rows):
        mine = part_of(all_rows, worker.rank, worker.num_workers)
        _extract_share(
            network, source, mine, worker, folder / _share_name(number, worker.rank, worker), progress, by_length
        )
    worker.wait()
    found = []
    for number in range(len(rows)):
        kept, values = [], []
        for rank in range(worker.num_workers):
            header = json.loads((folder / _share_name(number, rank, worker)).with_suffix(".json").read_text())
            kept.append(np.array(header["rows"], dtype=np.int64))
            values.append(np.load(folder / header["file"], mmap_mode="r", allow_pickle=False))
            source.skipped.update({int(row): why for row, why in header["skipped"].items()})
        sizes = [value for value in values if len(value)]
        joined = sizes[0] if len(sizes) == 1 else np.concatenate(sizes) if sizes else np.zeros((0, 1), np.float32)
        found.append(FeatureSource(source.samples, np.concatenate(kept), joined))
    return found


def part_of(rows: Ints, number: int, num_parts: int) -> Ints:
    """One of `num_parts` pieces whose lengths differ by one at most."""
    return rows[number * len(rows) // num_parts : (number + 1) * len(rows) // num_parts]


def _share_name(number: int, rank: int, worker: Worker) -> str:
    return f"{number}-{rank}-of-{worker.num_workers}.npy"


def _extract_share(
    network: Network, source: SampleSource, rows: Ints, worker: Worker, file: Path, progress: Progress, by_length: bool
) -> None:
    header = file.with_suffix(".json")
    if _is_whole(file, header):
        progress(len(rows))
        return
    kept: list[Ints] = []
    values: list[Tensor] = []
    mine = set(rows.tolist())
    if by_length:
        rows = source.samples.by_length(rows)
    for part in source.samples.batches(rows):
        batch = source.batch(part, train=False)
        if batch is not None:
            with torch.no_grad():
                values.append(network.features(batch.to(worker.device).inputs).float().cpu())
            kept.append(batch.rows)
        progress(len(part))
    array = torch.cat(values).numpy() if values else np.zeros((0, 1), np.float32)
    index = np.concatenate(kept) if kept else np.zeros(0, np.int64)
    ascending = np.argsort(index)
    index, array = index[ascending], array[ascending]
    partial = file.with_suffix(".partial")
    with partial.open("wb") as out:
        np.save(out, array, allow_pickle=False)
        out.flush()
        os.fsync(out.fileno())
    with partial.open("rb") as written:
        digest = hashlib.file_digest(written, "sha256").hexdigest()
    os.replace(partial, file)
    found = {
        "file": file.name,
        "sha256": digest,
        "rows": index.tolist(),
        "skipped": {str(row): why for row, why in source.skipped.items() if row in mine},
    }
    partial.write_text(json.dumps(found))
    os.replace(partial, header)


def _is_whole(file: Path, header: Path) -> bool:
    try:
        expected = json.loads(header.read_text())["sha256"]
        with file.open("rb") as content:
            return bool(hashlib.file_digest(content, "sha256").hexdigest() == expected)
    except (OSError, ValueError, KeyError):
        return False
