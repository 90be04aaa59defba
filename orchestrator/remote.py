"""A job on a cluster, from the laptop: its state, its output; follow it to its end, stop it, bring its run home."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestrator.distributed.fetching import What, copy_run, fetch_through_cluster, settle
from orchestrator.distributed.following import last_lines, lines_of
from orchestrator.distributed.head import ClusterJob, Head, open_head, wait_until_over
from orchestrator.distributed.request import OF_NO_RUN
from orchestrator.distributed.telling import Ended, error_of, parse_line
from orchestrator.errors import InterruptedRunError, OrchestratorError, RefusedError, TrainingError, did_you_mean
from orchestrator.job import (
    Advanced,
    DirectoryStorage,
    EpochEnded,
    Noted,
    PhaseBegan,
    Report,
    Run,
    Storage,
    TrialsAdvanced,
    beside,
    is_uri,
    local_path,
    open_run,
    open_storage,
    run_in,
    works_for,
)
from orchestrator.progress import progress

PREFIX = "orchestrator-"
"""Of the ids of our jobs, among others' on the same cluster."""
_OF_SEVERAL = ("search", "rank")
"""Kinds of jobs that are no run."""
_STOP_TIMEOUT_S = 600.0
SEEN_WITHIN_S = 10.0
"""A store that does not answer this machine for so long is asked through the cluster."""


