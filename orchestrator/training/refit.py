"""The last part of a run that refits: training anew on training and validation samples, with what was chosen."""

from __future__ import annotations

import math

from orchestrator.training import checkpoint as ckpt
from orchestrator.training.state import Session


def first_weights(session: Session) -> ckpt.Tensors:
    """A copy of all weights as they are now, before any checkpoint; {} where nobody will begin anew from them."""
    refits = any(phase.refits for phase in session.plan.recipe.phases)
    if not refits or session.state.chosen_epoch >= 0:
        return {}
    return ckpt.copy_of(_everything(session))


def begin_refit(session: Session, initial: ckpt.Tensors) -> bool:
    """See to it that the phases that refit have their samples; whether they begin now, from the `initial` weights.

    Each is as long as the one that it repeats was up to the best epoch, and none of them looks at a validation split.
    """
    state, recipe = session.state, session.plan.recipe
    if len(session.samples.rows("validation")):
        session.samples = session.samples.all_in_training()
    if state.chosen_epoch >= 0:
        return False
    state.chosen_epoch = state.best_epoch
    left, num = state.best_epoch, len(recipe.phases) // 2
    for number, (first, again) in enumerate(zip(recipe.phases[:num], recipe.phases[num:], strict=True), num):
        epochs = max(0, min(left, first.epochs))
        left -= first.epochs
        steps = math.ceil(len(session.samples.rows("train")) / recipe.batch_size)
        num_steps = again.num_steps if first.solver == "probe" else epochs * steps
        session.decide(number, solver=first.solver, epochs=epochs, num_steps=num_steps if epochs else 0)
    state.best_loss, state.best_accuracy = math.inf, -1.0
    ckpt.load_into(initial, _everything(session))
    return True


def _everything(session: Session) -> ckpt.Tensors:
    module = session.network.module
    names = [*(name for name, _ in module.named_parameters()), *(name for name, _ in module.named_buffers())]
    return session.strategy.state(names)
