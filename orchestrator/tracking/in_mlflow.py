"""A run in MLflow, on the server that its own variables name (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME)."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence

from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from orchestrator.job import HeldRun, Plan
from orchestrator.tracking.trackers import Begun, End, Line, settings_of

_EXPERIMENT = "orchestrator"
_STATES: Mapping[End, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}
"""By default the client tries for minutes, and training would wait for it."""
_AT_ONCE = 900
"""Metrics in a request, of which a server takes 1,000."""
_PARAMS_AT_ONCE = 100
_LONGEST = 6000


def make(held: HeldRun, plan: Plan) -> MlflowTracker:
    """The tracker of a run; its library reads the environment now."""
    return MlflowTracker(held, plan)


class MlflowTracker:
    """Epochs are metrics by the epoch's number, the job's settings parameters, final figures metrics `final_...`."""

    def __init__(self, held: HeldRun, plan: Plan) -> None:
        self._held, self._plan = held, plan
        self._client = MlflowClient()
        self._run = ""

    def begin(self, known: str | None) -> Begun:
        """Go on with the run of that id, or begin one in the experiment."""
        with _impatient():
            if known is not None and self._is_there(known):
                self._client.update_run(known, status="RUNNING")
                self._run = known
                return Begun(known)
            run = self._client.create_run(self._experiment(), run_name=self._plan.name, tags=self._tags())
            self._run = str(run.info.run_id)
            params = [Param(key, str(value)[:_LONGEST]) for key, value in settings_of(self._plan).items()]
            for start in range(0, len(params), _PARAMS_AT_ONCE):
                self._client.log_batch(self._run, params=params[start : start + _PARAMS_AT_ONCE])
        return Begun(self._run)

    def add(self, lines: Sequence[Line]) -> None:
        """Epochs that it has not yet."""
        at = round(time.time() * 1000)
        metrics = [
            Metric(key, float(value), at, int(line["epoch"]))
            for line in lines for key, value in line.items()
            if key != "epoch" and isinstance(value, (int, float)) and math.isfinite(value)
        ]  # fmt: skip
        with _impatient():
            for start in range(0, len(metrics), _AT_ONCE):
                self._client.log_batch(self._run, metrics=metrics[start : start + _AT_ONCE])

    def end(self, how: End, figures: Mapping[str, float]) -> None:
        """The final figures, and the run's state."""
        at = round(time.time() * 1000)
        with _impatient():
            if figures:
                metrics = [Metric(f"final_{key}", value, at, 0) for key, value in figures.items()]
                self._client.log_batch(self._run, metrics=metrics)
            self._client.set_terminated(self._run, _STATES[how])

    def _is_there(self, run: str) -> bool:
        try:
            return bool(self._client.get_run(run).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def _experiment(self) -> str:
        if os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return os.environ["MLFLOW_EXPERIMENT_ID"]
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _EXPERIMENT
        there = self._client.get_experiment_by_name(name)
        return str(there.experiment_id if there is not None else self._client.create_experiment(name))

    def _tags(self) -> dict[str, str]:
        plan = self._plan
        return {
            "orchestrator.run": self._held.place, "orchestrator.data": plan.data.fingerprint,
            "orchestrator.backbone": f"{plan.backbone.source} @ {plan.backbone.commit or ''}",
        }  # fmt: skip


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    """Answer soon or not at all, unless the user's environment says otherwise."""
    added = {key: value for key, value in _IMPATIENT.items() if key not in os.environ}
    os.environ |= added
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)
