"""One phase of a recipe: steps, the ends of epochs, checkpoints. Stopped anywhere, it goes on from where it was.

A step's batch is a fixed list of microbatches, whatever the number of workers; each worker computes its
share of them one after the other, and the gradients are summed. What is random depends on (seed, step,
microbatch) alone, the order of the samples on (seed, epoch). So 1 and 8 workers learn the same thing, and a run
that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import contextlib
import math
import time
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from orchestrator.data import Ints
from orchestrator.errors import InterruptedRunError, TrainingError
from orchestrator.features import FeatureSource, split_evenly
from orchestrator.job import Advanced, EpochEnded, PhaseBegan, Plan
from orchestrator.network import (
    GradientReduction,
    MicrobatchStatistics,
    autocast,
    channels_last,
    freeze,
    make_optimizer,
    set_mode,
)
from orchestrator.training import checkpoint as ckpt
from orchestrator.training.batches import epoch_batches
from orchestrator.training.evaluate import epoch_figures, predict_split
from orchestrator.training.state import Session


class PhaseLoop:
    """One phase of the recipe, from its beginning or from a checkpoint."""

    def __init__(self, session: Session, best: ckpt.Tensors, resumed: ckpt.Checkpoint | None) -> None:
        """`best`: the best weights so far, which a phase begins with; {} at the start of the first."""
        self.session, self.phase = session, session.phase
        network, plan = session.network, session.plan
        freeze(network, self.phase)
        self.optimizer, self.named = make_optimizer(network, plan.job.training, self.phase)
        moving = ("",) if self.phase.trains == "everything" else network.head
        self.tensors = session.strategy.state(ckpt.trained_tensors(network.module, moving))
        self._unread: list[tuple[Tensor, float, int]] = []
        """(sums of loss, weight and right ones on the device, samples, the step) that were not looked at yet."""
        self._epoch_started, self._epoch_samples = time.monotonic(), 0.0
        """When this process began with the epoch, and how many samples it has taken of it."""
        self._saved: tuple[int, int] | None = None
        """(steps, epochs) of the newest checkpoint."""
        if resumed is not None:
            ckpt.load_into(resumed.weights, self.tensors)
            ckpt.restore_optimizer(self.optimizer, self.named, resumed.optimizer)
            self.best = best
            self._saved = (session.state.step, session.state.epochs_ended)
        else:
            if best:
                ckpt.load_into(best, session.strategy.state(best))
            self.best = ckpt.copy_of(self.tensors) if best else {}

    def run(self) -> ckpt.Tensors:
        """Train to the phase's end; the best weights so far, which are in the network by then."""
        session, state = self.session, self.session.state
        recipe, rows = session.plan.recipe, session.samples.rows("train")
        what = "training the head" if self.phase.trains == "head" else "training everything"
        session.report(PhaseBegan(what, self.phase.num_steps, state.step, "steps", len(rows) / recipe.steps_per_epoch))
        with session.strategy.reduction(list(self.named.values())) as reduction:
            self._run_steps(rows, reduction)
        self._save()
        ckpt.load_into(self.best, self.tensors)
        return self.best

    def _run_steps(self, rows: Ints, reduction: GradientReduction) -> None:
        session, state, recipe = self.session, self.session.state, self.session.plan.recipe
        batches: list[Ints] = []
        epoch_of_batches = -1
        stop = is_due = False
        while True:
            epoch, within = divmod(state.step, recipe.steps_per_epoch)
            if epoch > state.epochs_ended:
                self._end_epoch()
            if state.step == self.phase.num_steps:
                break
            if stop or is_due:
                self._save()
            if stop:
                self._interrupt()
            if epoch != epoch_of_batches:
                epoch_of_batches, batches = epoch, self._epoch_batches(rows, epoch)
                set_mode(session.network, self.phase, training=True)  # only an epoch's evaluation changes it
            following = batches[within + 1] if within + 1 < len(batches) else None
            stop, is_due = self._step(batches[within], following, reduction)
            session.report(Advanced(1))

    def _epoch_batches(self, rows: Ints, epoch: int) -> list[Ints]:
        session, recipe = self.session, self.session.plan.recipe
        train = session.source("train")
        if isinstance(train, FeatureSource):
            train.epoch = epoch
        # A frozen body gives the same whatever is beside a sample, and its stored features have one length: the head is
        # trained on the same batches with and without them.
        bucketing = session.length_bucketing and self.phase.trains == "everything"
        seed = session.plan.job.training.seed
        return epoch_batches(session.samples, rows, seed, self._epoch_number(epoch), recipe.steps_per_epoch, bucketing)

    def _epoch_number(self, epoch: int) -> int:
        """Of all phases, from 0."""
        state, recipe = self.session.state, self.session.plan.recipe
        return state.num_epochs_ended(recipe) - state.epochs_ended + epoch

    # --- a step ---

    def _step(self, rows: Ints, following: Ints | None, reduction: GradientReduction) -> tuple[bool, bool]:
        """One optimizer step over all microbatches of a batch: (somebody asked to stop, a checkpoint is due)."""
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
            with statistics.of(microbatch):
                with autocast(plan, worker):
                    logits = session.forward(channels_last(batch.inputs))
                loss, weight = session.objective.loss(logits, batch.targets)
                is_last = microbatch == own[-1][0]
                with reduction.overlapped() if is_last else contextlib.nullcontext():
                    loss.backward()  # type: ignore[no-untyped-call]
            right = session.objective.num_right(logits.detach(), batch.targets)
            sums += torch.stack([loss.detach(), weight, right])
            num_samples += len(batch.rows)
        reduction.begin()
        state.step += 1
        if following is not None:
            for microbatch, some in self._own_microbatches(following):
                key = (plan.job.training.seed, number + 1, microbatch)
                session.loader.prepare(session.source("train"), key, some)
        # Numbers that the host needs are exchanged apart from those that are on the device: so nobody waits for it.
        due = worker.rank == 0 and self._checkpoint_is_due()
        sums = worker.all_reduce_sum(sums)
        told = worker.all_reduce_sum(torch.tensor([num_samples, session.should_stop(), due], dtype=torch.float64))
        num_samples, stop, due = told.tolist()
        # Of a batch that nobody could read there is nothing to learn.
        reduction.finish((1.0 / sums[1]).float() if num_samples else 0.0)
        if num_samples:
            self._take_step()
            statistics.average()
        self.optimizer.zero_grad(set_to_none=True)
        self._unread.append((sums, num_samples, number))
        # What a GPU has computed is looked at a step later, when it is there: so nobody waits for it.
        self._read_sums(keep=0 if worker.device.type == "cpu" else 1)
        return stop > 0, due > 0

    def _own_microbatches(self, rows: Ints) -> list[tuple[int, Ints]]:
        worker, num = self.session.worker, self.session.plan.recipe.num_microbatches
        return [(one, split_evenly(rows, one, num)) for one in range(worker.rank, num, worker.num_workers)]

    def _take_step(self) -> None:
        training = self.session.plan.job.training
        if training.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.named.values(), training.clip_norm)
        factor = rate_factor(self.session.plan, self.phase.num_steps, self.session.state.step - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.optimizer.step()

    def _read_sums(self, keep: int = 0) -> None:
        """Add what steps summed up to the epoch's figures, but for the `keep` newest. Raises `TrainingError`."""
        state = self.session.state
        while len(self._unread) > keep:
            sums, num_samples, number = self._unread.pop(0)
            loss, weight, right = sums.tolist()
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} at step {number}",
                    expected="a finite loss",
                    mend="lower training.learning_rate, and start over with --fresh",
                )
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
        predictions = predict_split(session, "validation")
        if predictions is None:
            self._save()
            self._interrupt()
        num_samples = max(1.0, state.epoch_samples)
        recipe = plan.recipe
        line: dict[str, Any] = {
            "epoch": state.num_epochs_ended(recipe) + 1,
            "step": state.steps_done(recipe),
            "train_loss": state.epoch_loss / (state.epoch_weight or 1.0),
            "train_accuracy": state.epoch_correct / num_samples,
            "learning_rate": self.phase.head_learning_rate * rate_factor(plan, self.phase.num_steps, state.step - 1),
            "seconds": round(session.seconds(), 3),
            "samples_per_s": round(self._epoch_samples / max(seconds, 1e-9), 1),
        }
        if plan.job.task == "regression":
            del line["train_accuracy"]
        line |= epoch_figures(plan.job.task, predictions)
        if self._is_better(line):
            state.best_epoch = line["epoch"]
            self.best = ckpt.copy_of(self.tensors)
        state.epoch_loss = state.epoch_correct = state.epoch_samples = state.epoch_weight = 0.0
        state.epochs_ended += 1
        if session.record is not None:
            session.record.add(line)
        session.report(EpochEnded(line, recipe.num_epochs, plan.job.task))
        self._epoch_started, self._epoch_samples = time.monotonic(), 0.0

    def _is_better(self, line: dict[str, Any]) -> bool:
        """Whether an epoch is the best so far; without a validation split the last one is."""
        state = self.session.state
        if "validation_loss" not in line:
            return True
        # The most right; of equals the surest. Small validation sets have many equals, and with several labels a
        # sample hardly any is wholly right at first: there the loss decides.
        accuracy = line["validation_accuracy"] if self.session.plan.job.task == "single-label" else 0.0
        if (accuracy, -line["validation_loss"]) <= (state.best_accuracy, -state.best_loss):
            return False
        state.best_accuracy, state.best_loss = accuracy, line["validation_loss"]
        return True

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
        for skipped in session.worker.gather(session.raw.skipped):
            session.raw.skipped.update(skipped)
        state.skipped = {str(row): why for row, why in sorted(session.raw.skipped.items())}
        if session.record is not None and session.outbox is not None:
            entries = {**state.entries(), "seconds": session.seconds()}
            optimizer = ckpt.optimizer_tensors(self.optimizer, self.named)
            step = state.steps_done(session.plan.recipe)
            with session.outbox.stalling():
                session.outbox.wait()  # at most one is behind
                copied = ckpt.copied(ckpt.Checkpoint(step, self.tensors, self.best, optimizer, entries))
                session.record.publish()  # the lines of the epochs that the checkpoint counts as ended
                session.outbox.put(partial(ckpt.save, session.outbox.run, copied))
        session.saved_at = time.monotonic()

    def _interrupt(self) -> NoReturn:
        self.session.worker.barrier()
        state, recipe = self.session.state, self.session.plan.recipe
        raise InterruptedRunError(
            f"stopped at step {state.steps_done(recipe)} of {recipe.num_steps}",
            mend="the same command goes on from there",
        )


def rate_factor(plan: Plan, num_steps: int, step: int) -> float:
    """Linear warm-up from 0, then cosine to 0 (Loshchilov & Hutter 2017, arXiv 1608.03983) or constant.

    `step` of the phase's `num_steps`, from 0.
    """
    training = plan.job.training
    warmup = round(training.warmup_fraction * num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if training.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))
