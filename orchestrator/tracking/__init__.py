"""Epochs and figures of a run sent on to where people look at them: MLflow, Weights & Biases, by their own libraries.

In: what a job reports (`orchestrator.job.Event`), and the run. Out: what they show. Each line is sent when it is
reported, with short time limits: where a service is away the job goes on, and what was missed is sent at its end, or by
the next job of the run.

    trackers  what a service has to do, and which ones there are
    sending   the events of a job -> its trackers; what was sent, and what was missed
    in_mlflow  MLflow
    in_wandb   Weights & Biases
"""

from orchestrator.tracking.sending import tracked as tracked
from orchestrator.tracking.trackers import require_trackers as require_trackers
