"""A loss that is not finite: which samples of the batch it comes of, and whether an input, the weights or the rate is
to blame. It is found out, by looking at the inputs and the weights, and by running the batch again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from orchestrator.data import Ints
from orchestrator.errors import OrchestratorError, TrainingError, counted
from orchestrator.features import Batch
from orchestrator.network import autocast, channels_last
from orchestrator.training import checkpoint as ckpt
from orchestrator.training.state import Session

_SHOWN = 3
Own = Sequence[tuple[int, Ints]]
"""(microbatch, its rows) of this worker."""


@dataclass
class _Seen:
    """What one worker finds in its part of the batch. Plain data, which the others get."""

    batch: list[str] = field(default_factory=list)
    """Places of all samples."""
    bad_inputs: list[str] = field(default_factory=list)
    """Places of samples whose inputs or targets are not finite."""
    bad_features: list[str] = field(default_factory=list)
    """The same of features that a frozen body gave for inputs that are finite."""
    bad_outputs: list[str] = field(default_factory=list)
    """Places of samples for which the network gives no number, by the weights of the step."""
    with_earlier: list[str] = field(default_factory=list)
    """The same by the newest checkpoint's weights."""
    in_fp32: list[str] = field(default_factory=list)
    """The same by the weights of the step, in full precision."""


def blame(
    session: Session, moving: ckpt.Tensors, best: ckpt.Tensors, own: Own, number: int, loss: float
) -> TrainingError:  # fmt: skip
    """What to raise for a loss that is not finite, with its cause. Called by all workers, which get the same.

    `moving`: the tensors that are trained; `best`: the best weights so far, {} where there are none; `own`: what this
    worker computed in the step of that number. The network is left with other weights than it had.
    """
    broken = _not_finite(session)
    frozen = [name for name in broken if name not in moving]
    seen = _Seen()
    batches = [batch for batch in _batches(session, own, number) if batch is not None]
    for batch in batches:
        seen.batch += [session.samples.place(int(row)) for row in batch.rows]
        bad = _places(session, batch, [*batch.inputs.values(), batch.targets])
        if bad and session.source_name == "features" and _raw_is_finite(session, batch):
            seen.bad_features += bad
        else:
            seen.bad_inputs += bad
        seen.bad_outputs += _fails(session, batch)
        if session.plan.precision != "fp32":
            seen.in_fp32 += _fails(session, batch, exact=True)
    earlier = _take_earlier_weights(session, moving, best, number)
    if earlier is not None:
        for batch in batches:
            seen.with_earlier += _fails(session, batch)
    all_seen = session.worker.all_gather(seen)
    whole = _Seen(*([place for one in all_seen for place in getattr(one, name)] for name in vars(seen)))
    cause, mend = _judge(session, whole, broken, frozen, earlier, number)
    named = "" if any(place in cause for place in whole.batch) else f"; its batch: {_named(whole.batch)}"
    return TrainingError(f"the loss is {loss} at step {number}: {cause}{named}", expected="a finite loss", mend=mend)


def _judge(
    session: Session, seen: _Seen, broken: list[str], frozen: list[str], earlier: str | None, number: int
) -> tuple[str, str]:
    """(the cause, what to do about it)"""
    data = session.plan.job.data
    if seen.bad_inputs:
        skip = "" if data.on_bad_sample == "skip" else ", or a plugin's decode that says so of such samples"
        return f"an input is to blame, which is not finite: {_named(seen.bad_inputs)}", (
            f"mend or remove such samples{skip}, and start over with --fresh"
        )
    if seen.bad_features:
        return f"the backbone is to blame: of finite inputs it makes NaN or infinity: {_named(seen.bad_features)}", (
            "set training.precision = fp32, or choose another backbone"
        )
    if frozen or (broken and number == 0):
        names = frozen or broken
        return f"the backbone's weights are to blame: {names[0]} of them is not finite", (
            "fetch or save the backbone again"
        )
    if seen.bad_outputs and not broken and not seen.in_fp32 and session.plan.precision != "fp32":
        return f"the precision is to blame: in fp32 the network gives finite values for {_named(seen.bad_outputs)}", (
            "set training.precision = fp32, and start over with --fresh"
        )
    # Weights that are to blame fail on all samples. Those of a checkpoint may be no older than the step.
    only_some = bool(seen.with_earlier) and (len(seen.with_earlier) < len(seen.batch) or len(seen.batch) == 1)
    if seen.bad_outputs and not broken and (number == 0 or only_some):
        which = "its weights as they began" if number == 0 else f"{earlier} too"
        return f"an input is to blame: with {which} the network gives NaN or infinity for {_named(seen.bad_outputs)}", (
            "look at these samples: values far beyond those of others overflow; mend or remove them, and start over "
            "with --fresh"
        )
    return _rate(session, seen, broken, earlier)