@dataclass(frozen=True)
class RemoteRun:
    """A run that a job on a cluster works on, or has worked on."""

    id: str
    """Ray's id of the job."""
    name: str
    """The run's name."""
    storage: str
    """Where the run lies, as the cluster sees it."""
    attempt: int
    kind: str
    _head: Head = field(repr=False)
    called: str = ""
    """What commands call it: its id, where the run's name is that of others too."""

    @property
    def address(self) -> str:
        """Of the cluster's head."""
        return self._head.address

    # --- how far it is ---

    @property
    def state(self) -> str:
        """`waiting`, `running`, `finished`, `failed` or `stopped`."""
        return self._job().state

    def status(self) -> dict[str, Any]:
        """What is known of it: its state, and how far it is."""
        job = self._job()
        events = [parse_line(line) for line in self.lines_so_far()]
        phases = [one for one in events if isinstance(one, PhaseBegan)]
        epochs = [one for one in events if isinstance(one, EpochEnded)]
        ended = [one for one in events if isinstance(one, Ended)]
        return {
            "id": self.id, "run": self.name, "storage": self.storage, "kind": self.kind, "attempt": self.attempt,
            "state": job.state, "phase": phases[-1].text if phases else None,
            "epoch": epochs[-1].figures["epoch"] if epochs else 0,
            "num_epochs": epochs[-1].num_epochs if epochs else None,
            "started": job.started, "ended": job.ended or None,
            "error": dict(ended[-1].error) or None if ended else None,
        }  # fmt: skip

    def lines_so_far(self) -> list[str]:
        """The lines of its output until now; Ray's own last words where it is over and its driver's node is gone."""
        job = self._job()
        if job.is_over:
            return last_lines(self._head, job)
        return [] if job.state == "waiting" else self._head.lines(self.id)

    def lines(self, report: Report | None = None) -> Iterator[str]:
        """The lines of its output from the first one on, until it is over.

        That the cluster does not answer is reported, and it is asked again for half an hour.
        """
        return lines_of(self._head, self.id, report)

    def follow(self, report: Report | None = None) -> dict[str, Any]:
        """Its results, once it is over; until then what happens is shown, from the first epoch on.

        Raises the error that ended it, as `finetune` does, and `InterruptedRunError` after Ctrl-C, when it goes on.
        """
        ended: Ended | None = None
        with self.left_running(), contextlib.nullcontext(report) if report is not None else progress() as telling:
            telling(PhaseBegan("waiting for the cluster to start the job"))
            for line in self.lines(telling):
                told = parse_line(line)
                if isinstance(told, Ended):
                    ended = told
                elif isinstance(told, PhaseBegan | Advanced | EpochEnded | Noted | TrialsAdvanced):
                    telling(told)
        return self._results(ended)

    @contextlib.contextmanager
    def left_running(self, how: str = "goes on, on the cluster; it is only no longer shown here") -> Iterator[None]:
        """Around what waits for it: Ctrl-C raises `InterruptedRunError`, which says that this ends no job."""
        try:
            yield
        except KeyboardInterrupt:
            mend = f"{self.command('attach')}; {self.command('stop')} ends it"
            raise InterruptedRunError(f"{self.name} {how}", mend=mend) from None

    def command(self, verb: str) -> str:
        """The command line that does this with the run; RAY_ADDRESS stands for an address."""
        where = "" if os.environ.get("RAY_ADDRESS") else f" --address {shlex.quote(self.address)}"
        return f"orchestrator {verb} {shlex.quote(self.called or self.name)}{where}"

    def _results(self, ended: Ended | None) -> dict[str, Any]:
        if ended is not None and ended.exit_code:
            raise error_of(ended)
        if ended is not None:
            return dict(ended.results or {})
        job = self._job()
        again = "submit it again: the next attempt goes on from the last checkpoint"
        if job.state == "stopped":
            raise InterruptedRunError(f"{self.name} was stopped", mend=again)
        if job.state == "finished":
            raise OrchestratorError(
                f"{self.name} has finished, and its last words are lost: the node of its driver does not answer",
                mend="submit it again: its next attempt finds it done, and tells its figures"
                + ("" if self.kind in _OF_SEVERAL else f"; or bring its run home: {self.command('fetch')}"),
            )
        said = [line.strip() for line in job.message.splitlines() if line.strip() and parse_line(line) is None]
        raise TrainingError(f"the driver of {self.name} ended without a word: {said[-1] if said else job.state}",
                            expected="a head node that stays", mend=again)  # fmt: skip

    # --- what is done to it ---

    def stop(self, timeout_s: float = _STOP_TIMEOUT_S) -> str:
        """Its state once it has stopped: behind its step, with a checkpoint, so that the run can go on.

        Raises `OrchestratorError` where it has not after `timeout_s`; Ray kills it in the end.
        """
        if not self._job().is_over:
            self._head.stop(self.id)
        over = wait_until_over(self._head, self.id, timeout_s)
        if over is None or not over.is_over:
            raise OrchestratorError(
                f"{self.name} was asked to stop, and has not after {timeout_s:g} s", expected="a step that ends",
                mend="wait: Ray ends it after ten minutes; orchestrator status tells",
            )  # fmt: skip
        return over.state

    def fetch(self, folder: str | Path, what: What = "all", report: Report | None = None) -> Run:
        """The run, or its `model`, or its `results`, copied to a folder of this machine; digests were compared.

        Of a search that has ended it is the best trial's run. Out of its storage where this machine sees it, else
        through the cluster. Where the folder is the run itself, it stays as it is. `report` is told of the bytes that
        have come; by default a progress bar shows it. Raises `RefusedError`.
        """
        name, target = self._run_name(), local_path(folder).absolute()
        sees_storage = self._sees_storage(name)
        is_itself = sees_storage and not is_uri(self.storage) and _is_same(target, Path(self.storage) / name)
        if not is_itself:
            require_place(folder, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = beside(target)
        try:
            with contextlib.nullcontext(report) if report is not None else progress() as telling:
                if sees_storage:
                    copy_run(open_storage(self.storage), name, partial, what, telling)
                else:
                    fetch_through_cluster(self._head, self.storage, name, partial, what, telling)
            if not is_itself:
                settle(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return Run(target)

    def _run_name(self) -> str:
        """Of the run that can be brought home. Raises `RefusedError` where there is none."""
        if self.kind not in _OF_SEVERAL:
            return self.name
        told = [parse_line(line) for line in self.lines_so_far()] if self.kind == "search" else []
        best = [one.results.get("run") for one in told if isinstance(one, Ended) and one.results]
        if self.kind == "search" and (not best or not best[-1]):  # the driver's last words may be lost
            with contextlib.suppress(OrchestratorError):
                best = [open_run(self._opened().place_of(self.name)).name]
        if not best or not best[-1]:
            raise RefusedError(
                "not_found", f"{self.name} is a {'ranking' if self.kind == 'rank' else 'search'}, and has no run"
                + (" yet" if self.kind == "search" else ""), expected="a search that has ended, or a run",
                mend=f"{self.command('attach')} shows what it has found; where that is lost, submit it again"
            )  # fmt: skip
        return Path(best[-1]).name

    def _sees_storage(self, name: str) -> bool:
        """Whether the run of that name that lies here in that place is the one that the job works on.

        In a directory its lease says that. A copy that was brought home has none, and one of a run that was begun or
        gone on with here is another one, though they may lie in a folder of the same name.
        """
        try:
            storage = self._opened()
            digest = run_in(storage, name).plan.job.digest()
        except OrchestratorError:
            return False
        if isinstance(storage, DirectoryStorage):
            last = storage.last_lease(name)
            return last is not None and works_for(last, self.id)
        return self._job().metadata.get("orchestrator_began", "") in ("", digest, OF_NO_RUN)

    def _opened(self) -> Storage:
        return open_storage(self.storage, patience_s=SEEN_WITHIN_S if is_uri(self.storage) else None)

    def lost(self) -> str:
        """What is not there any more of what it has made, as far as can be told from here; '' where nothing is."""
        if self.kind == "rank":  # which leaves nothing but features
            return ""
        run = run_in(self._opened(), self.name)
        if is_uri(self.storage) and not run.is_there:
            return f"{run.place} is gone"
        is_whole = self.kind == "search" or run.finished or not self._sees_storage(self.name)
        return "" if is_whole else f"{run.place} is not whole"

    # --- asking ---

    def _job(self) -> ClusterJob:
        job = self._head.job(self.id)
        if job is None:
            raise RefusedError(
                "not_found", f"the cluster at {self.address} knows no job {self.id}",
                expected="the cluster that it was submitted to",
                mend="if that was made again, submit the job again: its run goes on from its storage",
            )  # fmt: skip
        return job


def require_place(folder: str | Path, name: str = "") -> None:
    """Return where a run can be copied to that folder of this machine: the run of that name, as far as it is known.

    Raises `RefusedError` for a folder that holds something else.
    """
    target = local_path(folder).absolute()
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not _is_copy(target, name))):
        raise RefusedError(
            "usage", f"{folder} is {'not empty' if target.is_dir() else 'a file'}, and no copy of {name or 'a run'}",
            expected="a folder that is new, empty or holds an earlier copy", mend="give another folder",
        )  # fmt: skip


