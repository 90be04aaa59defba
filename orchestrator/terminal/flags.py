"""The flags that set a job's settings: each said once, and the commands' signatures made out of them."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from orchestrator.job import Setting, parse_setting, setting_of

_JOB = "The job"
_DATA = "Data"
_TRAINING = "Training"
_WHERE = "Where it runs"

Json = Annotated[bool, typer.Option("--json", help="print the result, or the refusal, as JSON")]


@dataclass(frozen=True)
class Flag:
    """A flag, and the setting that it sets."""

    option: str
    setting: str
    """Dotted, as in a job file; '' of --set, which names it itself."""
    panel: str
    help: str | None = None
    kind: Any = str
    metavar: str | None = None

    @property
    def parameter(self) -> str:
        """The name that a function takes it by."""
        return self.option.removeprefix("--").replace("-", "_")

    def as_parameter(self) -> inspect.Parameter:
        """What typer reads."""
        of_the_model = setting_of(f"{self.setting}.path" if self.setting == "data" else self.setting)
        option = typer.Option(
            self.option, help=_help(self, of_the_model), rich_help_panel=self.panel,
            metavar=self.metavar or ("|".join(of_the_model.choices) if of_the_model else None) or None,
        )  # fmt: skip
        return inspect.Parameter(
            self.parameter, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[self.kind | None, option]
        )


def _help(flag: Flag, setting: Setting | None) -> str:
    """What the flag says of itself, or the setting's own meaning; and the default, where that is a value."""
    text = flag.help or (setting.meaning if setting else "")
    return f"{text} [default: {setting.default}]" if setting and setting.default else text


FLAGS = (
    Flag("--backbone", "backbone", _JOB, "org/name[@revision] on the Hub, a directory, or an earlier run"),
    Flag("--method", "method", _JOB,
         "auto: a probe, then everything, if validation prefers it; head: new last layer only; full: everything; "
         "lp-ft: first the one, then the other; lora: head and small matrices beside a frozen transformer's; scratch: "
         "random weights", metavar="METHOD"),
    Flag("--modality", "modality", _JOB, "image, or another that `plugins` lists"),
    Flag("--task", "task", _JOB,
         "single-label: one class a sample; multi-label: any number of them; regression: numbers", metavar="TASK"),
    Flag("--name", "name", _JOB, "of the run; made from the job by default"),
    Flag("--set", "", _JOB, "any setting: training.epochs=3 (repeatable)", list[str], "KEY=VALUE"),
    Flag("--data", "data", _DATA,
         "class folders, a .csv, .parquet or .jsonl, a Hub data set (org/name); a path or a URI (s3://…)"),
    Flag("--input-column", "data.input_column", _DATA,
         "a table's column of paths, bytes or texts (twice for pairs of texts)", list[str]),
    Flag("--label-column", "data.label_column", _DATA,
         "a table's column of labels (repeatable: one column a label or target)", list[str]),
    Flag("--label-separator", "data.label_separator", _DATA, "between several labels of one cell"),
    Flag("--separator", "data.separator", _DATA, "of a CSV or TSV: what separates its cells; tab for a tabulator"),
    Flag("--encoding", "data.encoding", _DATA, "of a CSV, TSV or JSON lines: cp1252 for example"),
    Flag("--split-column", "data.split_column", _DATA, "a table's column that says train, validation or test"),
    Flag("--group-column", "data.group_column", _DATA, "samples of one group stay on one side of every split"),
    Flag("--num-train", "data.num_train", _DATA, "train on so many samples only", int),
    Flag("--on-bad-sample", "data.on_bad_sample", _DATA, "what a broken sample does"),
    Flag("--epochs", "training.epochs", _TRAINING, None, int),
    Flag("--batch-size", "training.batch_size", _TRAINING, None, int),
    Flag("--learning-rate", "training.learning_rate", _TRAINING, None, float),
    Flag("--budget", "training.budget_min", _TRAINING,
         "minutes; fewer epochs where everything takes longer [default: 60 with method auto]", float),
    Flag("--refit", "training.refit", _TRAINING, None, bool),
    Flag("--seed", "training.seed", _TRAINING, None, int),
    Flag("--size", "settings.size", _TRAINING, "input size, where the modality has one", int),
    Flag("--workers", "scaling.num_workers", _WHERE, "more than one: processes on Ray", int),
    Flag("--min-workers", "scaling.min_workers", _WHERE, "elastic: so many go on where nodes are lost", int),
    Flag("--address", "scaling.address", _WHERE, "a Ray cluster; 'local' starts one here"),
    Flag("--storage", "storage", _WHERE, "where the runs lie: a directory or s3://…"),
    Flag("--log", "log", _WHERE, "send epochs and figures to mlflow or wandb as well (repeatable)", list[str],
         "mlflow|wandb"),
    Flag("--feature-store", "feature_store", _WHERE, "s3://…: features of frozen bodies, for other machines too"),
)  # fmt: skip
_OPTIONS = {flag.setting: flag.option for flag in FLAGS if flag.setting} | {"data.path": "--data"}
_DOTTED = "|".join(re.escape(setting) for setting in _OPTIONS if "." in setting)
_PLAIN = "|".join(setting for setting in _OPTIONS if "." not in setting)
# Dotted settings stand for themselves anywhere; `data` and `method` are words, and settings where a fault is told.
_NAMED = re.compile(rf"(?<![\w.-])(?<!--set )(?:(?:{_DOTTED})(?![\w.=])|(?:^|(?<=: ))(?:{_PLAIN})(?= = | is missing))")


def takes_flags(*only: str, but: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: the command takes all flags, or these, and gets as `fields` what was given, {setting: value}."""
    chosen = [flag for flag in FLAGS if (not only or flag.option in only) and flag.option != but]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = dict(inspect.signature(command, eval_str=True).parameters)
        del own["fields"]
        made = [flag.as_parameter() for flag in chosen]

        @functools.wraps(command)
        def with_fields(**given: Any) -> None:
            command(**{name: given[name] for name in own}, fields=_fields(given, chosen))

        positional = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own.values()]
        with_fields.__signature__ = inspect.Signature([*positional, *made])  # type: ignore[attr-defined]
        annotations = {one.name: one.annotation for one in (*positional, *made)}
        with_fields.__annotations__ = {**annotations, "return": None}
        return with_fields

    return decorate


def _fields(given: Mapping[str, Any], chosen: list[Flag]) -> dict[str, Any]:
    """The job's fields out of flags; those that were not given are left out, and --set wins."""
    fields: dict[str, Any] = {}
    for flag in chosen:
        value = given[flag.parameter]
        if flag.setting and value not in (None, []):
            # A column alone is a name, several are a list, as in a job file.
            fields[flag.setting] = value[0] if isinstance(value, list) and len(value) == 1 else value
    return fields | dict(parse_setting(text) for text in given.get("set") or [])


def name_flags(text: str) -> str:
    """A message with the flag behind each setting that has one: `data.label_column (--label-column)`."""

    def named(match: re.Match[str]) -> str:
        setting = match.group()
        option = _OPTIONS[setting]
        if re.search(rf"{option}(?![\w-])", text):
            return setting
        in_brackets = text[: match.start()].endswith("(") and text[match.end() :].startswith(")")
        return f"{setting}, {option}" if in_brackets else f"{setting} ({option})"

    return _NAMED.sub(named, text)
