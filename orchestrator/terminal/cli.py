"""The command line. It says the same things as Python and YAML; each command imports what it needs."""

from __future__ import annotations

import io
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.errors import (
    REASONS,
    InterruptedRunError,
    JobError,
    OrchestratorError,
    did_you_mean,
    missing_extra,
)
from orchestrator.terminal import (
    cluster_commands,
    feature_commands,
    predict_commands,
    rank_commands,
    run_commands,
    search_commands,
)
from orchestrator.terminal.answers_json import print_json
from orchestrator.terminal.flags import Json, name_flags, takes_flags

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Take a network that was trained on the same kind of input, give it a new last layer, train that layer "
    "or everything, and get a Hugging Face model back.\n\n"
    "Exit codes: 0 done, 1 failed, 2 refused before the start, 130 interrupted (the same command goes on).",
)

JobFile = Annotated[Path | None, typer.Argument(metavar="[JOB.yaml]", help="a job file; flags win over it")]
Fresh = Annotated[bool, typer.Option("--fresh", help="start over, removing what the run holds")]


def _show_version(asked: bool) -> None:
    if asked:
        print(f"orchestrator {version('orchestrator')}")
        raise typer.Exit


@app.callback()
def _before(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version, help="and exit")] = False,
) -> None:
    """What stands before a command."""


@app.command()
@takes_flags()
def finetune(
    fields: dict[str, Any],
    job: JobFile = None,
    fresh: Fresh = False,
    verify_content: Annotated[
        bool, typer.Option("--verify-content", help="read all samples, to find out which features are stored already")
    ] = False,
    json_: Json = False,
) -> None:
    """Train a backbone on your data. The same command again goes on with an unfinished run.

    orchestrator finetune --backbone microsoft/resnet-50 --data photos/

    orchestrator finetune job.yaml --method full --set training.epochs=3
    """
    from orchestrator.terminal import answers
    from orchestrator.train import finetune as run_finetune

    answers.show_run(run_finetune(job, fresh=fresh, verify_content=verify_content, **fields), json_)


@app.command()
@takes_flags(but="--method")
def pretrain(fields: dict[str, Any], job: JobFile = None, fresh: Fresh = False, json_: Json = False) -> None:
    """Train a backbone's architecture from random weights. The run is a backbone for `finetune`.

    orchestrator pretrain --backbone microsoft/resnet-50 --data many-photos/ --name base

    orchestrator finetune --backbone runs/base --data my-photos/
    """
    from orchestrator.terminal import answers
    from orchestrator.train import pretrain as run_pretrain

    answers.show_run(run_pretrain(job, fresh=fresh, **fields), json_)


@app.command()
@takes_flags()
def plan(fields: dict[str, Any], job: JobFile = None, json_: Json = False) -> None:
    """Print what `finetune` would do, and run nothing."""
    from orchestrator.rehearsal import plan as make_plan
    from orchestrator.terminal.console import show_plan

    made = make_plan(job, **fields)
    if json_:
        print_json(made.model_dump(mode="json"), indent=1)
    else:
        show_plan(made)


@app.command()
@takes_flags(
    "--modality", "--task", "--set", "--data", "--input-column", "--label-column", "--label-separator", "--separator",
    "--encoding", "--on-bad-sample", "--size",
)  # fmt: skip
def check(
    fields: dict[str, Any],
    backbone: Annotated[str, typer.Argument(help="org/name[@revision], a directory, or an earlier run")],
    json_: Json = False,
) -> None:
    """Say whether a backbone fits a modality, from its metadata files alone, and what your data is to it.

    orchestrator check microsoft/resnet-50 --modality image

    orchestrator check facebook/wav2vec2-base --modality audio --data recordings/
    """
    from orchestrator.gate import inspect, refuse_unknown_mix
    from orchestrator.job import make_job
    from orchestrator.modality import registry
    from orchestrator.terminal import answers

    job = make_job(**{"data": "-", "backbone": backbone, **fields})
    refuse_unknown_mix(job, registry.get(job.modality))
    checked = inspect(backbone, job.modality, job.data if "data" in fields else None, job.settings, job.task)
    answers.show_backbone(checked, job.modality, json_)


