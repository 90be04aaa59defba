"""What a person wrote -> a checked Job: fields, a dict or a YAML file, each fault with its place and its mend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from orchestrator.errors import JobError
from orchestrator.job.faults import Faults
from orchestrator.job.keys import at_home, groups
from orchestrator.job.spec import Job

_RENAMED: Mapping[str, str] = {"training.num_shards": "training.num_microbatches"}
"""Keys of earlier versions -> what they are called now; understood, and said."""


def make_job(job: Job | Mapping[str, Any] | str | Path | None = None, /, **fields: Any) -> Job:
    """A checked Job out of a Job, a dict, the path of a YAML file, or fields alone; fields win.

    A field is a top-level key (`method="full"`), a part (`training={"epochs": 3}`) that is merged into what
    is there, a dotted key (`**{"training.epochs": 3}`), or the name of a setting that one group alone has (`epochs=3`).
    Raises `JobError` with the place of the fault.
    """
    return make_draft(job, fields).job()


@dataclass(frozen=True)
class Draft:
    """A job before it is checked: settings of whatever type, each where it belongs."""

    tree: dict[str, Any]
    source: str
    """The YAML file, '' where there is none."""
    lines: dict[str, int]
    """Dotted key -> its line there."""
    notes: tuple[str, ...] = ()
    """What is to be said of how it was written."""
    of_plugin: tuple[str, ...] = ()
    """Names of the modality's own settings, for one that is misspelt."""

    def job(self) -> Job:
        """The checked job. Raises `JobError`."""
        try:
            made = Job.model_validate(self.tree)
        except ValidationError as error:
            raise Faults(self.source, self.lines, self.of_plugin).as_job_error(error) from None
        made._places.update({key: f"{self.source}:{line}: " for key, line in self.lines.items()})
        made._notes = self.notes
        return made


def make_draft(job: Job | Draft | Mapping[str, Any] | str | Path | None, fields: Mapping[str, Any]) -> Draft:
    """What `make_job` is asked for, unchecked; fields win. Raises `JobError` for what has no place."""
    lines: dict[str, int] = {}
    source = ""
    noted: tuple[str, ...] = ()
    of_plugin: tuple[str, ...] = ()
    if job is None:
        base: dict[str, Any] = {}
    elif isinstance(job, Draft):
        base, source, lines, noted, of_plugin = dict(job.tree), job.source, dict(job.lines), job.notes, job.of_plugin
    elif isinstance(job, Job):
        base = job.model_dump(mode="json", exclude_unset=True)
    elif isinstance(job, Mapping):
        base = {str(k): _text(v) for k, v in job.items()}
    elif isinstance(job, (str, Path)):
        source = str(job)
        base, lines = _read_yaml(Path(job))
    else:
        raise JobError(
            f"a job cannot be made from a {type(job).__name__}",
            expected="Job, dict or YAML path",
            mend="pass one of these, or the fields by name: backbone=..., data=...",
        )
    # Each by itself: a field under its new name wins over a file that has the old one.
    base, notes = _with_new_names(_in_groups(base, lines, source))
    notes = (*noted, *notes)
    for old, new in _RENAMED.items():
        if old in lines:
            lines[new] = lines.pop(old)
    given, moved = at_home(fields, {})
    for name, key in moved.items():
        if key in given:
            raise JobError(f"{name} is {key}, and both are set", mend=f"leave out {name}")
        given[key] = fields[name]
    for key, value in given.items():
        (today, renamed), more = _field_with_new_names(key, value)
        notes = (*notes, *more)
        _put(base, today, renamed)
        lines.pop(today, None)
    return Draft(base, source, lines, tuple(dict.fromkeys(notes)), of_plugin)


def _in_groups(tree: dict[str, Any], lines: dict[str, int], source: str) -> dict[str, Any]:
    """The tree of a file or a dict, with names that stand for one setting of a group put there, and their lines.

    So are dotted ones, as `training.epochs: 3`. Raises `JobError` where the group has it as well.
    """
    for dotted in [key for key in tree if key.partition(".")[0] in (*groups(), "settings") and "." in key]:
        group, _, name = dotted.partition(".")
        there = tree.get(group)
        # data: photos/ is data.path
        if name in (there if isinstance(there, Mapping) else {"path"} if there is not None and group == "data" else ()):
            line = f"{source}:{lines[dotted]}: " if dotted in lines else ""
            raise JobError(
                f"{line}{dotted} stands here, and {name} below {group} as well", mend="take one of the two out"
            )
        tree = dict(tree)
        _put(tree, dotted, tree.pop(dotted))
    kept, moved = at_home(tree, {key: f"{source}:{line}: " for key, line in lines.items()})
    for name, key in moved.items():
        _put(kept, key, tree[name])
        if name in lines:
            lines[key] = lines.pop(name)
    return kept


