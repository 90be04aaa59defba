"""The model card: README.md of an exported model, every field filled from what the run knows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from orchestrator.job import OF_TARGETS, Plan, figure, figures_of, interval
from orchestrator.modality import registry
from orchestrator.network import from_pipeline

_PIPELINES = {
    # What `forward` takes first -> the Hub's name of the task, whatever plugin trained the model.
    "pixel_values": "image-classification",
    "input_values": "audio-classification",
    "input_features": "audio-classification",
    "input_ids": "text-classification",
}
_PIPELINE = """\
from transformers import pipeline

{call}"""
_OURS = """\
import orchestrator  # with the plugin of the modality {modality}

# The run that this directory lies in; on the command line: orchestrator predict runs/{run} {argument}
print(orchestrator.predict("..", [{what}]))"""
_MAX_CLASSES = 50


def model_card(
    plan: Plan,
    results: Mapping[str, Any],
    lineage: Mapping[str, Any],
    usage: str = "",
    library: str = "transformers",
) -> str:
    """Markdown with a YAML header, as the Hub has it.

    `usage` is Python that calls the model, where the plugin knows it; `library` is the Hub's name of what loads it.
    """
    task = _PIPELINES.get(next(iter(plan.row.inputs), ""), "")
    split = "test" if "test" in results else "validation"
    figures = results.get(split, {})
    header = yaml.safe_dump(_header(plan, lineage, task, library, split, figures), sort_keys=False, allow_unicode=True)
    lines = [
        "---",
        header.rstrip(),
        "---",
        f"# {plan.name}",
        "",
        _origin(plan, lineage),
        "",
        *(_table_of(plan, split, figures) if figures else ()),
        *_data(plan),
        "## Use",
        "",
        "```python",
        *(usage or _usage(plan, task if library == "transformers" else "")).splitlines(),
        "```",
        "",
        f"Trained with seed {plan.job.training.seed} for {results.get('epochs', plan.recipe.num_epochs)} epochs; "
        f"the weights are those of number {results['best_epoch']}. `lineage.json` has commits, versions and settings.",
        "",
    ]
    return "\n".join(lines)


def _header(
    plan: Plan, lineage: Mapping[str, Any], task: str, library: str, split: str, figures: Mapping[str, Any]
) -> dict[str, Any]:
    """What the Hub reads. Its model-index has the figures of the split."""
    header: dict[str, Any] = {"library_name": library}
    if task:
        header["pipeline_tag"] = task
    header["tags"] = ["transfer-learning", plan.job.method]
    if plan.backbone.repo_id and plan.weights == "pretrained":
        header["base_model"] = plan.backbone.repo_id
    license_name = lineage["backbone"].get("license")
    if license_name:
        header["license"] = license_name
    if figures:
        keys = [key for _, key in figures_of(plan.job.task, figures) if figures.get(key) is not None]
        result = {
            "task": {"type": task or plan.job.modality},
            "dataset": {"name": Path(plan.job.data.path).name, "type": "private", "split": split},
            "metrics": [{"type": key, "value": round(figures[key], 4)} for key in keys],
        }
        header["model-index"] = [{"name": plan.name, "results": [result]}]
    return header


def _origin(plan: Plan, lineage: Mapping[str, Any]) -> str:
    source = escape(plan.backbone.repo_id or plan.backbone.name)  # where it lay on this machine is nobody's business
    commit = str(plan.backbone.commit or "")[:23]
    if plan.weights == "random":
        network = plan.row.architecture or plan.backbone.model_type
        return f"A `{network}` trained from random weights; the architecture is that of {source}."
    trained = f"{lineage['trained_parameters']:,} parameters were trained, {lineage['frozen_parameters']:,} kept"
    return f"{source} at `{commit}` with a new last layer, method `{plan.job.method}`: {trained}."


def _table_of(plan: Plan, split: str, figures: Mapping[str, Any]) -> list[str]:
    columns = [(f"{split} samples", str(figures["num_samples"]))]
    for title, key in figures_of(plan.job.task, figures):
        columns += [(title, figure(figures.get(key))), ("95 % interval", interval(figures, key))]
    shown = [(title, cell) for title, cell in columns if cell]
    lines = [*_rows([title for title, _ in shown], [[cell for _, cell in shown]]), ""]
    if plan.job.task == "regression" and len(plan.classes) > 1:  # which have no MAE in common
        rows = [[escape(name), *(figure(one.get(key)) for _, key in OF_TARGETS)]
                for name, one in list(figures["per_class"].items())[:_MAX_CLASSES]]  # fmt: skip
        lines += [*_rows(["target", *(title for title, _ in OF_TARGETS)], rows), ""]
    return lines


def _rows(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown."""
    return ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|", *("| " + " | ".join(r) + " |" for r in rows)]


def _data(plan: Plan) -> list[str]:
    """How much data of which classes, and what is done to it."""
    counts, what = plan.data.num_samples, "targets" if plan.job.task == "regression" else "classes"
    names = ", ".join(escape(name) for name in plan.classes[:_MAX_CLASSES])
    lines = [
        "## Data",
        "",
        f"{counts['train']} training, {counts['validation']} validation and {counts['test']} test samples; "
        f"fingerprint `{plan.data.fingerprint[:16]}`.",
        "",
        f"{len(plan.classes)} {what}: {names}" + (" and more" if len(plan.classes) > _MAX_CLASSES else "") + ".",
        "",
    ]
    if plan.adaptations:
        lines += ["What is done to the input:", "", *(f"- {escape(str(one))}" for one in plan.adaptations), ""]
    return lines


def _usage(plan: Plan, task: str) -> str:
    """Python that calls the model: through transformers where that has a pipeline for it, else through this package."""
    if task:
        what, more = ('"a text"', ", truncation=True") if task == "text-classification" else ('"a file"', "")
        return _PIPELINE.format(call=from_pipeline(plan.job.task, task, len(plan.classes), what, more))
    is_text = registry.get(plan.job.modality).sample[0].kind == "text"
    what, argument = ('"a text"', '"A TEXT"...') if is_text else ('"a file"', "FILE...")
    return _OURS.format(modality=plan.job.modality, run=plan.name, what=what, argument=argument)


def escape(text: str) -> str:
    """Text of the user's (a class name, a path) as Markdown shows it, with no markup of its own."""
    return re.sub(r"([\\`*_{}\[\]<>|#&])", r"\\\1", text).replace("\n", " ")
