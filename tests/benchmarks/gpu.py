"""Full fine-tuning of ResNet-50 on a GPU, in its steady state, against a plain loop: make bench NAME=gpu

Digits as JPEG files of 256 pixels, prepared to 224, batches of 128, bfloat16, fused AdamW, channels last, as they are
and with the augmentation that is the default. The loop reads with a DataLoader of one process a core but one, which pin
their batches. The weights are random: speed does not depend on them. Goal: 0.90 of the loop's samples a second, and
the network alone, on one batch that is there, is told beside it. Needs a GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.benchmarks.harness import THREADS, options, paired, report, silent
from tests.benchmarks.peers import DIGITS, make_digits

GOAL, REPEATS, BATCH_SIZE, EDGE, EPOCHS = 0.90, 1, 128, 224, 5


def make_data(folder: Path, num: int) -> tuple[Path, Path]:
    """(class folders of JPEG files, a backbone in Hub layout)"""
    import torch
    import transformers
    from PIL import Image

    files = sorted((DIGITS / "data").rglob("*.png"))

    def write(number: int) -> None:
        file = files[number % len(files)]
        target = folder / "data" / file.parent.name / f"{number}.jpg"
        image = Image.open(file).convert("RGB").resize((256, 256), Image.Resampling.BICUBIC)
        image.rotate(number // len(files), fillcolor="black").save(target, quality=90)

    for name in {file.parent.name for file in files}:
        (folder / "data" / name).mkdir(parents=True)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(write, range(num)))
    torch.manual_seed(0)
    transformers.ResNetModel(transformers.ResNetConfig()).save_pretrained(folder / "backbone")
    transformers.ConvNextImageProcessor(size={"shortest_edge": EDGE}, crop_pct=1.0).save_pretrained(folder / "backbone")
    return folder / "data", folder / "backbone"


def ours(data: Path, backbone: Path, storage: Path, augment: str | None) -> list[float]:
    """Samples a second of each epoch but the first two, in which readers start."""
    import orchestrator

    run = orchestrator.finetune(
        backbone=str(backbone),
        data={"path": str(data), "validation_fraction": 0.0, "test_fraction": 0.0},
        method="full",
        training={"epochs": EPOCHS, "batch_size": BATCH_SIZE, "clip_norm": None, "checkpoint_every_s": 1e9},
        settings={} if augment is None else {"augment": augment},
        scaling={"device": "gpu"},
        storage=str(storage),
        report=silent,
    )
    return [line["samples_per_s"] for line in run.metrics[2:]]


class Files:
    """Images and their classes, prepared as the loop's author would."""

    def __init__(self, data: Path, augmented: bool) -> None:
        import torch
        from torchvision.transforms import v2

        self.files = sorted(data.rglob("*.jpg"))
        random = [v2.RandomAffine(10, (0.08, 0.08), (0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR),
                  v2.ColorJitter(brightness=0.2, contrast=0.2)]  # fmt: skip
        steps = [v2.Resize(EDGE), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                 v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]  # fmt: skip
        self.transform = v2.Compose([*(random if augmented else []), *steps])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        from PIL import Image

        file = self.files[number]
        return self.transform(Image.open(file).convert("RGB")), int(file.parent.name)


def stepping(backbone: Path) -> Callable[[Any, Any], None]:
    """One step of a plain loop on a batch that is on the device."""
    import torch
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(backbone, num_labels=10).cuda().train()
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(pixels: Any, classes: Any) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(pixel_values=pixels.contiguous(memory_format=torch.channels_last)).logits
        torch.nn.functional.cross_entropy(logits.float(), classes).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def timed(batches: Iterator[tuple[Any, Any]], step: Callable[[Any, Any], None]) -> float:
    """Samples a second."""
    import torch

    torch.cuda.synchronize()
    began, num = time.monotonic(), 0
    for pixels, classes in batches:
        step(pixels.cuda(non_blocking=True), classes.cuda(non_blocking=True))
        num += len(classes)
    torch.cuda.synchronize()
    return num / (time.monotonic() - began)


def loop(data: Path, backbone: Path, augmented: bool) -> list[float]:
    """Samples a second of each epoch but the first."""
    from torch.utils.data import DataLoader

    step = stepping(backbone)
    loader: Any = DataLoader(
        Files(data, augmented), BATCH_SIZE, shuffle=True, num_workers=max(1, THREADS - 1), pin_memory=True,
        drop_last=True, persistent_workers=True,
    )  # type: ignore[arg-type]  # fmt: skip
    return [timed(iter(loader), step) for _ in range(EPOCHS - 2)][1:]


def alone(backbone: Path) -> float:
    """Samples a second of the network, on one batch that is there."""
    import torch

    batch = torch.randn(BATCH_SIZE, 3, EDGE, EDGE, device="cuda"), torch.randint(0, 10, (BATCH_SIZE,), device="cuda")
    step = stepping(backbone)
    timed(iter([batch] * 5), step)
    return timed(iter([batch] * 30), step)


def main() -> None:
    parser = options(__doc__, REPEATS)
    parser.add_argument("--samples", type=int, default=6000)
    given = parser.parse_args()
    make_digits()
    rows, figures = [], {}
    with TemporaryDirectory() as folder:
        data, backbone = make_data(Path(folder), given.samples)
        figures["alone"] = round(alone(backbone))
        for name, augment in (("as they are", "none"), ("with the default augmentation", None)):
            speeds: dict[str, list[float]] = {"ours": [], "loop": []}
            for repeat in range(given.repeats):
                storage = Path(folder) / f"runs-{augment}-{repeat}"
                speeds["ours"].append(statistics.median(ours(data, backbone, storage, augment)))
                speeds["loop"].append(statistics.median(loop(data, backbone, augment is None)))
                print(f"{repeat + 1}. {name}: " + ", ".join(f"{side} {of[-1]:.0f}" for side, of in speeds.items()))
            rows.append((f"our samples a second over the loop's, {name}", paired(*speeds.values()), GOAL, True))
            figures |= {f"{side}, {name}": [round(one) for one in found] for side, found in speeds.items()}
    report("gpu", rows, **figures)


if __name__ == "__main__":
    main()
