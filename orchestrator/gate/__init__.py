"""The decision before weights are downloaded or workers scheduled: does the backbone fit, and what would the job do.

In: a Job. Out: a `Plan` with every default resolved and every adaptation of the input named, or a `RefusedError` with
the mend. Downloads metadata and data, never weights (those of a local directory are hashed); imports neither torch nor
Ray.

    decide    pure: does the backbone fit the modality and the data, or why not
    own_code  is the network the one that its type names
    recipes   a method -> phases, with every default
    adapters  whether method lora can add to the backbone's matrices, and how much that is
    combinations  settings of the training that mean nothing beside others
    resolve   pure: (modality, card, profile, job) -> Plan
    beginning  what a run's directory begins with
    resume    a plan against the one that an unfinished run began with
    remaking  whether what a run has lost is made again, and from what
    given_rows  rows that a program holds, on the storage of its runs
    planning  check and plan: reads what these are given
"""

from orchestrator.gate.beginning import texts_of as texts_of
from orchestrator.gate.combinations import refuse_unknown_mix as refuse_unknown_mix
from orchestrator.gate.decide import match as match, parse_settings as parse_settings
from orchestrator.gate.given_rows import rows_written as rows_written
from orchestrator.gate.own_code import refuse_own_code as refuse_own_code
from orchestrator.gate.planning import (
    Checked as Checked,
    ResolvedBackbone as ResolvedBackbone,
    check as check,
    drafted as drafted,
    inspect as inspect,
    materialised as materialised,
    measures_alike as measures_alike,
    num_cores as num_cores,
    plan_on as plan_on,
    planned as planned,
    prepare as prepare,
    read_data as read_data,
    refuse_inside_data as refuse_inside_data,
    resolve_backbone as resolve_backbone,
    without_rows as without_rows,
)
from orchestrator.gate.remaking import makes_again as makes_again, note_lost_plan as note_lost_plan
from orchestrator.gate.resolve import run_name as run_name
from orchestrator.gate.resume import (
    gone_on_with as gone_on_with,
    idle_workers as idle_workers,
    refuse_changes as refuse_changes,
    same_learning as same_learning,
)
