"""The best linear layer on features that do not change, its strength chosen by cross-validation.

In: features and targets in memory, the task, and, where they are given, weights of the classes and
groups of samples that share a fold. Out: weights, a strength, the figure of the cross-validation. No learning rate, no
schedule, no run: a convex problem, solved in closed form (ridge) or by L-BFGS (logistic regression).

    probe       the layer, and what says how good it is
    linear_fits  the layers of all folds side by side: ridge, logistic regression
    minimise    several convex problems at once
    folds       which fold a sample is held out in
"""

from orchestrator.probing.folds import assign_folds as assign_folds
from orchestrator.probing.probe import (
    SCORES as SCORES,
    STRENGTHS as STRENGTHS,
    Probe as Probe,
    fit_layer as fit_layer,
    fit_probe as fit_probe,
)
