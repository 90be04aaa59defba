"""What is found out by trying: which backbone to take.

ranking     rank: candidates through the gate, the race, the table
candidates  each candidate through the gate, on data that is read once
race        features and probes on a sample that grows for those still in it
standings   what came of a candidate, and whether two differ by more than the noise
neighbours  nearest neighbours on features, over the same folds
steps       how long full fine-tuning would take: a few steps are measured
"""

from orchestrator.tuning.ranking import rank as rank
from orchestrator.tuning.standings import RankRow as RankRow, RankTable as RankTable
