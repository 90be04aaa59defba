"""A network trained on a thousand classes of photographs becomes a reader of handwritten digits.

    python examples/digits/demo.py            # or: make demo

First the new last layer alone, on 1,000 labels. Then what the idea stands on: `head`, `full` and `scratch` on
the same 100 labels (10 a class), all three judged on the same 1,000 digits that none of them saw.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from make_backbone import make_backbone
from make_data import make_data
from rich.color import ColorSystem
from rich.columns import Columns
from rich.panel import Panel
from rich.text import Text

import orchestrator
from orchestrator.job import Noted
from orchestrator.progress import progress
from orchestrator.tasks import wilson
from orchestrator.terminal.console import out, show_results, table

HERE = Path(__file__).parent
SHADES = " .:-=+*#%@"
SAME: dict[str, Any] = {"training": {"epochs": 20, "batch_size": 16}, "settings": {"augment": "light"}}
METHODS: dict[str, dict[str, Any]] = {
    "head": {"training": {"epochs": 40}},  # seconds in all: the body runs once
    "full": SAME,
    "scratch": SAME,  # the same budget as full; it is the start that differs
}


TITLES = {"head": "the new last layer", "full": "everything, from ImageNet", "scratch": "everything, from nothing"}


def train(method: str, num_train: int, seed: int, storage: Path, name: str) -> orchestrator.Run:
    """One run on `num_train` labels. No label is kept from training: the last epoch counts."""
    more = METHODS[method]
    with progress() as show:
        return orchestrator.finetune(
            backbone=str(HERE / "backbone"),
            data={
                "path": str(HERE / "data"),
                "num_train": num_train,
                "validation_fraction": 0.0,
                "seed": seed,
            },
            method=method,
            training={**more["training"], "seed": seed},
            settings={"size": 64, **more.get("settings", {})},
            storage=str(storage),
            name=name,
            report=lambda event: None if isinstance(event, Noted) else show(event),
        )


def picture(file: Path, truth: str, said: str, score: float) -> Panel:
    """A digit as half-block pixels, in characters where there are no colours, with what the model says of it."""
    from PIL import Image

    image = Image.open(file).resize((14, 14))
    text = Text()
    for y in range(0, 14, 2):
        for x in range(14):
            upper, lower = image.getpixel((x, y)), image.getpixel((x, y + 1))
            if out.color_system in ("truecolor", "256"):
                text.append("▀", style=f"rgb({upper},{upper},{upper}) on rgb({lower},{lower},{lower})")
            else:
                text.append(SHADES[(upper + lower) // 2 * (len(SHADES) - 1) // 255])
        text.append("\n" if y < 12 else "")
    right = said == truth
    title = Text(f"{said}  {score:.2f}", style="green" if right else "red")
    return Panel(text, title=title, subtitle=None if right else f"it is {truth}", width=18)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", type=Path, default=Path("runs/demo"))
    parser.add_argument("--svg", type=Path, help="write the screen as a picture, too")
    parser.add_argument("--seeds", type=int, default=1, help="so many runs a method; their mean is shown")
    given = parser.parse_args()
    started = time.monotonic()
    if given.svg is not None:
        out.record, out._color_system = True, ColorSystem.TRUECOLOR
    make_backbone(HERE / "backbone")
    make_data(HERE / "data")
    storage = given.storage
    if (storage / "results.json").is_file():  # a demo shows the work, so it does it again
        shutil.rmtree(storage)

    out.print("\n[bold]1.[/] ImageNet EfficientNet-Lite0, a new last layer, 1,000 labelled digits\n")
    best = train("head", 1000, 0, storage, "head-1000")
    show_results(best.results)

    labels = f"100 labels, {given.seeds} seed{'s' if given.seeds > 1 else ''}"
    out.print(f"[bold]2.[/] the same 1,000 test digits, but {labels}\n")
    rows, figures = [], []
    for method in METHODS:
        runs = [train(method, 100, seed, storage, f"{method}-100-{seed}") for seed in range(given.seeds)]
        accuracies = [run.results["test"]["accuracy"] for run in runs]
        mean = sum(accuracies) / len(accuracies)
        low, high = wilson(round(1000 * mean), 1000)
        seconds = sum(run.results["seconds"] for run in runs) / len(runs)
        figures.append(
            {
                "method": method, "labels": 100, "accuracy": mean, "accuracies": accuracies,
                "accuracy_95": [low, high], "seconds": seconds,
            }
        )  # fmt: skip
        rows.append([method, f"{mean:.3f}", f"{low:.3f} to {high:.3f}", f"{seconds:.0f}", TITLES[method]])
    out.print(table(["method", "accuracy", "95 % interval", "seconds", "what is trained"], rows, right=(1, 3)))

    files = sorted((HERE / "data" / "test").glob("*/*.png"))
    files = random.Random(1).sample(files, 8)
    found = orchestrator.predict(best, files)
    out.print("[bold]3.[/] some of the test digits, as the first model reads them\n")
    out.print(Columns(picture(f, f.parent.name, p.label, p.score) for f, p in zip(files, found, strict=True)))

    results = {
        "head_1000": best.results["test"],
        "methods_100": figures,
        "seconds": time.monotonic() - started,
    }
    (storage / "results.json").write_text(json.dumps(results, indent=1))
    out.print(
        f"\nmodel    {best.path.relative_to(Path.cwd()) if best.path.is_relative_to(Path.cwd()) else best.path}/model"
    )
    out.print(f"figures  {storage}/results.json")
    out.print(f"next     orchestrator predict {storage}/head-1000 FILE...")
    out.print(f"[dim]{results['seconds']:.0f} s in all[/]")
    if given.svg is not None:
        out.save_svg(str(given.svg), title="make demo")
    return 0


if __name__ == "__main__":
    sys.exit(main())