app.command()(search_commands.search)
app.command()(rank_commands.rank)
app.command()(predict_commands.predict)
app.command()(predict_commands.evaluate)
app.command()(cluster_commands.submit)
app.command()(cluster_commands.attach)
app.command()(cluster_commands.status)
app.command()(cluster_commands.logs)
app.command("list")(cluster_commands.list_jobs)
app.command()(cluster_commands.stop)
app.command()(cluster_commands.fetch)


@app.command()
def plugins(
    types: Annotated[str | None, typer.Option(metavar="MODALITY", help="list its model types")] = None,
    json_: Json = False,
) -> None:
    """List the modality plugins: what they take, and which backbones fit."""
    from orchestrator.modality import registry
    from orchestrator.terminal import answers

    if types is not None:
        answers.show_types(types, json_)
    else:
        answers.show_plugins(registry.listings(), json_)


@app.command()
def settings(
    group: Annotated[
        str | None, typer.Argument(help="job, data, training, scaling, or a modality: those of its plugin")
    ] = None,
    json_: Json = False,
) -> None:
    """List what can be set, with what it takes, its default and its meaning.

    orchestrator settings training

    orchestrator settings image
    """
    from orchestrator.job import job_reference, settings_of
    from orchestrator.modality import registry
    from orchestrator.terminal import answers

    groups = dict(job_reference())
    if group is not None and group in groups:
        groups = {group: groups[group]}
    elif group is not None:
        if group not in registry.names():
            names = [*groups, *registry.names()]
            raise JobError(
                f"there is no group of settings {group!r}", expected="one of " + ", ".join(names),
                mend=did_you_mean(group, names) or "orchestrator settings",
            )  # fmt: skip
        groups = {group: settings_of(registry.get(group).settings, "settings.")}
    answers.show_settings(groups, registry.names() if group is None else [], json_)


app.add_typer(run_commands.app, name="runs")
app.add_typer(feature_commands.app, name="features")


@app.command()
def reasons() -> None:
    """List every `reason` that a refusal can have."""
    from orchestrator.terminal.console import out, pairs

    out.print(pairs(list(REASONS.items())))


_UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # click's, wherever this version of typer keeps it


def main() -> None:
    """The entry point: every error becomes a message and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        # Names of files are bytes, and texts hold halves of characters: what a stream cannot take becomes an escape.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))


def _command_of(arguments: list[str]) -> str:
    """The command that was meant, as far as there is one: `orchestrator features prune`."""
    words = ["orchestrator"]
    command: Any = typer.main.get_command(app)
    for word in arguments:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            break
        words.append(word)
    return " ".join(words)


def run(arguments: list[str]) -> int:
    """Run a command; its exit code."""
    as_json = "--json" in arguments
    # OpenMP's threads wait for one another by spinning, which beside other work on the same cores makes torch several
    # times slower. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        if not arguments:
            app(["--help"], standalone_mode=False, prog_name="orchestrator")
            return 2
        code = app(arguments, standalone_mode=False, prog_name="orchestrator")
        if code == InterruptedRunError.exit_code:  # typer makes this of a KeyboardInterrupt, in silence
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except _UsageError as error:
        message = getattr(error, "format_message", error.__str__)().replace(": Value error, ", ": ")  # pydantic's words
        return _fail(JobError(message, mend=f"{_command_of(arguments)} --help"), as_json)
    except OrchestratorError as error:
        return _fail(error, as_json)
    except BrokenPipeError:
        return 0
    except OSError as error:  # one that a run met on its way is a TrainingError by now
        place = error.filename or "the file system"
        return _fail(
            JobError(
                f"{place} cannot be used: {error.strerror or error}", mend="name another place, or make this one usable"
            ),
            as_json,
        )
    except ModuleNotFoundError as error:
        refusal = missing_extra(error)
        if refusal is None:
            raise
        return _fail(refusal, as_json)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(InterruptedRunError("stopped by Ctrl-C", mend="the same command goes on"), as_json)


def _fail(error: OrchestratorError, as_json: bool) -> int:
    if as_json:
        print_json({"accepted": False, **error.as_dict()})
    else:
        from orchestrator.terminal.console import show_error

        # A job file and Python know the settings; who sits at the command line has flags.
        error.message, error.expected, error.mend = map(name_flags, (error.message, error.expected, error.mend))
        show_error(error)
    return error.exit_code


if __name__ == "__main__":
    main()
