"""Many runs to find one: searches over the settings of a job by Ray Tune's means, and which backbone to take.

In: a job, and what its settings are drawn from. Out: trials in an order, the best one as a finished run. What trials
share is done once: the data is read, a frozen body runs, and heads are trained side by side.

    study       the driver: a space -> trials -> a SearchResult
    settings    what a search is asked for beside its job and space
    space       keys of a job and what their values are drawn from
    proposals   which configurations come next
    trials      what came of each trial, and the record of it
    layout      a trial's job -> its plan and its run, on data that was read once
    work        which trials are trained how, and what is told of them
    pending     a trial that is to be done, and what it is done with
    stacks      trials of a frozen body: features once, heads side by side
    heads       many heads on the same features, trained at once
    arithmetic  their losses and optimizers
    probes      the first phase of lp-ft, which trials share
    on_tune     trials as Ray Tune's, each a run in a process of its own
    tune_parts  what Ray Tune calls while it runs them
    in_trial    one of them, in its own process
    room        how many of them a cluster has room for, and what each gets
    stopping    Tune's schedulers that stop trials early
    result      what a search gives: trials in order, tables
    pictures    the same as pictures
    ranking     rank: candidates through the gate, the race, the table
    candidates  each candidate through the gate, on data that is read once
    race        successive halving: features and probes on more samples for those still in it
    standings   what came of a candidate, and whether two differ by more than the noise
    neighbours  k-NN on features, over the same folds
    sent_search  a search as a job for a cluster
    sent_ranking  a ranking as a job for a cluster
    steps       how long full fine-tuning would take: a few steps are measured
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import orchestrator.distributed  # noqa: F401  # it sets what Ray reads when it is imported

if TYPE_CHECKING:
    from orchestrator.tuning.ranking import rank as rank
    from orchestrator.tuning.result import (
        SearchResult as SearchResult,
        open_search as open_search,
        shown_config as shown_config,
    )
    from orchestrator.tuning.sent_ranking import rank_to_send as rank_to_send, run_rank as run_rank
    from orchestrator.tuning.sent_search import run_search as run_search, search_to_send as search_to_send
    from orchestrator.tuning.standings import RankRow as RankRow, RankTable as RankTable
    from orchestrator.tuning.study import search as search
    from orchestrator.tuning.trials import Trial as Trial

# Loaded when they are first used: a ranking needs nothing of Ray, which takes a second or two to import.
_HOMES = {
    "RankRow": "standings",
    "RankTable": "standings",
    "SearchResult": "result",
    "Trial": "trials",
    "open_search": "result",
    "rank": "ranking",
    "rank_to_send": "sent_ranking",
    "run_rank": "sent_ranking",
    "run_search": "sent_search",
    "search": "study",
    "search_to_send": "sent_search",
    "shown_config": "result",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'orchestrator.tuning' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"orchestrator.tuning.{_HOMES[name]}"), name)
    return value
