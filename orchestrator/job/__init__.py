"""What is asked for, what was decided, and where it lies: the Job, the Plan, places of data, runs on a storage.

In: what a person wrote in Python, YAML or flags. Out: a checked, frozen `Job`; the `Plan` that the gate makes of it is
plain data that travels to workers as JSON. Imports neither torch nor Ray.

    spec      the Job: Python, YAML and flags become the same object
    part      what every group of its settings has in common
    data_spec, training_spec, scaling_spec  the groups: where the samples are, how weights move, where it runs
    drafts    what a person wrote -> a Job, each fault with its place
    faults    what pydantic found wrong with a job, in our words
    keys      every key of a job, and what a name without its group stands for
    reference  what each key takes, its default and its meaning, out of the models
    places    what a place of the user's means: a path, a URI, a data set of the Hub
    split_names  which names mean a split
    plans     the plain data that travels: BackboneCard, Plan
    dropped_keys  keys of config.json that no network is built with
    runs      a run as others see it: what is in it, whether it is done, who works on it
    opening   runs by their places and names, and those of a storage
    damage    what is gone of a run, by the names and sizes of its files
    held      a run that somebody works on: what is written goes to its storage, under a lease
    manifests  what a committed folder holds
    storage   one interface for runs in a directory and in an object store, with leases
    directories  the same for a directory
    object_storage, leases  the same for an object store, and who works on what lies there; need pyarrow
    asking    a store that fails is asked again for a while; needs pyarrow
    locations  URIs -> stores (S3 and what else pyarrow and fsspec open); needs pyarrow
    files     files of this machine, written whole and compared
    events    what happens while a job runs
    stopping  whether it is to stop: the caller says so, or a signal
    figures   which figures of a task are shown, and how they are written
"""

from orchestrator.job.damage import no_edit_in as no_edit_in
from orchestrator.job.data_spec import VALIDATION_FRACTION as VALIDATION_FRACTION, Data as Data
from orchestrator.job.directories import DirectoryStorage as DirectoryStorage
from orchestrator.job.drafts import (
    Draft as Draft,
    make_draft as make_draft,
    make_job as make_job,
    parse_setting as parse_setting,
)
from orchestrator.job.dropped_keys import DROPPED as DROPPED
from orchestrator.job.events import (
    Advanced as Advanced,
    EpochEnded as EpochEnded,
    Event as Event,
    Failed as Failed,
    Noted as Noted,
    PhaseBegan as PhaseBegan,
    Report as Report,
    TrialsAdvanced as TrialsAdvanced,
)
from orchestrator.job.faults import nearest_value as nearest_value
from orchestrator.job.figures import (
    FIGURES as FIGURES,
    OF_TARGETS as OF_TARGETS,
    figure as figure,
    figures_of as figures_of,
    interval as interval,
)
from orchestrator.job.files import (
    POINTER as POINTER,
    beside as beside,
    file_sha256 as file_sha256,
    still_there as still_there,
    sync as sync,
    write_file as write_file,
    written_whole as written_whole,
)
from orchestrator.job.held import (
    CHECKPOINTS as CHECKPOINTS,
    ERROR_FILE as ERROR_FILE,
    JOB_VARIABLE as JOB_VARIABLE,
    METRICS_FILE as METRICS_FILE,
    MODEL as MODEL,
    RAY_FOLDER as RAY_FOLDER,
    SAMPLES as SAMPLES,
    TRACKING_FILE as TRACKING_FILE,
    HeldRun as HeldRun,
    hold as hold,
    this_process as this_process,
    works_for as works_for,
)
from orchestrator.job.keys import (
    all_keys as all_keys,
    groups as groups,
    homes as homes,
    meant as meant,
    only_home as only_home,
)
from orchestrator.job.manifests import (
    GONE as GONE,
    VERSION as VERSION,
    Manifest as Manifest,
    make_manifest as make_manifest,
    next_version as next_version,
    number_of as number_of,
)
from orchestrator.job.opening import (
    BEST_OF_SEARCH as BEST_OF_SEARCH,
    SEARCH_FILE as SEARCH_FILE,
    is_run_at as is_run_at,
    is_search as is_search,
    is_trial_of as is_trial_of,
    list_places as list_places,
    list_runs as list_runs,
    open_finished as open_finished,
    open_run as open_run,
    run_at as run_at,
)
from orchestrator.job.places import (
    DATA_FOLDER as DATA_FOLDER,
    SPLIT_KEYS as SPLIT_KEYS,
    TABLE_SUFFIXES as TABLE_SUFFIXES,
    as_settings as as_settings,
    dataset_id as dataset_id,
    holds_rows as holds_rows,
    holds_secret as holds_secret,
    is_dataset as is_dataset,
    is_materialised as is_materialised,
    is_rows as is_rows,
    is_uri as is_uri,
    library_of as library_of,
    local_path as local_path,
    plain_path as plain_path,
    redacted as redacted,
    shown as shown,
    whole as whole,
    whole_storage as whole_storage,
)
from orchestrator.job.plans import (
    SPLITS as SPLITS,
    Adaptation as Adaptation,
    Adapter as Adapter,
    BackboneCard as BackboneCard,
    BackboneRow as BackboneRow,
    DataSummary as DataSummary,
    Parameters as Parameters,
    Phase as Phase,
    Plan as Plan,
    Recipe as Recipe,
    read_plan_json as read_plan_json,
)
from orchestrator.job.reference import (
    Setting as Setting,
    job_reference as job_reference,
    setting_of as setting_of,
    settings_of as settings_of,
)
from orchestrator.job.runs import (
    AWAY_S as AWAY_S,
    Run as Run,
    open_storage as open_storage,
    patient as patient,
    read_lines as read_lines,
    run_in as run_in,
)
from orchestrator.job.scaling_spec import Scaling as Scaling
from orchestrator.job.spec import (
    IN_A_STORE as IN_A_STORE,
    NOT_LEARNT as NOT_LEARNT,
    Job as Job,
    Method as Method,
    TaskName as TaskName,
    Training as Training,
)
from orchestrator.job.split_names import (
    SPLIT_NAMES as SPLIT_NAMES,
    choose_splits as choose_splits,
    is_part as is_part,
    name_splits as name_splits,
    split_of as split_of,
)
from orchestrator.job.stopping import Stop as Stop, stop_on_signal as stop_on_signal
from orchestrator.job.storage import (
    Lease as Lease,
    Storage as Storage,
    run_is_busy as run_is_busy,
    run_was_taken as run_was_taken,
)
