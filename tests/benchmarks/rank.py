"""Which backbone to take: make bench NAME=rank

EfficientNet-Lite0, Lite1, Lite2 and a random one on 2,000 digits at 96 px; all-MiniLM-L6-v2 and a random BERT of its
size on 2,000 glosses of 25 classes. Ours: one `rank` on a new storage. Against it: a new head trained on each, every
one on a storage of its own, so that each computes its features. Goals: less time than that; and the ranking's order is
that of the test accuracies of full fine-tuning (RUN="--epochs N"), for each two whose 95 % intervals do not overlap.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import in_turn, middle, options, paired, report, silent
from tests.benchmarks.peers import DIGITS, GLOSSES, make_digits, make_glosses

GOAL, REPEATS = 1.0, 3
NUM_TRAIN = 2_000


def random_like(directory: Path, out: Path) -> Path:
    """The same files, with weights as before any training."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModel

    shutil.copytree(directory, out)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(directory)
    fresh = AutoModel.from_config(config).state_dict()
    theirs = load_file(directory / "model.safetensors")
    ours = {name: fresh.get(name, fresh.get(f"timm_model.{name}", value)) for name, value in theirs.items()}
    assert any(not torch.equal(ours[name], theirs[name]) for name in theirs)
    save_file({name: value.contiguous() for name, value in ours.items()}, out / "model.safetensors", {"format": "pt"})
    return out


def images(folder: Path) -> tuple[list[Path], dict[str, Any]]:
    """(backbones, the job but for its backbone)."""
    import runpy

    make_digits()
    make = runpy.run_path(str(DIGITS / "make_backbone.py"))["make_backbone"]
    backbones = [make(folder / f"efficientnet-lite{number}", number) for number in range(3)]
    backbones.append(random_like(backbones[0], folder / "random-lite0"))
    data = {"path": str(DIGITS / "data"), "validation_fraction": 0.0, "num_train": NUM_TRAIN}
    return backbones, {"data": data, "settings": {"size": 96}}


def texts(folder: Path) -> tuple[list[Path], dict[str, Any]]:
    """The same of glosses."""
    table = make_glosses(NUM_TRAIN)
    backbones = [Path(shutil.copytree(GLOSSES / "backbone", folder / "minilm"))]
    backbones.append(random_like(backbones[0], folder / "random-bert"))
    data = {"path": str(table), "split_column": "split", "validation_fraction": 0.0}
    return backbones, {"data": data, "modality": "text"}


def ranking(backbones: list[Path], job: dict[str, Any], storage: str) -> dict[str, Any]:
    """{backbone: its row} of one ranking."""
    import orchestrator

    table = orchestrator.rank([str(one) for one in backbones], report=silent, storage=storage, **job)
    return {row.name: row for row in table.rows}


def heads(backbones: list[Path], job: dict[str, Any], storage: str) -> dict[str, float]:
    """{backbone: test accuracy} of a new head on each, nothing of which is stored."""
    import orchestrator

    return {
        one.name: orchestrator.finetune(
            backbone=str(one), method="head", report=silent, storage=f"{storage}/{one.name}", **job
        ).accuracy
        for one in backbones
    }


def fully(backbones: list[Path], job: dict[str, Any], storage: str, epochs: int | None) -> dict[str, dict[str, Any]]:
    """{backbone: its test figures} after full fine-tuning."""
    import orchestrator

    training = {"training": {"epochs": epochs}} if epochs else {}
    return {
        one.name: orchestrator.finetune(
            backbone=str(one), method="full", report=silent, storage=f"{storage}/{one.name}", **training, **job
        ).figures
        for one in backbones
    }


def contradictions(rows: dict[str, Any], full: dict[str, dict[str, Any]]) -> list[str]:
    """The pairs whose intervals after full fine-tuning lie apart, and that the ranking has the other way round."""
    found = []
    for one, other in itertools.permutations(full, 2):
        better, worse = (full[name]["accuracy_95"] for name in (one, other))
        if better[0] > worse[1] and rows[one].score < rows[other].score:
            found.append(f"{one} is better than {other} when fully fine-tuned, and ranked behind it")
    return found


def main() -> None:
    parser = options(__doc__, REPEATS)
    parser.add_argument("--epochs", type=int, help="of full fine-tuning; default: the method's")
    parser.add_argument("--only", choices=("images", "texts"))
    given = parser.parse_args()
    rows, more, wrong = [], {}, []
    with tempfile.TemporaryDirectory() as folder:
        for what, make in (("images", images), ("texts", texts)):
            if given.only not in (None, what):
                continue
            place = Path(folder, what)
            place.mkdir()
            backbones, job = make(place)
            heads(backbones[:1], job | {"training": {"epochs": 1}}, f"{place}/warm-up")  # imports, files in the cache
            sides = {
                "ours": lambda i, b=backbones, j=job, p=place: ranking(b, j, f"{p}/ours-{i}"),
                "heads": lambda i, b=backbones, j=job, p=place: heads(b, j, f"{p}/heads-{i}"),
            }
            seconds, found = in_turn(sides, given.repeats, lambda one: json.dumps(list(one)))
            rows.append(
                (f"a ranking's time over the heads', {what}", paired(seconds["ours"], seconds["heads"]), GOAL, False)
            )
            full = fully(backbones, job, f"{place}/full", given.epochs)
            ranked = found["ours"][-1]
            wrong += contradictions(ranked, full)
            more[what] = {"ours_s": middle(seconds["ours"]), "heads_s": middle(seconds["heads"])}
            more[f"{what}_found"] = {
                name: {
                    "probe": row.score, "neighbours": row.neighbours, "samples": row.num_samples,
                    "head": found["heads"][-1][name], "expected_min": row.full_minutes,
                    "full": full[name]["accuracy"], "full_95": full[name]["accuracy_95"],
                }
                for name, row in ranked.items()
            }  # fmt: skip
    rows.append(("pairs that the ranking has the wrong way round", float(len(wrong)), 0.0, False))
    report("rank", rows, wrong=wrong, **more)


if __name__ == "__main__":
    main()
