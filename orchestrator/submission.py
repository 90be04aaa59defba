"""From a laptop to a cluster: check, deliver the code, look at every node, start; then follow, stop, bring home.

The job runs on the cluster, whatever becomes of the laptop. It is known by its storage and its run's name: the same
job twice is one job, and after a failure its next attempt goes on with the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.distributed.following import last_lines
from orchestrator.distributed.head import ClusterJob, Head, open_head, wait_until_over
from orchestrator.distributed.preflight import Preflight, wanted_of
from orchestrator.distributed.request import Sent, pack_request
from orchestrator.distributed.telling import Ended, Found, parse_line
from orchestrator.distributed.wheels import Delivery, as_wanted, deliveries
from orchestrator.errors import DataError, OrchestratorError, RefusedError, missing_extra
from orchestrator.gate import drafted, planned
from orchestrator.job import (
    JOB_VARIABLE,
    Draft,
    Job,
    Noted,
    PhaseBegan,
    Plan,
    Report,
    Scaling,
    holds_rows,
    holds_secret,
    is_dataset,
    is_uri,
    open_storage,
    redacted,
    whole_storage,
)
from orchestrator.progress import progress
from orchestrator.rehearsal import rehearsed
from orchestrator.remote import PREFIX, SEEN_WITHIN_S, RemoteRun, remote_run
from orchestrator.train import run_like

_KINDS: Mapping[str, Mapping[str, Any]] = {"finetune": {}, "pretrain": {"method": "scratch"}, "search": {}, "rank": {}}
"""What can be submitted -> the fields that it sets."""
_STOP_WAIT_S = 600
"""How long a job may take to stop behind its step before Ray kills it; Ray's own 3 s are too short for a checkpoint."""
_NODE_TIMEOUT_S = 120.0
_PREFLIGHT_TIMEOUT_S = 300.0
_PREFLIGHT = "exec python -m orchestrator.distributed.preflight_job"
_DRIVER = "exec python -m orchestrator.driver"


def submit(
    job: Job | Mapping[str, Any] | str | Path | None = None,
    /,
    *,
    address: str | None = None,
    kind: str = "finetune",
    fresh: bool = False,
    report: Report | None = None,
    found: Callable[[Preflight], None] | None = None,
    **fields: Any,
) -> RemoteRun:
    """Start a job on a cluster, and return once it is accepted there; `RemoteRun.follow` shows it to its end.

    `job` and `fields` are `finetune`'s. `kind`: `finetune`, `pretrain`, `search` or `rank`; what a search is asked for
    stands in the job's block `search`, the backbones of a ranking in `rank`, as in a job file:
    `search={"num_trials": 8, "space": {...}}`, `rank={"backbones": [...]}`. `address` is the head's dashboard,
    http://HOST:8265; by default what RAY_ADDRESS says. Data and backbone are checked here first, and must be seen by
    the cluster's nodes at the same places; so must the storage, a folder that all nodes share or, of a cluster of one
    node, any. `found` is called with what the preflight found on each node. A job that runs there already is the one
    that is returned.

    Raises `RefusedError` before anything is started.
    """
    with contextlib.nullcontext(report) if report is not None else progress() as telling:
        telling(PhaseBegan("asking the cluster"))
        head = open_head(address, telling)
        if kind not in _KINDS:
            raise RefusedError("usage", f"there is no kind of job {kind!r}", expected="one of " + ", ".join(_KINDS),
                               mend="leave kind out for finetune")  # fmt: skip
        fields = {**fields, **_KINDS[kind]}
        draft = _checked(drafted(job, fields))
        telling(PhaseBegan("looking at backbone and data"))
        sent = _sent(draft, kind, telling)
        for line in (*draft.notes, *sent.plan.warnings, *sent.plan.data.warnings):
            telling(Noted(line, is_warning=True))
        if not fresh:
            sent = _gone_on_with(head, sent, telling)
        return _Submission(head, sent, kind, fresh, telling, found).run()


def _sent(draft: Draft, kind: str, report: Report) -> Sent:
    """What travels. Raises `RefusedError`, as it would where it ran there: the cores of this machine are no limit."""
    if kind != "rank" and isinstance(scaling := draft.tree.get("scaling") or {}, Mapping):
        draft = replace(draft, tree={**draft.tree, "scaling": {**scaling, "address": "auto"}})
    if kind in ("search", "rank"):
        try:
            if kind == "search":
                from orchestrator.tuning import search_to_send as to_send  # noqa: PLC0415  # it imports Ray
            else:
                from orchestrator.tuning import rank_to_send as to_send  # noqa: PLC0415  # this one does not
        except ModuleNotFoundError as error:
            raise missing_extra(error) or error from None
        return to_send(draft, report)
    plan = rehearsed(*planned(draft, {}))
    job = draft.job()
    sent = _for_the_cluster(job, plan)
    tree = sent.model_dump(mode="json", exclude_defaults=True)
    is_open = job.name is None and job.training.num_microbatches is None
    like = sent.model_copy(update={"scaling": Scaling()}).digest() if is_open else ""
    return Sent(tree, plan.name, sent.storage, plan, began=sent.digest(), like=like)


