"""One phase of a recipe: steps, the ends of epochs, checkpoints. Stopped anywhere, it goes on from where it was.

A step's batch is a fixed list of microbatches, whatever the number of workers; each worker computes its
share of them one after the other, and the gradients are summed. What is random depends on (seed, step,
microbatch) alone, the order of the samples on (seed, epoch). So 1 and 8 workers learn the same thing, and a run
that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from orchestrator.data import Ints
from orchestrator.errors import InterruptedRunError
from orchestrator.features import FeatureSource, split_evenly
from orchestrator.job import Advanced, EpochEnded, Noted, PhaseBegan
from orchestrator.network import (
    GradientReduction,
    MicrobatchStatistics,
    freeze,
    make_optimizer,
    set_mode,
    take_step,
)
from orchestrator.tasks import Predictions
from orchestrator.training import checkpoint as ckpt
from orchestrator.training.averaging import Average
from orchestrator.training.batches import batches_of_pairs, epoch_batches, split_in_pairs
from orchestrator.training.best import BestEpoch
from orchestrator.training.budget import fit_epochs, is_to_be_fitted, seconds_of
from orchestrator.training.evaluate import epoch_figures, epoch_line, predict_split
from orchestrator.training.fitted import facts_of, fit_head, fit_head_anew
from orchestrator.training.losses import step_loss_of
from orchestrator.training.nonfinite import Own, blame
from orchestrator.training.patience import is_over
from orchestrator.training.rates import rate_factor
from orchestrator.training.softening import soften_head
from orchestrator.training.state import Session

T = TypeVar("T")
_WHAT = {"head": "training the head", "adapter": "training head and adapter", "everything": "training everything"}


class PhaseLoop:
    """One phase of the recipe, from its beginning or from a checkpoint."""

    def __init__(self, session: Session, best: ckpt.Tensors, resumed: ckpt.Checkpoint | None) -> None:
        """`best`: the best weights so far, which a phase begins with; {} at the start of the first."""
        self.session, self.phase = session, session.phase
        network, plan = session.network, session.plan
        freeze(network, self.phase)
        self.optimizer, self.named = make_optimizer(network, plan.job.training, self.phase)
        self._loss = step_loss_of(session)
        moving = ("",) if self.phase.trains == "everything" else network.head
        self.tensors = session.strategy.state(ckpt.trained_tensors(network.module, moving))
        self._best_epoch = BestEpoch(session, self.phase)
        self._unread: list[tuple[Tensor, float, int, Own]] = []
        """(sums of loss, weight and right ones, samples, the step, this worker's microbatches), not looked at yet."""
        self._epoch_started, self._epoch_samples = time.monotonic(), 0.0
        """When this process began with the epoch, and how many samples it has taken of it."""
        self._saved: tuple[int, int] | None = None
        """(steps, epochs) of the newest checkpoint."""
        session.loader.mix = session.mix if self.phase.source == "samples" else None
        if resumed is not None:
            ckpt.load_into(resumed.weights, self.tensors)
            ckpt.restore_optimizer(self.optimizer, self.named, resumed.optimizer)
            self.best = best
            self._saved = (session.state.step, session.state.epochs_ended)
        else:
            if best:
                ckpt.load_into(best, session.strategy.state(best))
            self.best = ckpt.copy_of(self.tensors) if best else {}
            soften_head(session, self.tensors, self._epoch_batches, self._own_microbatches)
        self.average = self._average(resumed.average if resumed else {})

    def _average(self, before: ckpt.Tensors) -> Average | None:
        decay = self.session.plan.job.training.ema
        return None if decay is None or self.phase.solver == "probe" else Average(self.tensors, decay, before)

    def run(self) -> ckpt.Tensors:
        """Train to the phase's end; the best weights so far, which are in the network by then."""
        session, state = self.session, self.session.state
        rows = session.samples.rows("train")
        self._keep_to_budget(rows)
        samples = len(rows) / max(1, self.phase.steps_per_epoch)
        session.report(PhaseBegan(_WHAT[self.phase.trains], self.phase.num_steps, state.step, "steps", samples))
        if self.phase.solver == "probe":
            self._fit()
        elif self.phase.num_steps:
            if not self._best_epoch.look_back(self.best, self.tensors):
                self._save()
                self._interrupt()
            with session.strategy.reduction(list(self.named.values())) as reduction:
                self._run_steps(rows, reduction)
        self._save()
        ckpt.load_into(self.best, self.tensors)
        return self.best

    def _fit(self) -> None:
        """The one step of a probe, and the end of its epoch."""
        session, state = self.session, self.session.state
        if state.step == 0:
            fitted = fit_head(session)
            state.step = 1
            state.epoch_loss, state.epoch_weight = fitted.loss, fitted.weight
            state.epoch_correct, state.epoch_samples = fitted.num_right, float(fitted.num_samples)
            self._epoch_samples = float(fitted.num_samples)
            session.note_of(state.phase, **facts_of(fitted))
            session.report(Advanced(1))
        if state.epochs_ended == 0:
            self._end_epoch()

    def _keep_to_budget(self, rows: Ints) -> None:
        """Let the epochs fit into the budget, by some steps that are measured and taken back; once in a run."""
        session, state = self.session, self.session.state
        if self.phase.trains == "head" or state.step or not is_to_be_fitted(session):
            return
        before, kept = copy.deepcopy(vars(state)), ckpt.copy_of(self.tensors)
        batches = self._epoch_batches(rows, 0)
        set_mode(session.network, self.phase, training=True)
        with session.strategy.reduction(list(self.named.values())) as reduction:
            seconds = seconds_of(lambda number: self._step(batches[number % len(batches)], (), reduction))
        self._read_sums()
        vars(state).update(before)
        ckpt.load_into(kept, self.tensors)
        self.optimizer, self.named = make_optimizer(session.network, session.plan.job.training, self.phase)
        self.average = self._average({})
        if session.audit is not None:
            session.audit.forget()
        fit_epochs(session, seconds)
        self.phase = session.phase
        self._epoch_started, self._epoch_samples = time.monotonic(), 0.0
        self._save()

    def _run_steps(self, rows: Ints, reduction: GradientReduction) -> None:
        session, state, steps_per_epoch = self.session, self.session.state, self.phase.steps_per_epoch
        batches: list[Ints] = []
        epoch_of_batches = -1
        stop = is_due = False
        while True:
            epoch, within = divmod(state.step, steps_per_epoch)
            if epoch > state.epochs_ended:
                self._end_epoch()
            if state.step == self.phase.num_steps:
                break
            if is_over(session.plan, state):
                why = f"no epoch since number {state.highest_epoch} was better"
                session.report(Noted(f"ended after {state.epochs_ended} of {self.phase.epochs} epochs: {why}"))
                break
            if stop or is_due:
                self._save()
            if stop:
                self._interrupt()
            if epoch != epoch_of_batches:
                epoch_of_batches, batches = epoch, self._epoch_batches(rows, epoch)
                set_mode(session.network, self.phase, training=True)  # only an epoch's evaluation changes it
            num_ahead = session.loader.num_ahead(session.source("train"), len(self._own_microbatches(batches[within])))
            following = batches[within + 1 : within + 1 + num_ahead]
            stop, is_due = self._step(batches[within], following, reduction)
            session.report(Advanced(1))

    def _epoch_batches(self, rows: Ints, epoch: int) -> list[Ints]:
        session, num = self.session, self.phase.steps_per_epoch
        train = session.source("train")
        if isinstance(train, FeatureSource):
            train.epoch = epoch
        # A frozen body gives the same whatever is beside a sample, and its stored features have one length: the head is
        # trained on the same batches with and without them.
        bucketing = session.length_bucketing and self.phase.trains != "head"
        seed, state, recipe = session.plan.job.training.seed, session.state, session.plan.recipe
        number = state.num_epochs_ended(recipe) - state.epochs_ended + epoch  # of all phases, from 0
        if self.phase.loss == "contrastive":
            return batches_of_pairs(session.samples, rows, seed, number, num)
        return epoch_batches(session.samples, rows, seed, number, num, bucketing)

    # --- a step ---

    def _step(self, rows: Ints, following: Sequence[Ints], reduction: GradientReduction) -> tuple[bool, bool]:
        """One optimizer step over all microbatches of a batch: (somebody asked to stop, a checkpoint is due).

        `following`: the batches of the next steps, which are prepared meanwhile.
        """
        session, state = self.session, self.session.state
        plan, worker = session.plan, session.worker
        number = state.steps_done(plan.recipe)
        statistics = MicrobatchStatistics(session.network.module, worker, plan.recipe.num_microbatches)
        sums = torch.zeros(3, dtype=torch.float64 if worker.device.type != "mps" else torch.float32)
        sums = sums.to(worker.device)
        num_samples = 0
        own = self._own_microbatches(rows)
        for microbatch, some in own:
            batch = session.loader.load(session.source("train"), (plan.job.training.seed, number, microbatch), some)
            if batch is None:
                continue
            if session.audit is not None:
                session.audit.took(state.num_epochs_ended(plan.recipe) + 1, number, microbatch, batch.rows.tolist())
            with statistics.of(microbatch):
                loss, weight, right = self._loss(batch)
                is_last = microbatch == own[-1][0]
                with reduction.overlapped() if is_last else contextlib.nullcontext():
                    loss.backward()  # type: ignore[no-untyped-call]
            sums += torch.stack([loss.detach(), weight, right])
            num_samples += len(batch.rows)
        reduction.begin()
        state.step += 1
        for after, later in enumerate(following, start=1):
            for microbatch, some in self._own_microbatches(later):
                key = (plan.job.training.seed, number + after, microbatch)
                session.loader.prepare(session.source("train"), key, some)
        # Numbers that the host needs are exchanged apart from those that are on a GPU: so nobody waits for it.
        due = worker.rank == 0 and self._checkpoint_is_due()
        told = torch.tensor([num_samples, session.should_stop(), due], dtype=torch.float64)
        sums, told = worker.all_reduce_sums(sums, told)
        num_samples, stop, due = told.tolist()
        self._unread.append((sums, num_samples, number, own))
        # What a GPU has computed is looked at a step later, when it is there: so nobody waits for it. A loss that is
        # not finite moves no weights there either, by the fused optimizer.
        self._read_sums(keep=1 if worker.device.type == "cuda" else 0)
        # Of a batch that nobody could read there is nothing to learn.
        reduction.finish((1.0 / sums[1]).float() if num_samples else 0.0)
        if num_samples:
            self._take_step(sums[0])
            statistics.average()
            if self.average is not None:
                self.average.update(state.step)
        self.optimizer.zero_grad(set_to_none=True)
        return stop > 0, due > 0

    def _own_microbatches(self, rows: Ints) -> Own:
        worker, num = self.session.worker, self.session.plan.recipe.num_microbatches
        part = split_evenly if self.phase.loss == "task" else split_in_pairs
        return [(one, part(rows, one, num)) for one in range(worker.rank, num, worker.num_workers)]

    def _take_step(self, loss: Tensor) -> None:
        training = self.session.plan.job.training
        if training.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.named.values(), training.clip_norm)
        factor = rate_factor(self.session.plan, self.phase.num_steps, self.session.state.step - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        take_step(self.optimizer, loss)

    def _read_sums(self, keep: int = 0) -> None:
        """Add what steps summed up to the epoch's figures, but for the `keep` newest. Raises `TrainingError`."""
        state = self.session.state
        while len(self._unread) > keep:
            sums, num_samples, number, own = self._unread.pop(0)
            loss, weight, right = sums.tolist()
            if not math.isfinite(loss):
                raise blame(self.session, self.tensors, self.best, own, number, loss)
            state.epoch_loss += loss
            state.epoch_correct += right
            state.epoch_samples += num_samples
            self._epoch_samples += num_samples
            state.epoch_weight += weight

    # --- the end of an epoch ---

    def _end_epoch(self) -> None:
        """Evaluate, write the epoch's line, and keep the weights if they are the best so far."""
        session, state, plan = self.session, self.session.state, self.session.plan
        seconds = time.monotonic() - self._epoch_started
        self._read_sums()
        if self.phase.loss == "contrastive":
            is_seen = len(session.samples.rows("validation")) or state.epochs_ended + 1 == self.phase.epochs
            state.epoch_correct, state.epoch_samples = self._or_stop(fit_head_anew(session)) if is_seen else (0.0, 0)
        predictions = self._or_stop(predict_split(session, "validation"))
        # Looked at before anything is noted: who stops meanwhile comes by here once more.
        averaged = None if self.average is None else self._predictions_of(self.average)
        line = epoch_line(session, self.phase, predictions, self._epoch_samples / max(seconds, 1e-9))
        if self._best_epoch.is_found(line, predictions):
            state.best_epoch, state.best_is_average, line["kept"] = line["epoch"], False, "weights"
            self.best = ckpt.copy_of(self.tensors)
        if self.average is not None and averaged is not None:
            line |= self._end_epoch_of(self.average, averaged, line["epoch"])
        state.epoch_loss = state.epoch_correct = state.epoch_samples = state.epoch_weight = 0.0
        state.epochs_ended += 1
        if session.record is not None:
            session.record.add(line)
        session.report(EpochEnded(line, plan.recipe.num_epochs, plan.job.task))
        self._epoch_started, self._epoch_samples = time.monotonic(), 0.0

    def _predictions_of(self, average: Average) -> Predictions:
        with average.in_place():
            found = predict_split(self.session, "validation")
        return self._or_stop(found)  # which saves the weights, and they are back by now

    def _end_epoch_of(self, average: Average, predictions: Predictions, epoch: int) -> dict[str, float | str]:
        """The figures of the average, which is kept where it is better than all so far."""
        figures, kept = epoch_figures(self.session.plan.job.task, predictions), {}
        if self._best_epoch.is_found({"epoch": epoch, **figures}, predictions):
            self.session.state.best_epoch, self.session.state.best_is_average = epoch, True
            self.best, kept = ckpt.copy_of(average.tensors), {"kept": "average"}
        return {f"average_{name}": value for name, value in figures.items()} | kept

    # --- checkpoints ---

    def _checkpoint_is_due(self) -> bool:
        training, outbox = self.session.plan.job.training, self.session.outbox
        assert outbox is not None  # rank 0 alone is asked
        outbox.check()
        every = training.checkpoint_every_steps
        if every is not None:
            return self.session.state.steps_done(self.session.plan.recipe) % every == 0
        after_s = max(training.checkpoint_every_s, outbox.rest_s)
        return not outbox.busy and time.monotonic() - self.session.saved_at > after_s

    def _save(self) -> None:
        """Called by all workers: what they left out is known to all after it."""
        session, state = self.session, self.session.state
        self._read_sums()
        where = (state.step, state.epochs_ended)
        if where == self._saved:
            return
        self._saved = where
        for skipped in session.worker.all_gather(session.raw.skipped):
            session.raw.skipped.update(skipped)
        state.skipped = {str(row): why for row, why in sorted(session.raw.skipped.items())}
        if session.audit is not None:
            session.audit.publish(state.steps_done(session.plan.recipe), session.outbox)
        if session.record is not None and session.outbox is not None:
            entries = {**state.entries(), "seconds": session.seconds()}
            optimizer = ckpt.optimizer_tensors(self.optimizer, self.named)
            step = state.steps_done(session.plan.recipe)
            average = self.average.tensors if self.average is not None else {}
            with session.outbox.stalling():
                session.outbox.wait()  # at most one is behind
                copied = ckpt.copied(ckpt.Checkpoint(step, self.tensors, self.best, optimizer, entries, average))
                session.record.publish()  # the lines of the epochs that the checkpoint counts as ended
                session.outbox.put(partial(ckpt.save, session.outbox.run, copied))
        session.saved_at = time.monotonic()

    def _or_stop(self, found: T | None) -> T:
        """What was found; where that is nothing, since somebody asked to stop, the phase ends here, resumable."""
        if found is None:
            self._save()
            self._interrupt()
        return found

    def _interrupt(self) -> NoReturn:
        self.session.worker.barrier()
        state, recipe = self.session.state, self.session.plan.recipe
        raise InterruptedRunError(
            f"stopped at step {state.steps_done(recipe)} of {recipe.num_steps}",
            mend="the same command goes on from there",
        )