def _field_with_new_names(key: str, value: object) -> tuple[tuple[str, object], tuple[str, ...]]:
    """((key, value) with the names of today, what to say)."""
    if key in _RENAMED:
        return (_RENAMED[key], value), (_called_now(key),)
    tree, notes = _with_new_names({key: value})
    return (key, tree[key]), notes


def _called_now(old: str) -> str:
    return f"{old} is called {_RENAMED[old]} now"


def _with_new_names(tree: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The tree with keys of earlier versions under today's names, and what to say. Raises `JobError` for both."""
    notes = []
    for old, new in _RENAMED.items():
        part, _, key = old.partition(".")
        settings = tree.get(part)
        if not isinstance(settings, Mapping) or key not in settings:
            continue
        today = new.partition(".")[2]
        if today in settings:
            raise JobError(f"{old} is called {new} now, and both are set", mend=f"leave out {old}")
        renamed = {today if name == key else name: value for name, value in settings.items()}
        tree = {**tree, part: renamed}
        notes.append(_called_now(old))
    return tree, tuple(notes)


def _text(value: Any) -> Any:
    """A path as text, as a file has it; anything else as it is."""
    return str(value) if isinstance(value, PurePath) else value


def _put(tree: dict[str, Any], dotted: str, value: object) -> None:
    """Set `a.b.c` in a tree of dicts; a dict is merged into the dict that is there."""
    *path, last = dotted.split(".")
    value = _text(value)
    for i, key in enumerate(path):
        here = tree.get(key)
        if isinstance(here, (str, Path)) and key == "data":
            here = {"path": str(here)}
        elif here is None:
            here = {}
        elif not isinstance(here, dict):
            raise JobError(
                f"{'.'.join(path[: i + 1])} is no group of settings, so {dotted} cannot be set",
                mend=f"set {'.'.join(path[: i + 1])} itself, or correct the name",
            )
        tree[key] = here = dict(here)
        tree = here
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_unset=True)
    old = tree.get(last)
    if isinstance(value, Mapping) and isinstance(old, dict):
        tree[last] = {**old, **value}
    elif last == "data" and isinstance(value, (str, Path)) and isinstance(old, dict):
        tree[last] = {**old, "path": str(value)}
    else:
        tree[last] = value


def parse_setting(text: str) -> tuple[str, Any]:
    """('training.epochs', 3) out of `training.epochs=3`, the value read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise JobError(f"--set {text!r} sets nothing", expected="key=value", mend="for example --set training.epochs=3")
    try:
        parsed = yaml.safe_load(value)
        # A lone | or > opens a block of text in YAML, an empty one: here it is what was typed.
        return key.strip(), value if parsed == "" and value.strip() in ("|", ">") else parsed
    except (yaml.YAMLError, ValueError):
        return key.strip(), value


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The file as a dict, and the line of each dotted key."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise JobError(f"there is no job file {path}", mend="check the path") from None
    except IsADirectoryError:
        raise JobError(f"{path} is a directory, not a job file", expected="a YAML file", mend=_meant(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path} cannot be read: {error}", expected="a YAML file in UTF-8", mend=_meant(path)) from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or f"not readable as YAML: {error}"
        raise JobError(f"{where}: {problem}", expected="a YAML file", mend=_meant(path)) from None
    if not isinstance(value, dict):
        raise JobError(
            f"{path} holds no settings", expected="a mapping such as 'backbone: microsoft/resnet-50'",
            mend=_meant(path),
        )  # fmt: skip
    lines: dict[str, int] = {}
    _note_lines(node, "", lines, path)
    return {str(key): item for key, item in value.items()}, lines


def _meant(path: Path) -> str:
    """What a file or a folder that is no job file was given for, as far as it tells, else how to mend it."""
    if (path / "job.yaml").is_file():
        return f"to go on with that run: {path / 'job.yaml'}; as the backbone of another: {_as('backbone', path)}"
    if (path / "config.json").is_file():
        return f"if it is the backbone: {_as('backbone', path)}"
    if path.is_dir() or path.suffix.lower() in (".csv", ".tsv", ".parquet", ".jsonl"):
        return f"if it is the data: {_as('data', path)}"
    return "mend the file: one setting a line, as in `method: full`"


def _as(key: str, path: Path) -> str:
    """How it is given from Python, and on the command line."""
    return f"{key}={str(path)!r}, or --{key} {path}"


def _note_lines(node: yaml.Node | None, prefix: str, lines: dict[str, int], path: Path) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, int] = {}  # of this mapping alone: beside {a: {b: 1}} a key may be called a.b
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        line = key.start_mark.line + 1
        if key.value in first:
            raise JobError(
                f"{path}:{line}: {name} stands here a second time (first in line {first[key.value]})",
                mend="take one of the two out",
            )
        first[key.value] = lines[name] = line
        _note_lines(value, f"{name}.", lines, path)
