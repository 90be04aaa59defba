"""Small checkpoints for tests, and a process that dies while it writes one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from orchestrator.job import HeldRun
from orchestrator.training import checkpoint as ckpt


def made(step: int, number: int = 0) -> ckpt.Checkpoint:
    """A small checkpoint, other values for every step, and for every number."""
    bias = torch.full((2,), float(step + number))
    weights = {"head.weight": torch.arange(6.0).reshape(2, 3) / step, "head.bias": bias}
    best = {name: value - 1 for name, value in weights.items()}
    return ckpt.Checkpoint(step, weights, best, {"head.bias|exp_avg": torch.ones(2) / step}, {"loss": 1 / step})


def same(one: ckpt.Tensors, other: ckpt.Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def steps_in(run: HeldRun) -> list[int]:
    return sorted(int(place.name.removeprefix("step-")) for place in run.folder.glob("checkpoints/step-*[0-9]"))


def place_of(run: HeldRun, step: int) -> Path:
    return run.folder / "checkpoints" / f"step-{step:08d}"


class PowerLostError(BaseException):
    """The process ends here. No `Exception`, so that nothing handles it."""


@contextlib.contextmanager
def cut_at(number: int) -> Iterator[list[Path]]:
    """Let the calls that change the storage pass `number` times, and then no more; gives what was committed."""
    committed: list[Path] = []
    left = [number]

    def count() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise PowerLostError

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*arguments: Any, **more: Any) -> Any:
            count()
            return call(*arguments, **more)

        return instead

    def save_file(tensors: ckpt.Tensors, file: Path) -> None:
        content = safetensors.torch.save(tensors)
        file.write_bytes(content[: len(content) // 2])  # as far as it came
        count()
        file.write_bytes(content)

    def write_text(file: Path, text: str, **_: Any) -> None:
        file.write_bytes(text[: len(text) // 2].encode())
        count()
        file.write_bytes(text.encode())

    def rename(old: Path, new: Path) -> None:
        count()
        real["rename"](old, new)
        committed.append(Path(new))

    real = {name: getattr(os, name) for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")}
    with pytest.MonkeyPatch.context() as patch:
        for name, call in real.items():
            patch.setattr(os, name, counted(call))
        patch.setattr(os, "rename", rename)
        patch.setattr(Path, "write_text", write_text)
        patch.setattr(safetensors.torch, "save_file", save_file)
        with contextlib.suppress(PowerLostError):
            yield committed
