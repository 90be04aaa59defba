"""A run that has its figures and lacks something of the rest: is that made again, and from what."""

from __future__ import annotations

from orchestrator.job import CHECKPOINTS, HeldRun, Noted, Report, Run, no_edit_in


def makes_again(run: Run, held: HeldRun, report: Report) -> bool:
    """Whether there is something to make again of a run with figures; what that is, and from what, is told.

    Without a checkpoint that would be to train again, which is done only where the model is of no use.
    """
    from orchestrator.data import table_of  # noqa: PLC0415  # it imports numpy and pyarrow

    damage = no_edit_in(run.damage)
    if not damage:
        return False
    gone = f"{'; '.join(f'{file} {what}' for file, what in damage.items())}: "
    if run.finished and table_of(run) is None:
        report(Noted(f"{gone}as the samples are gone too, --fresh alone makes it again", is_warning=True))
        return False
    if held.commits(CHECKPOINTS):
        report(Noted(f"{gone}the model and what goes with it are written again, from the last checkpoint"))
        return True
    if run.finished:
        report(Noted(f"{gone}there is no checkpoint to make it from, --fresh trains again", is_warning=True))
        return False
    report(Noted(f"{gone}there is no checkpoint to make it from, so that it is trained again", is_warning=True))
    return True


def note_lost_plan(run: Run, report: Report) -> None:
    """Tell of a run that starts over because its plan is gone."""
    if {"results.json", CHECKPOINTS} & set(run.storage.children(run.name)):
        report(Noted(f"{run.place} has lost its plan.json: it is trained again from the first step", is_warning=True))
