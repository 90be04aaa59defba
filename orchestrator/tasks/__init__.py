"""What a task asks for: one class a sample, several, or numbers.

In: a network's outputs and the targets. Out: a loss to train by, figures with their intervals, which of two networks
answers better. Knows nothing of features, and of no run's storage.

    objective   what the task decides: loss, class weights, the scale of targets
    metrics     figures of each task, confusion
    intervals   their 95 % intervals
    choice      two networks on the same validation samples, and why the one is kept
"""

from orchestrator.tasks.choice import (
    LOWEST as LOWEST,
    Comparison as Comparison,
    compare as compare,
    may_be_as_good as may_be_as_good,
    rank_of as rank_of,
    what_was_chosen as what_was_chosen,
)
from orchestrator.tasks.intervals import wilson as wilson
from orchestrator.tasks.metrics import (
    Predictions as Predictions,
    compute_metrics as compute_metrics,
    finite as finite,
)
from orchestrator.tasks.objective import (
    Objective as Objective,
    fold_target_scale as fold_target_scale,
    make_objective as make_objective,
)
