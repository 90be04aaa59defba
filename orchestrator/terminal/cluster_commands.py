"""Commands for jobs on a cluster: `submit`, `status`, `logs`, `list`, `stop`, `fetch`, `attach`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orchestrator.errors import OrchestratorError, RefusedError
from orchestrator.terminal.answers_json import print_json
from orchestrator.terminal.console import out, pairs, show_results, table, when
from orchestrator.terminal.flags import Json, takes_flags
from orchestrator.terminal.rank_commands import show_ranking
from orchestrator.terminal.search_commands import show_trials

if TYPE_CHECKING:
    from orchestrator.distributed.preflight import Preflight
    from orchestrator.remote import RemoteRun

Address = Annotated[
    str | None, typer.Option("--address", help="the head's dashboard, http://HOST:8265 [default: RAY_ADDRESS]")
]
Name = Annotated[str, typer.Argument(metavar="RUN", help="the run's name, or a job's id")]
Kind = Literal["finetune", "pretrain", "search", "rank"]
Part = Literal["all", "model", "results"]


@takes_flags(but="--address")
def submit(
    fields: dict[str, Any],
    job: Annotated[Path | None, typer.Argument(metavar="[JOB.yaml]", help="a job file; flags win over it")] = None,
    address: Address = None,
    kind: Annotated[Kind, typer.Option(help="what to run there")] = "finetune",
    fresh: Annotated[bool, typer.Option("--fresh", help="start over, removing what the run holds")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="return once it has started")] = False,
    fetch: Annotated[Path | None, typer.Option(help="the folder to copy the run to, once it is done")] = None,
    json_: Json = False,
) -> None:
    """Run a job on a cluster, and follow it. It goes on there whatever becomes of this machine.

    orchestrator submit job.yaml --address http://HEAD:8265 --storage /shared/runs

    orchestrator submit job.yaml --workers 4 --detach

    orchestrator submit job.yaml --kind search --set search.num_trials=8     (the space is the file's block `search`)
    """
    from orchestrator.remote import require_place
    from orchestrator.submission import submit as submit_job

    if fetch is not None:  # before hours of training
        if kind == "rank":
            raise RefusedError(
                "usage", "a ranking has no run that could be fetched", expected="a job that trains",
                mend="leave --fetch out: its table is shown at its end, and by orchestrator attach",
            )  # fmt: skip
        require_place(fetch)
    found = None if json_ else _show_preflight
    remote = submit_job(job, address=address, kind=kind, fresh=fresh, found=found, **fields)
    if detach:
        with remote.left_running():
            _show_job(remote, remote.status(), json_)
        return
    results = remote.follow()
    try:
        copy = None if fetch is None else str(remote.fetch(fetch).path)
    except OrchestratorError:
        if not json_:  # which is one answer: the error
            _show_end(remote, results, json_, None)
        raise
    _show_end(remote, results, json_, copy)


def attach(name: Name, address: Address = None, json_: Json = False) -> None:
    """Show a job on a cluster from its first epoch on, until it ends. Ctrl-C leaves it running."""
    from orchestrator.remote import attach as attach_to

    remote = attach_to(name, address=address)
    _show_end(remote, remote.follow(), json_, None)


def status(name: Name, address: Address = None, json_: Json = False) -> None:
    """Say how far a job on a cluster is."""
    from orchestrator.remote import attach as attach_to

    remote = attach_to(name, address=address)
    _show_job(remote, remote.status(), json_)


def logs(
    name: Name,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="until the job ends")] = False,
    json_: Annotated[bool, typer.Option("--json", help="print the lines as the job wrote them")] = False,
) -> None:
    """Print what a job on a cluster has written: its events in words, and what libraries print."""
    from orchestrator.remote import attach as attach_to

    remote = attach_to(name, address=address)
    for line in remote.lines() if follow else remote.lines_so_far():
        said = line if json_ else _in_words(line)
        if said is not None:
            print(said, flush=follow)


def list_jobs(address: Address = None, json_: Json = False) -> None:
    """List the jobs that were submitted to a cluster, the newest first."""
    from orchestrator.remote import remote_runs

    found = remote_runs(address=address)
    if json_:
        print_json([
            {"run": one.name, "id": one.id, "kind": one.kind, "attempt": one.attempt, "storage": one.storage,
             "state": job.state, "started": when(job.started), "ended": when(job.ended) if job.ended else None}
            for one, job in found
        ])  # fmt: skip
        return
    if not found:
        out.print("no job was submitted to this cluster")
        return
    cells = [[f"{one.name}\n  {one.kind} {one.id}, in {one.storage}", job.state, one.attempt, when(job.started)]
             for one, job in found]  # fmt: skip
    out.print(table(["run", "state", "attempt", "started"], cells, right=(2,), whole=(1, 3)))


def stop(name: Name, address: Address = None, json_: Json = False) -> None:
    """Stop a job on a cluster behind its step: its run can go on."""
    from orchestrator.remote import attach as attach_to

    remote = attach_to(name, address=address)
    state = remote.stop()
    if json_:
        print_json({"run": remote.name, "id": remote.id, "state": state})
    elif state == "finished":
        out.print(f"{remote.name} had finished", markup=False)
    else:
        out.print(f"{remote.name} has {state}; the same job, submitted again, goes on", markup=False, soft_wrap=True)


def fetch(
    name: Name,
    to: Annotated[Path | None, typer.Option(help="the folder for the copy [default: runs/RUN]")] = None,
    what: Annotated[Part, typer.Option(help="all of the run, its model, or its small files")] = "all",
    address: Address = None,
    json_: Json = False,
) -> None:
    """Copy a run from a cluster to this machine; its files are compared with their digests."""
    from orchestrator.remote import attach as attach_to

    remote = attach_to(name, address=address)
    run = remote.fetch(to or Path("runs") / remote.name, what)
    if json_:
        print_json({"run": str(run.path), "what": what})
        return
    copied = {"all": "the run is", "model": "its model is", "results": "its results are"}[what]
    out.print(f"{copied} in {run.path}", markup=False, soft_wrap=True)


# --- how it is shown ---


def _show_preflight(preflight: Preflight) -> None:
    from orchestrator.distributed.preflight import TITLES
    from orchestrator.progress import err

    err.print(table(TITLES, preflight.rows, right=(5, 6, 7)))
    err.print(f"delivered to all of them: {preflight.code}", markup=False)


def _show_job(remote: RemoteRun, known: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json({**known, "address": remote.address})
        return
    of = f" of {known['num_epochs']}" if known["num_epochs"] else ""
    rows: list[tuple[str, object]] = [
        ("run", remote.name),
        ("state", known["state"] + (f", epoch {known['epoch']}{of}" if known["epoch"] else "")),
        ("job", f"{remote.id}, {remote.kind}, attempt {remote.attempt}"),
        ("storage", remote.storage),
        ("started", when(known["started"]) + (f", ended {when(known['ended'])}" if known["ended"] else "")),
    ]
    if known["phase"] and known["state"] == "running":
        rows.insert(2, ("at", known["phase"]))
    if known["error"]:
        rows += [("error", known["error"]["message"]), ("mend", known["error"]["mend"])]
    verb = {"waiting": "attach", "running": "attach", "finished": "fetch"}.get(known["state"], "logs")
    out.print(pairs([*rows, ("next", remote.command(verb))]))


def _show_end(remote: RemoteRun, results: Mapping[str, Any], as_json: bool, folder: str | None) -> None:
    place = f"{remote.storage.rstrip('/')}/{remote.name}"
    if as_json:
        print_json({"run": place, "id": remote.id, **({"fetched": folder} if folder else {}), **results})
        return
    if remote.kind == "rank":
        show_ranking(results)
        return
    if remote.kind == "search":
        show_trials(results)
        results = results["results"] or {}
    show_results(results)
    rows = [("run", f"{place}, on the cluster")]
    rows += [("copy", folder)] if folder else [("next", remote.command("fetch"))]
    out.print(pairs(rows))


def _in_words(line: str) -> str | None:
    """What a line of a job's output says to a person, None where that is nothing."""
    from orchestrator.distributed.telling import Beat, Ended, parse_line
    from orchestrator.job import Advanced, EpochEnded, Noted, PhaseBegan, TrialsAdvanced
    from orchestrator.progress import epoch_line, trials_line

    told = parse_line(line)
    if isinstance(told, Beat | Advanced):
        return None
    if isinstance(told, PhaseBegan):
        return told.text
    if isinstance(told, Noted):
        return f"{'warning' if told.is_warning else 'note'}: {told.text}"
    if isinstance(told, EpochEnded):
        return epoch_line(told)
    if isinstance(told, TrialsAdvanced):
        return trials_line(told)
    if isinstance(told, Ended):
        return f"ended: {told.error['reason']}: {told.error['message']}" if told.error else "done"
    return line