def _gone_on_with(head: Head, sent: Sent, report: Report) -> Sent:
    """The same, or with the name of a run that learns the same and began on another number of workers.

    Its own name says that number, and `finetune` too would go on with such a run.
    """
    places = {"orchestrator_like": sent.like, "orchestrator_storage": sent.storage}
    before = [one for one in head.jobs() if places.items() <= one.metadata.items()] if sent.like else []
    if not sent.like or sent.name in [one.metadata["orchestrator_run"] for one in before]:
        return sent
    if before:
        last = max(before, key=lambda one: one.started).metadata
        name, began = last["orchestrator_run"], last["orchestrator_began"]
    else:  # on a cluster that is no more
        run = None
        if is_uri(sent.storage):
            with contextlib.suppress(OrchestratorError):
                run = run_like(open_storage(sent.storage, patience_s=SEEN_WITHIN_S), sent.name, sent.plan.job)
        if run is None:
            return sent
        name, began = run.name, run.plan.job.digest()
    report(Noted(f"going on with the run {name}, which began on another number of workers (--name begins another one)"))
    plan = sent.plan.model_copy(update={"name": name})
    return replace(sent, name=name, tree={**sent.tree, "name": name}, plan=plan, began=began)


def _checked(draft: Draft) -> Draft:
    """The draft, with nothing in it that must not travel. Raises `RefusedError`."""
    if holds_rows(draft.tree.get("data")):
        raise DataError(
            "rows that this program holds do not travel with a job", expected="data at a place that all nodes see",
            mend="write them into a table there, such as a Parquet file, and give its path",
        )  # fmt: skip
    for place in _texts(draft.tree):
        if holds_secret(place):
            raise RefusedError(
                "usage", f"{redacted(place)} holds a password or a key, and a job is no secret",
                expected="a place alone",
                mend="take it out: the nodes' own environment has credentials (AWS_PROFILE, a Kubernetes Secret)",
            )  # fmt: skip
    return draft