def _rate(session: Session, seen: _Seen, broken: list[str], earlier: str | None) -> tuple[str, str]:
    phase = session.phase
    rates = {phase.highest_rate, phase.learning_rate if phase.trains != "head" else 0.0} - {0.0}
    shown = " and ".join(f"{rate:g}" for rate in sorted(rates))
    if broken:
        how = f"the steps before have made {broken[0]} infinite or NaN"
    elif seen.bad_outputs:
        how = f"the weights have grown until the network gives NaN or infinity for {_named(seen.bad_outputs)}"
    else:
        how = "the outputs are finite, and so large that their loss is not"
    if earlier is not None and not seen.with_earlier:
        how += f", while {earlier} still give finite values"
    lower = f"{float(f'{phase.highest_rate / 10:.0e}'):g}"
    clip = "" if session.plan.job.training.clip_norm is not None else ", set training.clip_norm = 1"
    return f"the learning rate of {shown} is to blame: {how}", (
        f"lower it: training.learning_rate = {lower}{clip}, and start over with --fresh"
    )


def _named(places: Sequence[str]) -> str:
    shown = ", ".join(places[:_SHOWN])
    return shown if len(places) <= _SHOWN else f"{shown} and {counted(len(places) - _SHOWN, 'sample')} more"


# --- what is looked at ---


def _not_finite(session: Session) -> list[str]:
    """Names of the network's parameters and buffers that hold NaN or infinity."""
    module = session.network.module
    named = [*module.named_parameters(), *module.named_buffers()]
    return [name for name, one in named if one.is_floating_point() and not bool(one.isfinite().all())]


def _batches(session: Session, own: Own, number: int) -> Iterable[Batch | None]:
    for microbatch, rows in own:
        yield session.loader.load(session.source("train"), (session.plan.job.training.seed, number, microbatch), rows)


def _raw_is_finite(session: Session, batch: Batch) -> bool:
    raw = session.raw.batch(batch.rows, train=False)
    return raw is None or not _places(session, raw, raw.inputs.values())


def _fails(session: Session, batch: Batch, exact: bool = False) -> list[str]:
    """Places of samples for which the network gives no number; `exact`: in fp32, whatever the job's precision."""
    with torch.no_grad(), contextlib.nullcontext() if exact else autocast(session.plan, session.worker):
        outputs = session.forward(channels_last(batch.inputs))
    return _places(session, batch, [outputs])


def _places(session: Session, batch: Batch, tensors: Iterable[Tensor]) -> list[str]:
    """Of the samples for which one of the tensors, [samples, ...], is not finite."""
    bad = torch.zeros(len(batch.rows), dtype=torch.bool)
    for tensor in tensors:
        if tensor.is_floating_point():
            bad |= ~tensor.detach().reshape(len(bad), -1).isfinite().all(dim=1).cpu()
    return [session.samples.place(int(row)) for row in batch.rows[bad.numpy()]]


def _take_earlier_weights(session: Session, moving: ckpt.Tensors, best: ckpt.Tensors, number: int) -> str | None:
    """Give the network weights from before the step of that number; what they are called. None where there are none.

    Those of the newest checkpoint; where it is of the phase before, which trained less, with the best ones, with which
    this one began; and these alone, if there are any, where it is no older than the step. The same on all workers.
    """
    worker, run = session.worker, session.run
    step: int | None = worker.all_gather(ckpt.newest_step(run) if worker.rank == 0 else None)[0]
    weights, name = dict(best), "the best weights so far"
    try:
        if step is not None and (step < number or not best):
            weights |= ckpt.load(run, step).weights
            name = f"the weights of step {step}"
        if not weights:
            return None
        ckpt.load_into({k: v for k, v in weights.items() if k in moving}, moving, needed=())
    except OrchestratorError:
        return None
    return name
