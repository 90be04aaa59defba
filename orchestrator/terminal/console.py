"""What a person sees in a terminal: plans, results, refusals. Reads well at 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from orchestrator.errors import OrchestratorError, counted, marked
from orchestrator.job import OF_TARGETS, Parameters, Phase, Plan, Training, figure, figures_of, interval
from orchestrator.progress import err

out = Console(highlight=False, emoji=False)


def _body_runs(plan: Plan, phase: Phase) -> str:
    if phase.source != "features":
        return "in every step"
    where = f", in {plan.num_extractors} processes of Ray's" if plan.num_extractors else ""
    return f"once for each sample{where}" + (f"; kept in {plan.job.feature_store}" if plan.job.feature_store else "")


def show_error(error: OrchestratorError) -> None:
    """What happened, what was expected, and the mend."""
    if error.exit_code == 130:  # its reason and its message say the same
        err.print(Text(error.message, style="bold red"))
    else:
        word = "refused" if error.exit_code == 2 else "failed"
        err.print(Text.assemble((f"{word} ", "bold red"), (f"({error.reason}) ", "red"), error.message))
    if error.expected:
        err.print(Text.assemble(("expected ", "bold"), error.expected))
    if error.mend:
        err.print(Text.assemble(("mend     ", "bold green"), error.mend))


def table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[int] = (), whole: Sequence[int] = ()
) -> Table:
    """A plain table; columns numbered in `right` are numbers, those in `whole` break no line of theirs."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        justify: JustifyMethod = "right" if i in right else "left"
        made.add_column(escape(column), justify=justify, overflow="fold", no_wrap=i in whole)
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else escape(str(cell)) for cell in row))
    return made


def pairs(rows: Sequence[tuple[str, object]]) -> Table:
    """Names and what they are, one a line."""
    made = Table(box=None, show_header=False, pad_edge=False)
    made.add_column(style="bold")
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(name, value if isinstance(value, Text) else escape(str(value)))
    return made


def show_plan(plan: Plan) -> None:
    """A Plan as a person reads it."""
    card, counts = plan.backbone, plan.data.num_samples
    rows: list[tuple[str, object]] = [
        ("run", plan.name),
        ("backbone", f"{card.source} @ {card.short_commit} ({card.model_type}, {card.kind})"),
        ("method", plan.job.method),
        ("task", plan.job.task),
        ("targets" if plan.job.task == "regression" else "classes", f"{len(plan.classes)}: {_some(plan.classes, 10)}"),
        ("samples", f"train {counts['train']}, validation {counts['validation']}, test {counts['test']}"),
        *_balance(plan),
        ("input", settings_line(plan.input)),
        *(("adapted", str(one)) for one in plan.adaptations),
        *(("tried", one) for one in plan.rehearsal),
        *(("warning", one) for one in (*plan.warnings, *plan.data.warnings)),
        *(("note", one) for one in plan.data.notes),
    ]
    if plan.data.left_out:
        rows.append(("left out", plan.data.left_out))
    if plan.parameters is not None:
        rows += _size(plan.parameters)
    for phase in plan.recipe.phases:
        if not phase.refits:
            rows += _phase(plan, phase)
    if any(phase.refits for phase in plan.recipe.phases):
        rows.append(("refit", "all of that again on training and validation samples, up to the best epoch"))
    threads = f"{plan.threads_per_worker}" if plan.threads_per_worker else "the node's"
    scaling = plan.job.scaling
    workers = f"{scaling.min_workers} to {plan.num_workers}" if scaling.is_elastic else f"{plan.num_workers}"
    rows.append(("workers", f"{workers} x {threads} threads, {'on Ray' if plan.ray else 'in this process'}"))
    if plan.num_workers > 1:
        after = plan.exchange_timeout_s // 60
        after_words = f"{after} minutes" if after < 120 else f"{after // 60} hours"
        why = ", since each runs the frozen body over its share first" if plan.recipe.needs_features else ""
        rows.append(("", f"one that hangs ends the others after {after_words}{why}"))
    if plan.job.log:
        rows.append(("sent to", ", ".join(plan.job.log)))
    out.print(pairs(rows))


def _phase(plan: Plan, phase: Phase) -> list[tuple[str, object]]:
    recipe = plan.recipe
    if phase.solver == "probe":
        fit = f"the head at once, cross-validated (in {phase.epochs_in_steps} epochs if it is not one layer)"
        return [("training", fit), ("body runs", _body_runs(plan, phase))]
    rows: list[tuple[str, object]] = [
        ("training", f"{phase.epochs} epochs x {recipe.steps_per_epoch} steps of {recipe.batch_size} samples"),
        ("optimizer", plan.job.training.optimizer),
    ]
    if phase.loss == "contrastive":
        rows.insert(0, ("loss", "how far samples of a class are apart; the head is fitted behind it"))
    if phase.trains == "head":  # a frozen body has no rate of its own, and nothing else to decide
        rows.append(("rate", f"{phase.head_learning_rate:g}"))
    else:
        body = "adapter" if phase.adapter else "body"
        head = f", head {phase.head_learning_rate:g}" if phase.loss == "task" else ""
        rows.append(("rates", f"{body} {phase.learning_rate:g}{head}"))
        if phase.adapter:
            rows.append(("adapter", f"rank {phase.adapter.rank}, alpha {phase.adapter.alpha:g}; merged in the end"))
        if phase.batch_norm != "none":
            unknown = ", where the network has it" if plan.weights == "random" else ""
            rows.append(("BatchNorm", f"{phase.batch_norm}{unknown}"))
    if phase.trains != "head" and recipe.budget_s is not None:
        rows.append(("budget", f"{recipe.budget_s / 60:g} minutes: fewer epochs where the first steps are too slow"))
    rows += [*_augmented(plan, phase), *_asked_for(plan.job.training, phase), ("body runs", _body_runs(plan, phase))]
    if phase.must_win:
        rows.append(("kept", _kept(plan)))
    return rows


