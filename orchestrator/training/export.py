"""The best weights -> a Hugging Face directory that serves without this package, its card and lineage."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from orchestrator.job import FIGURES, Plan, figure, interval
from orchestrator.modality import registry
from orchestrator.network import Network, StateDict

_PIPELINES = {
    # What `forward` takes first -> the Hub's name of the task, whatever plugin trained the model.
    "pixel_values": "image-classification",
    "input_values": "audio-classification",
    "input_features": "audio-classification",
    "input_ids": "text-classification",
}
_PIPELINE = """\
from transformers import pipeline

classify = pipeline("{task}", model=".")
classify({what})"""
_OURS = """\
import orchestrator  # with the plugin of the modality {modality}

# The run that this directory lies in; on the command line: orchestrator predict runs/{run} {argument}
orchestrator.predict("..", [{what}])"""


def export(
    network: Network, plan: Plan, results: Mapping[str, Any], lineage: Mapping[str, Any], directory: Path,
    state_dict: StateDict | None = None,
) -> None:  # fmt: skip
    """Write `directory` whole or not at all: model, processor, README.md, lineage.json.

    `state_dict` are the tensors to write, the module's own if left out.
    """
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    network.save(partial, network.module.state_dict() if state_dict is None else state_dict)
    (partial / "lineage.json").write_text(json.dumps(lineage, indent=1, ensure_ascii=False), encoding="utf-8")
    (partial / "README.md").write_text(
        model_card(plan, results, lineage, network.usage, network.library), encoding="utf-8"
    )
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(partial, directory)


def model_card(
    plan: Plan,
    results: Mapping[str, Any],
    lineage: Mapping[str, Any],
    usage: str = "",
    library: str = "transformers",
) -> str:
    """The model card: every field filled from what the run knows, none left blank."""
    task = _PIPELINES.get(next(iter(plan.row.inputs), ""), "")
    split = "test" if "test" in results else "validation"
    figures, shown = results.get(split, {}), FIGURES[plan.job.task]
    front: dict[str, Any] = {"library_name": library}
    if task:
        front["pipeline_tag"] = task
    front["tags"] = ["transfer-learning", plan.job.method]
    if plan.backbone.repo_id and plan.weights == "pretrained":
        front["base_model"] = plan.backbone.repo_id
    license_name = lineage["backbone"].get("license")
    if license_name:
        front["license"] = license_name
    if figures:
        metrics = [{"type": key, "value": round(figures[key], 4)} for _, key in shown if figures.get(key) is not None]
        front["model-index"] = [
            {
                "name": plan.name,
                "results": [
                    {
                        "task": {"type": task or plan.job.modality},
                        "dataset": {"name": Path(plan.job.data.path).name, "type": "private", "split": split},
                        "metrics": metrics,
                    }
                ],
            }
        ]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        f"# {plan.name}",
        "",
    ]
    lines.append(_origin(plan, lineage))
    lines.append("")
    if figures:
        titles, cells = [f"{split} samples"], [str(figures["num_samples"])]
        for title, key in shown:
            titles += [title, "95 % interval"]
            cells += [figure(figures.get(key)), interval(figures, key)]
        kept = [(title, cell) for title, cell in zip(titles, cells, strict=True) if cell]
        lines += [
            "| " + " | ".join(title for title, _ in kept) + " |",
            "|---" * len(kept) + "|",
            "| " + " | ".join(cell for _, cell in kept) + " |",
            "",
        ]
    counts = plan.data.num_samples
    lines += [
        "## Data",
        "",
        f"{counts['train']} training, {counts['validation']} validation and {counts['test']} test samples; "
        f"fingerprint `{plan.data.fingerprint[:16]}`.",
        "",
        f"{len(plan.classes)} {'targets' if plan.job.task == 'regression' else 'classes'}: "
        + ", ".join(escape(name) for name in plan.classes[:50])
        + (" and more" if len(plan.classes) > 50 else "")
        + ".",
        "",
    ]
    if plan.adaptations:
        lines += [
            "What is done to the input:",
            "",
            *(f"- {escape(str(one))}" for one in plan.adaptations),
            "",
        ]
    lines += [
        "## Use",
        "",
        "```python",
        *(usage or _usage(plan, task if library == "transformers" else "")).splitlines(),
        "```",
        "",
        f"Trained with seed {plan.job.training.seed} for {plan.schedule.epochs} epochs, the best of which was "
        f"number {results['best_epoch']}. `lineage.json` has commits, versions and settings.",
        "",
    ]
    return "\n".join(lines)


def _usage(plan: Plan, task: str) -> str:
    """Python that calls the model: through transformers where that has a pipeline for it, else through this package."""
    if task:
        return _PIPELINE.format(task=task, what='"a text"' if task == "text-classification" else '"a file"')
    is_text = registry.get(plan.job.modality).sample[0].kind == "text"
    what, argument = ('"a text"', '"A TEXT"...') if is_text else ('"a file"', "FILE...")
    return _OURS.format(modality=plan.job.modality, run=plan.name, what=what, argument=argument)


def _origin(plan: Plan, lineage: Mapping[str, Any]) -> str:
    source = escape(plan.backbone.source)
    commit = str(plan.backbone.commit or "")[:23]
    if plan.weights == "random":
        network = plan.row.architecture or plan.backbone.model_type
        return f"A `{network}` trained from random weights; the architecture is that of {source}."
    trained = f"{lineage['trained_parameters']:,} parameters were trained, {lineage['frozen_parameters']:,} kept"
    return f"{source} at `{commit}` with a new last layer, method `{plan.job.method}`: {trained}."


def escape(text: str) -> str:
    """Text of the user's (a class name, a path) as Markdown shows it, with no markup of its own."""
    return re.sub(r"([\\`*_{}\[\]<>|#&])", r"\\\1", text).replace("\n", " ")
