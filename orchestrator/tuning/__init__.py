"""What is found out by trying: which backbone to take.

In: backbones, data and the job that they have in common. Out: a `RankTable`. What is computed on the way lies where
every job looks for it.

    ranking     rank: candidates through the gate, the race, the table
    candidates  each candidate through the gate, on data that is read once
    race        features and probes on a sample that grows for those still in it
    standings   what came of a candidate, and whether two differ by more than the noise
    neighbours  nearest neighbours on features, over the same folds
    steps       how long full fine-tuning would take: a few steps are measured
"""

from orchestrator.tuning.ranking import rank as rank
from orchestrator.tuning.standings import RankRow as RankRow, RankTable as RankTable