def _kept(plan: Plan) -> str:
    if plan.data.num_samples["validation"]:
        return "what validation prefers, epoch by epoch; against the head alone beyond its noise"
    return "the last epoch: there is no validation split"


def _augmented(plan: Plan, phase: Phase) -> list[tuple[str, object]]:
    """How a phase's samples are changed at random, as far as settings of the plugin's say it."""
    how = {name: plan.input.get(name) for name in plan.augmentation if plan.input.get(name) not in (None, "none")}
    if phase.source != "samples" or not how:
        return []
    asked = any(plan.job.settings.get(name) is not None for name in how)
    as_they_are = ", ".join(f"settings.{name}=none" for name in how)
    return [("augmented", settings_line(how) + ("" if asked else f", by default (samples as they are: {as_they_are})"))]


def _asked_for(training: Training, phase: Phase) -> list[tuple[str, object]]:
    """What is off by default."""
    rows: list[tuple[str, object]] = []
    if training.mix != "none" and phase.source == "samples":
        rows.append(("mixed", f"samples of a batch, by {training.mix}"))
    if training.ema is not None:
        rows.append(("average", f"of the weights, decay {training.ema:g}; kept where validation prefers it"))
    if training.patience is not None:
        rows.append(("ends", f"after {counted(training.patience, 'epoch')} without a better one"))
    return rows


def _size(p: Parameters) -> list[tuple[str, object]]:
    """What is trained and what that takes; a head that the checkpoint does not hold has no number yet."""
    if p.head_known:
        trained, memory = f"{p.trained:,} trained" + (f", {p.frozen:,} frozen" if p.frozen else ""), ""
    else:
        trained = f"{p.trained:,} and a new head trained" if p.trained else f"a new head trained, {p.frozen:,} frozen"
        memory = ", and what the new head takes"
    sizes = [("weights", p.weights_bytes), ("gradients", p.gradients_bytes), ("optimizer", p.optimizer_bytes)]
    return [
        ("parameters", trained),
        ("memory", ", ".join(f"{what} {_mb(size)}" for what, size in sizes if size) + memory),
    ]


def _balance(plan: Plan) -> list[tuple[str, object]]:
    """How many training samples a class has, or where the targets lie."""
    if plan.job.task == "regression":
        data = plan.data
        return [
            (name, f"{figure(mean)}, deviation {figure(std)}, in train")
            for name, mean, std in zip(plan.classes, data.target_mean, data.target_std, strict=True)
        ]
    weighed = ""
    if plan.class_weights:
        weighed = f"; weighed {figure(min(plan.class_weights))} to {figure(max(plan.class_weights))} in the loss"
    return [("a class", _spread(plan.data.per_class["train"]) + " in train" + weighed)]


def settings_line(settings: Mapping[str, Any]) -> str:
    """The resolved input settings on one line: `size 64 x 64, channels 3`."""
    return ", ".join(
        f"{key} {' x '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"
        for key, value in settings.items()
    )


def cut_middle(text: str, width: int) -> str:
    """The text on one line, its middle left out where it is wider than `width`: `recordings/a…b/left.wav`."""
    text = " ".join(text.split())
    if cell_len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{set_cell_size(text, width - 1 - tail).rstrip()}…{set_cell_size(text[::-1], tail)[::-1].lstrip()}"


def when(seconds: float) -> str:
    """A time in seconds since 1970, by the clock of this place: `2026-11-26 03:20`."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def _some(names: Sequence[str], num: int) -> str:
    return ", ".join(map(marked, names[:num])) + (f" and {len(names) - num} more" if len(names) > num else "")


def _spread(counts: Sequence[int]) -> str:
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _mb(num: int) -> str:
    return f"{num / 2**20:,.1f} MB"


def show_targets(splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Of several targets each with its own figures: there is no mean of kilograms and metres."""
    rows = []
    for split, one in splits.items():
        targets = one.get("per_class")
        if one.get("mae") is None and isinstance(targets, Mapping):
            rows += [
                [name, split, *(figure(of.get(key)) for _, key in OF_TARGETS)]
                for name, of in targets.items() if isinstance(of, Mapping)
            ]  # fmt: skip
    if rows:
        out.print(table(["target", "split", *(title for title, _ in OF_TARGETS)], rows, right=(2, 3, 4, 5)))


def show_results(results: Mapping[str, Any]) -> None:
    """The final figures of a run."""
    splits = {split: results[split] for split in ("validation", "test", "data") if split in results}
    rows, shown = [], figures_of(results.get("task", "single-label"), *splits.values())
    for split, one in splits.items():
        if one:
            values = [figure(one.get(key)) for _, key in shown]
            rows.append([split, one["num_samples"], values[0], interval(one, shown[0][1]), *values[1:]])
    if rows:
        titles = [title for title, _ in shown]
        out.print(table(["split", "samples", titles[0], "95 % interval", *titles[1:]], rows, (1, 2, 4, 5, 6)))
        show_targets(splits)
    else:
        out.print("no sample was held back, so there are no figures")
    if "chosen" in results:
        out.print(pairs([("chosen", results["chosen"]), ("why", results["why"])]))
    if "refitted" in results:
        out.print(pairs([("refitted", results["refitted"])]))
    if results.get("num_skipped"):
        out.print(f"left out: {counted(results['num_skipped'], 'sample')}; skipped.jsonl in the run says why")