def _is_copy(folder: Path, name: str) -> bool:
    """Whether it holds a copy of a run of that name, and nobody has worked on it there. Without: any run."""
    with contextlib.suppress(OrchestratorError):
        its_name = open_run(folder).plan.name
        return not name or (name == its_name and DirectoryStorage(folder.parent).last_lease(folder.name) is None)
    return False


def _is_same(folder: Path, other: Path) -> bool:
    with contextlib.suppress(OSError):
        return folder.samefile(other)
    return False


def remote_run(head: Head, job: ClusterJob) -> RemoteRun:
    """The run of one of our jobs."""
    said = job.metadata
    return RemoteRun(
        job.id, said["orchestrator_run"], said["orchestrator_storage"], int(said["orchestrator_attempt"]),
        said["orchestrator_kind"], head,
    )  # fmt: skip


def attach(name: str, /, *, address: str | None = None, report: Report | None = None) -> RemoteRun:
    """The newest attempt of a run on a cluster, by the run's name, or a job by its id.

    Raises `RefusedError` where the cluster has none of that name, or several in different storages.
    """
    with contextlib.nullcontext(report) if report is not None else progress() as telling:
        head = open_head(address, telling)
    ours = [run for run, _job in _ours(head)]
    by_id = [replace(one, called=one.id) for one in ours if one.id == name]
    chosen = by_id or [one for one in ours if one.name == name]
    if len({one.storage for one in chosen}) > 1:
        raise RefusedError(
            "usage", f"{len(chosen)} jobs are of runs that are called {name}, in different storages",
            expected="one of " + ", ".join(f"{one.id} in {one.storage}" for one in chosen),
            mend=f"give its id: {chosen[0].id}",
        )  # fmt: skip
    if not chosen:
        names = [one.name for one in ours]
        raise RefusedError(
            "not_found", f"there is no job of a run {name} on the cluster at {head.address}",
            expected="one of " + ", ".join(dict.fromkeys(names)) if names else "a job that was submitted to it",
            mend=did_you_mean(name, names) or "list them: orchestrator list",
        )  # fmt: skip
    return max(chosen, key=lambda one: one.attempt)


def remote_runs(*, address: str | None = None, report: Report | None = None) -> list[tuple[RemoteRun, ClusterJob]]:
    """Our jobs on a cluster, the newest first, each with what the cluster says of it."""
    with contextlib.nullcontext(report) if report is not None else progress() as telling:
        head = open_head(address, telling)
    return sorted(_ours(head), key=lambda pair: pair[1].started, reverse=True)


def _ours(head: Head) -> list[tuple[RemoteRun, ClusterJob]]:
    return [(remote_run(head, job), job) for job in head.jobs() if "orchestrator_run" in job.metadata]
