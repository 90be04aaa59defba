"""The decision before anything is downloaded or scheduled: does the backbone fit, and what would the job do.

In: a Job. Out: a `Plan` with every default resolved and every adaptation of the input named, or a `RefusedError` with
the mend. Reads metadata and data, never a weight; imports neither torch nor Ray.

    decide    pure: (modality, card, profile, job) -> Plan, or a refusal
    planning  check and plan: reads what `decide` is given
"""

from orchestrator.gate.decide import run_name as run_name
from orchestrator.gate.planning import (
    Checked as Checked,
    ResolvedBackbone as ResolvedBackbone,
    check as check,
    drafted as drafted,
    inspect as inspect,
    materialised as materialised,
    num_cores as num_cores,
    plan as plan,
    prepare as prepare,
    resolve_backbone as resolve_backbone,
    without_rows as without_rows,
)