def _texts(tree: object) -> Iterator[str]:
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from _texts(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _texts(value)
    elif isinstance(tree, (str, Path)):
        yield str(tree)


def _for_the_cluster(job: Job, plan: Plan) -> Job:
    """The job with whole paths, the run's name, and the cluster that it finds itself on."""
    storage = whole_storage(job.storage)
    scaling = job.scaling.model_copy(update={"address": "auto"})
    return job.at_whole_paths().model_copy(update={"name": plan.name, "storage": storage, "scaling": scaling})


class _Submission:
    """One job on its way."""

    def __init__(
        self, head: Head, sent: Sent, kind: str, fresh: bool, report: Report,
        found: Callable[[Preflight], None] | None,
    ) -> None:  # fmt: skip
        self._head, self._sent, self._kind, self._fresh = head, sent, kind, fresh
        self._report, self._found = report, found
        seen = {"data": sent.plan.data.fingerprint, "backbone": sent.plan.backbone.commit}
        told = json.dumps({"kind": kind, "job": sent.tree, **seen}, sort_keys=True)
        self._digest = hashlib.sha256(told.encode()).hexdigest()[:16]

    def run(self) -> RemoteRun:
        """The job on the cluster: one that is there, or a new attempt."""
        base = f"{PREFIX}{_slug(self._sent.name)}-{_short(self._sent.storage, self._sent.name)}"
        while True:
            before = self._attempts(base)
            if before and (there := self._there(before)):
                return there
            attempt = max(before, default=0) + 1
            with tempfile.TemporaryDirectory(prefix="orchestrator-submit-") as folder:
                self._report(PhaseBegan("delivering the code"))
                code = deliveries(self._sent.plan.job.modality, _libraries(self._sent))
                packages = [self._head.upload(one.write(Path(folder))) for one in code]
                self._preflight(code, packages, Path(folder))
                request = {"kind": self._kind, "job": self._sent.tree, "fresh": self._fresh}
                packages.append(self._head.upload(pack_request(request, Path(folder) / "request.zip")))
            metadata = {
                "orchestrator_run": self._sent.name, "orchestrator_storage": self._sent.storage,
                "orchestrator_kind": self._kind, "orchestrator_attempt": str(attempt),
                "orchestrator_job": self._digest, "orchestrator_began": self._sent.began,
                "orchestrator_like": self._sent.like,
            }  # fmt: skip
            id = f"{base}.{attempt}"
            environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S), JOB_VARIABLE: id}
            new = RemoteRun(id, self._sent.name, self._sent.storage, attempt, self._kind, self._head)
            with new.left_running("may have started on the cluster"):
                if self._head.submit(id, _DRIVER, packages, metadata, environment):
                    return new
            # Somebody was faster: it is there now.

    def _attempts(self, base: str) -> dict[int, ClusterJob]:
        """{attempt: job} of this run."""
        found = {}
        for job in self._head.jobs():
            stem, _, number = job.id.rpartition(".")
            if stem == base and number.isdecimal():
                found[int(number)] = job
        return found

    def _there(self, attempts: Mapping[int, ClusterJob]) -> RemoteRun | None:
        """The newest attempt, where it is the same job and has not failed."""
        last = attempts[max(attempts)]
        same = last.metadata.get("orchestrator_job") == self._digest
        if not last.is_over:
            if same and not self._fresh:
                self._report(Noted(f"this job is on the cluster already, as {last.id}"))
                return remote_run(self._head, last)
            name = self._sent.name
            raise RefusedError(
                "busy", f"{last.id} is working on the run {name}" + ("" if same else ", with other settings"),
                mend=f"stop it: {remote_run(self._head, last).command('stop')}; or "
                + ("wait for its end" if self._kind == "rank" else "give this one another name: --name"),
            )  # fmt: skip
        if last.state == "finished" and same and not self._fresh:
            there = remote_run(self._head, last)
            lost = self._lost_of(there, last)
            if not lost:
                self._report(Noted(f"this job has finished before, as {last.id} (--fresh starts over)"))
                return there
            self._report(Noted(f"{last.id} has finished, and {lost}: this is the next attempt, which makes it again"))
        elif last.state != "finished":
            self._report(Noted(f"{last.id} has {last.state}: this is the next attempt, which goes on with its run"))
        return None

    def _lost_of(self, there: RemoteRun, job: ClusterJob) -> str:
        """What is not there any more of a job that has finished, as far as can be told from here; '' if nothing is."""
        if not any(isinstance(parse_line(line), Ended) for line in last_lines(self._head, job)):
            return "its last words are lost"
        with contextlib.suppress(OrchestratorError):
            return there.lost()
        return ""

    def _preflight(self, code: list[Delivery], packages: list[str], folder: Path) -> None:
        """Look at every node. Raises `RefusedError` where one lacks something."""
        self._report(PhaseBegan("preflight: looking at every node"))
        wanted = wanted_of(self._sent, as_wanted(code))
        token = secrets.token_hex(16)
        request = {**wanted, "token": token, "timeout_s": _NODE_TIMEOUT_S}
        packages = [*packages, self._head.upload(pack_request(request, folder / "preflight.zip"))]
        id = f"{PREFIX}preflight-{token[:12]}"
        self._head.submit(id, _PREFLIGHT, packages, {"orchestrator_kind": "preflight"}, {})
        over = wait_until_over(self._head, id, _PREFLIGHT_TIMEOUT_S)
        said = last_lines(self._head, over) if over is not None and over.is_over else []
        told = [one for line in said if isinstance(one := parse_line(line), Found)]
        if over is not None and not over.is_over:
            self._head.stop(id)
        if not told:
            raise _no_preflight(over, said)
        preflight = Preflight(told[-1].nodes, wanted, told[-1].refusal)
        if self._found is not None:
            self._found(preflight)
        preflight.require()


def _no_preflight(job: ClusterJob | None, said: list[str]) -> OrchestratorError:
    last = [line for line in said or (job.message if job else "").splitlines() if line.strip()]
    why = last[-1].strip()[:300] if last else "the cluster has no room for it, or its head has lost it"
    if "No module named" in why or "not found" in why:
        return RefusedError(
            "cluster", f"the head's `python` does not run what the job needs: {why}",
            expected="the Python that Ray runs with, first on the PATH of `ray start`",
            mend="start the head with that environment's bin folder first on its PATH, and with ray[default] in it",
        )  # fmt: skip
    return RefusedError(
        "cluster", f"the preflight did not end: {why}", expected="a cluster that runs a small job",
        mend="look at the head's dashboard, under Jobs",
    )  # fmt: skip


def _libraries(sent: Sent) -> set[str]:
    """Names of the libraries that this job needs of all that are optional, as they are installed."""
    tree = sent.tree
    found = {"mlflow-skinny" if name == "mlflow" else name for name in tree.get("log", ())}
    if any(plan.recipe.adapter is not None for plan in (sent.plan, *sent.others)):
        found.add("peft")
    if is_dataset(sent.plan.job.data.path):
        found.add("datasets")
    if tree.get("search", {}).get("search_alg") == "optuna":
        found.add("optuna")
    return found


def _slug(name: str) -> str:
    """The name as an id may have it."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:80] or "run"


def _short(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:6]
