"""What is asked for, what was decided, and where it lies: the Job, the Plan, places of data, runs on a storage.

In: what a person wrote in Python, YAML or flags. Out: a checked, frozen `Job`; the `Plan` that the gate makes of it is
plain data that travels to workers as JSON. Imports neither torch nor Ray.

    spec      the Job and its parts; Python, YAML and flags become the same object
    drafts    what a person wrote -> a Job, each fault with its place
    keys      every key of a job, and what a name without its group stands for
    reference  what each key takes, its default and its meaning, out of the models
    places    what a place of the user's means: a path, a URI, a data set of the Hub
    plans     the plain data that travels: BackboneCard, Plan
    runs      a run's directory: what is in it, whether it is done, who works on it
    events    what happens while a job runs
    storage   one interface for runs in a directory and in an object store, with leases; no job works through it yet
    directories  the same for a directory; for object stores it is in `data`
    figures   which figures of a task are shown, and how they are written
"""

from orchestrator.job.directories import DirectoryStorage as DirectoryStorage
from orchestrator.job.drafts import (
    Draft as Draft,
    make_draft as make_draft,
    make_job as make_job,
    nearest_value as nearest_value,
    parse_setting as parse_setting,
)
from orchestrator.job.events import (
    Advanced as Advanced,
    EpochEnded as EpochEnded,
    Event as Event,
    Failed as Failed,
    Noted as Noted,
    PhaseBegan as PhaseBegan,
    Report as Report,
)
from orchestrator.job.figures import (
    FIGURES as FIGURES,
    OF_TARGETS as OF_TARGETS,
    figure as figure,
    figures_of as figures_of,
    interval as interval,
)
from orchestrator.job.places import (
    DATA_FOLDER as DATA_FOLDER,
    SPLIT_KEYS as SPLIT_KEYS,
    SPLIT_NAMES as SPLIT_NAMES,
    TABLE_SUFFIXES as TABLE_SUFFIXES,
    as_settings as as_settings,
    choose_splits as choose_splits,
    dataset_id as dataset_id,
    holds_rows as holds_rows,
    is_dataset as is_dataset,
    is_materialised as is_materialised,
    is_rows as is_rows,
    is_uri as is_uri,
    library_of as library_of,
    local_path as local_path,
    shown as shown,
)
from orchestrator.job.plans import (
    SPLITS as SPLITS,
    Adaptation as Adaptation,
    BackboneCard as BackboneCard,
    BackboneRow as BackboneRow,
    DataSummary as DataSummary,
    Parameters as Parameters,
    Phase as Phase,
    Plan as Plan,
    Recipe as Recipe,
)
from orchestrator.job.reference import (
    Setting as Setting,
    job_reference as job_reference,
    setting_of as setting_of,
    settings_of as settings_of,
)
from orchestrator.job.runs import (
    ERROR_FILE as ERROR_FILE,
    SAMPLES as SAMPLES,
    Run as Run,
    list_runs as list_runs,
    open_finished as open_finished,
    open_run as open_run,
    still_there as still_there,
    sync as sync,
    write_file as write_file,
)
from orchestrator.job.spec import (
    IN_A_STORE as IN_A_STORE,
    NOT_LEARNT as NOT_LEARNT,
    Data as Data,
    Job as Job,
    Method as Method,
    TaskName as TaskName,
    Training as Training,
)
from orchestrator.job.storage import (
    VERSION as VERSION,
    Lease as Lease,
    Manifest as Manifest,
    Storage as Storage,
    file_sha256 as file_sha256,
    make_manifest as make_manifest,
    next_version as next_version,
    number_of as number_of,
    run_is_busy as run_is_busy,
    run_was_taken as run_was_taken,
)
