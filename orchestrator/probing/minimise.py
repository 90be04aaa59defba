"""Several smooth convex problems at once, each to its minimum: L-BFGS with a preconditioner."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

_MEMORY = 8
_ARMIJO = 1e-4
_ROUNDING = 1e-6
"""Of a value in float32: a step that makes it larger by no more is not taken for a bad one."""
_MOST_BACKTRACKS = 20
_LEAST_SLOPE = 1e-6
"""Of what the preconditioner alone gives."""

Function = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Points [problems, size] -> (values [problems], gradients [problems, size])."""


def minimise(
    function: Function, start: Tensor, precondition: Callable[[Tensor], Tensor], tolerance: float, max_steps: int
) -> Tensor:
    """The points where each problem's value is within about `tolerance` (relative) of its minimum: [problems, size].

    L-BFGS (Liu and Nocedal 1989) with backtracking, for all problems side by side, so that one pass over what they
    share (the features) serves all. `precondition` applies a symmetric matrix that is like the inverse of the Hessian.
    float32; the same for the same number of threads.
    """
    point = start
    value, gradient = function(point)
    history: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=_MEMORY)
    scale = torch.ones_like(value)
    done = torch.zeros_like(value, dtype=torch.bool)
    for _ in range(max_steps):
        direction, plain = -_newton_like(gradient, history, scale, precondition), -precondition(gradient)
        slope, plain_slope = _dot(gradient, direction), _dot(gradient, plain)
        astray = slope > _LEAST_SLOPE * plain_slope  # what the last steps told of the curvature holds no longer
        direction = torch.where(astray[:, None], plain, direction)
        slope = torch.where(astray, plain_slope, slope)
        # Half the slope is what a quadratic would still fall by.
        done |= -slope <= 2 * tolerance * value.abs()
        if done.all():
            break
        step = (~done).to(value.dtype)
        for _ in range(_MOST_BACKTRACKS):
            trial = point + step[:, None] * direction
            new_value, new_gradient = function(trial)
            worse = ~(new_value <= value + _ARMIJO * step * slope + _ROUNDING * value.abs())
            if not worse.any():
                break
            step = torch.where(worse, _shorter(step, slope, new_value - value), step)
        done |= worse  # nothing below it that float32 could tell
        step_difference, gradient_difference = trial - point, new_gradient - gradient
        step_difference[worse] = gradient_difference[worse] = 0
        curvature = _dot(step_difference, gradient_difference)
        inverse = torch.where(curvature > 0, 1 / curvature.clamp_min(1e-38), 0.0)
        scale = torch.where(
            curvature > 0,
            curvature / _dot(gradient_difference, precondition(gradient_difference)).clamp_min(1e-38),
            scale,
        )
        history.append((step_difference, gradient_difference, inverse))
        point = torch.where(worse[:, None], point, trial)
        value = torch.where(worse, value, new_value)
        gradient = torch.where(worse[:, None], gradient, new_gradient)
    return point


def _newton_like(
    gradient: Tensor, history: deque[tuple[Tensor, Tensor, Tensor]], scale: Tensor,
    precondition: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """The two loops of L-BFGS."""
    vector, factors = gradient.clone(), []
    for step_difference, gradient_difference, inverse in reversed(history):
        factor = inverse * _dot(step_difference, vector)
        vector -= factor[:, None] * gradient_difference
        factors.append(factor)
    vector = scale[:, None] * precondition(vector)
    for (step_difference, gradient_difference, inverse), factor in zip(history, reversed(factors), strict=True):
        vector += (factor - inverse * _dot(gradient_difference, vector))[:, None] * step_difference
    return vector


def _shorter(step: Tensor, slope: Tensor, rise: Tensor) -> Tensor:
    """Where a parabola through what is known has its minimum, between a tenth and a half of the step."""
    least = -slope * step**2 / (2 * (rise - slope * step)).clamp_min(1e-38)
    return torch.where(least.isfinite(), least, 0.1 * step).maximum(0.1 * step).minimum(0.5 * step)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    product: Tensor = torch.linalg.vecdot(one, other)
    return product
