"""Plain torch, as somebody would write it who knows the machine: a forward loop and a training loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.peers import DIGITS, GLOSSES, File, image_collate, mean_pool

if TYPE_CHECKING:
    import torch
    from torch import nn

_CHUNK = 64
_MAX_TOKENS = 256


def pieces(samples: Sequence[Any], size: int = _CHUNK) -> list[Sequence[Any]]:
    """The samples in batches."""
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def ahead(prepare: Callable[[Any], Any], batches: Sequence[Any]) -> Iterator[Any]:
    """Each batch prepared, the next one meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(prepare, batches[0])
        for following in batches[1:]:
            ready, waiting = waiting.result(), pool.submit(prepare, following)
            yield ready
        yield waiting.result()


def images(size: int) -> tuple[Callable[[Any, bool], Any], Callable[[Any], Any], Callable[[Any], Any]]:
    """(forward, prepare, order) of a loop over the files of digits."""
    import torch
    from transformers import AutoModel

    body = AutoModel.from_pretrained(DIGITS / "backbone").eval().to(memory_format=torch.channels_last)
    collate = image_collate(size)

    def forward(inputs: Any, bf16: bool) -> Any:
        pixels = inputs["pixel_values"].contiguous(memory_format=torch.channels_last)
        with autocast(bf16):
            return body(pixel_values=pixels).pooler_output.float()

    return forward, collate, list


def texts() -> tuple[Callable[[Any, bool], Any], Callable[[Any], Any], Callable[[Any], Any]]:
    """(forward, prepare, order) of a loop over glosses, the shortest first."""
    from transformers import AutoModel, AutoTokenizer

    body = AutoModel.from_pretrained(GLOSSES / "backbone", add_pooling_layer=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(GLOSSES / "backbone")

    def prepare(some: Sequence[str]) -> Any:
        return tokenizer(list(some), truncation=True, max_length=_MAX_TOKENS, padding="longest", return_tensors="pt")

    def forward(inputs: Any, bf16: bool) -> Any:
        with autocast(bf16):
            return mean_pool(body, dict(inputs)).float()

    return forward, prepare, lambda samples: sorted(samples, key=len)


def autocast(bf16: bool) -> contextlib.AbstractContextManager[Any]:
    """bf16 on the CPU, or as it is."""
    import torch

    return torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()


def faster_in_bf16(forward: Callable[[Any, bool], Any], inputs: Any) -> bool:
    """Whether this machine is faster so: with no instructions for it, it is many times slower."""
    import torch

    took = {}
    with torch.no_grad():
        for bf16 in (False, True):
            forward(inputs, bf16)
            started = time.monotonic()
            forward(inputs, bf16)
            took[bf16] = time.monotonic() - started
    return took[True] < took[False]


def run_body(
    forward: Callable[[Any, bool], Any], prepare: Callable[[Any], Any], samples: Sequence[Any], bf16: bool
) -> torch.Tensor:
    """The features of all samples, float32 [samples, width]."""
    import torch

    with torch.no_grad():
        return torch.cat([forward(inputs, bf16) for inputs in ahead(prepare, pieces(samples))])


def classifier() -> nn.Module:
    """EfficientNet-Lite0 with ten new classes, in train mode, channels last."""
    import torch
    from transformers import AutoConfig, AutoModelForImageClassification

    config = AutoConfig.from_pretrained(DIGITS / "backbone", num_labels=10)
    model = AutoModelForImageClassification.from_pretrained(
        DIGITS / "backbone", config=config, ignore_mismatched_sizes=True
    )
    return model.train().to(memory_format=torch.channels_last)  # type: ignore[no-any-return]


def train_step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> None:
    """Forward, backward and the optimizer's step on a batch of images, with the loss read as a loop would show it."""
    import torch

    pixels = batch["pixel_values"].contiguous(memory_format=torch.channels_last)
    loss = torch.nn.functional.cross_entropy(model(pixel_values=pixels).logits, batch["labels"])
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss.item()


def steps(files: Sequence[File], size: int, batch_size: int, rate: float = 1e-3) -> Iterator[int]:
    """Train everything, for ever: AdamW, cross-entropy, the files in another order each epoch. Samples a step."""
    import torch

    model, collate = classifier(), image_collate(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    while True:
        order = torch.randperm(len(files)).tolist()
        for places in pieces(order, batch_size):
            train_step(model, optimizer, collate([files[place] for place in places]))
            yield len(places)


def digits(split: str = "train", data: Path = DIGITS / "data") -> list[File]:
    """The files of a split, mixed."""
    import random

    from tests.benchmarks.peers import files_of

    files = files_of(data / split)
    random.Random(0).shuffle(files)
    return files
