"""Trials of a frozen body: its features are computed once, and the heads of all trials on them trained side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from orchestrator.backbone import fetch
from orchestrator.errors import InterruptedRunError
from orchestrator.features import NoCut, compute_features, open_features
from orchestrator.gate import num_cores
from orchestrator.job import Advanced, Noted, PhaseBegan, Plan
from orchestrator.modality import Modality, registry
from orchestrator.network import Cut, Network, autocast, find_device, start_worker
from orchestrator.tasks import make_objective
from orchestrator.training import assembled
from orchestrator.tuning.heads import HeadInputs, HeadStack, Outcome, Weights, can_be_stacked, head_weights, in_pieces
from orchestrator.tuning.pending import PendingTrial, TrialContext
from orchestrator.tuning.trials import Trial

_FEATURES_FILE = "features.json"


@dataclass
class Stacks:
    """Trains groups of heads in this process."""

    context: TrialContext

    def train(self, tasks: Sequence[PendingTrial]) -> list[PendingTrial]:
        """Train the heads of one group; the tasks whose network does not allow it, which need a run of their own.

        Raises `InterruptedRunError` where `should_stop` says so.
        """
        plan, report, layout = tasks[0].plan, self.context.report, self.context.layout
        modality = registry.get(plan.job.modality)
        device = find_device(plan.job.scaling.device)
        threads = plan.threads_per_worker or num_cores()
        with start_worker(threads, device) as worker, ExitStack() as resources:
            report(PhaseBegan("loading the backbone"))
            layout.use_table_of(plan)
            run = layout.search
            network, raw = assembled(
                plan, run, worker, modality, resources, lambda text: report(Noted(text)), self.context.should_stop
            )
            run.delete(_FEATURES_FILE)  # of another backbone, perhaps
            ref = compute_features(
                plan, run, network, modality, raw, worker, report, self.context.should_stop, resources
            )
            run.delete(_FEATURES_FILE)
            if isinstance(ref, NoCut) or not can_be_stacked(network, ref.cache.cut):
                why = "no cut holds" if isinstance(ref, NoCut) else "the head has dropout or statistics of its own"
                report(Noted(f"{plan.backbone.name}: {why}, so each of its trials is a run of its own"))
                return list(tasks)
            sources = open_features(ref, raw.samples, resources, lambda text: report(Noted(text)), verified=True)
            neutral = plan.model_copy(update={"class_weights": ()})
            inputs = HeadInputs(
                raw.samples, sources["train"], sources["validation"], make_objective(neutral, network), device,
                lambda: autocast(plan, worker),
            )  # fmt: skip
            self._train(tasks, network, ref.cache.cut, inputs, modality)
        return []

    def _train(
        self, tasks: Sequence[PendingTrial], network: Network, cut: Cut, inputs: HeadInputs, modality: Modality
    ) -> None:  # fmt: skip
        first = _FirstWeights(network, cut, tasks[0].plan, modality)
        pieces = in_pieces(len(tasks), sum(one.numel() for one in head_weights(network, cut).values()))
        epochs = tasks[0].plan.recipe.num_epochs
        self.context.report(PhaseBegan(f"training {len(tasks)} heads side by side", len(tasks) * epochs))
        for piece in pieces:
            some = [tasks[i] for i in piece]
            started = time.monotonic()
            stack = HeadStack(network, cut, [one.plan for one in some], [first.of(one.plan) for one in some], inputs)

            def goes_on(head: int, line: Mapping[str, Any], some: Sequence[PendingTrial] = some) -> bool:
                self.context.heard(some[head].key, line)
                return self.context.stopping.goes_on(some[head].key, line)

            stopped = False

            def tick(num: int) -> bool:
                nonlocal stopped
                self.context.report(Advanced(num))
                stopped = self.context.should_stop()
                return stopped

            outcomes = stack.train(goes_on, tick)
            seconds = (time.monotonic() - started) / len(some)
            trials = []
            for task, outcome in zip(some, outcomes, strict=True):
                over = outcome.failed_at is not None or not stopped or len(outcome.lines) == epochs
                if over:
                    trials.append(self._trial(task, outcome, seconds, len(some)))
            self.context.ended(trials)
            if stopped:
                raise InterruptedRunError(
                    "stopped while heads were trained", mend="the same command goes on; these heads begin anew"
                )

    def _trial(self, task: PendingTrial, outcome: Outcome, seconds: float, together: int) -> Trial:
        epochs = task.plan.recipe.num_epochs
        number, repeat = task.key
        failed = outcome.failed_at is not None
        if not failed:
            self.context.stopping.ended(task.key, outcome.lines[-1])
        return Trial(
            number, task.config,
            "failed" if failed else "finished" if len(outcome.lines) == epochs else "stopped",
            None if failed else self.context.metric.value(outcome.lines), epochs, outcome.lines, round(seconds, 3),
            f"the loss at step {outcome.failed_at} is not finite" if failed else "", repeat, together,
        )  # fmt: skip


class _FirstWeights:
    """The weights of heads before training, which depend on the seed alone."""

    def __init__(self, network: Network, cut: Cut, plan: Plan, modality: Modality) -> None:
        self._cut, self._modality = cut, modality
        self._known: dict[int, Weights] = {plan.job.training.seed: head_weights(network, cut)}

    def of(self, plan: Plan) -> Weights:
        """Those of a plan."""
        seed = plan.job.training.seed
        if seed not in self._known:
            assert self._modality.build is not None
            network = self._modality.build(plan, fetch(plan.backbone, plan.weights != "random"))
            self._known[seed] = head_weights(network, self._cut)
        return self._known[seed]
