"""What one worker does: the loop over steps and epochs, its checkpoints, figures and records, and the exported model.

In: a Plan, a run to write, a worker. Out: a finished run: metrics, checkpoints, results, a Hugging Face directory.
The same in one process and on many; knows nothing of Ray.

    loop        what one worker does, stage after stage
    phase       one phase of the recipe: steps, ends of epochs, checkpoints
    state       where a run stands, and what a worker holds
    batches     which samples a step takes, and how they get onto the device
    evaluate    what a network says of a split
    finish      the stages behind the last step: final figures, export, results
    assembly    the network with its weights, and the samples
    objective   what the task decides: loss, class weights, the scale of targets
    metrics     figures of each task, confusion
    intervals   their 95 % intervals
    checkpoint  save, newest whole one, restore; safetensors and JSON
    record      metrics.jsonl, TensorBoard's events, lineage.json
    loaded      a finished run in memory, for new inputs
    export      the Hugging Face directory
    card        its model card
"""

from orchestrator.training.assembly import WorkerSpec as WorkerSpec, assembled as assembled
from orchestrator.training.batches import epoch_batches as epoch_batches
from orchestrator.training.checkpoint import checkpoint_name as checkpoint_name
from orchestrator.training.finish import FINAL_FIGURES as FINAL_FIGURES
from orchestrator.training.intervals import wilson as wilson
from orchestrator.training.loaded import LoadedRun as LoadedRun, load_run as load_run
from orchestrator.training.loop import run_worker as run_worker
from orchestrator.training.metrics import Predictions as Predictions, measure as measure
from orchestrator.training.objective import Objective as Objective, make_objective as make_objective
from orchestrator.training.phase import rate_factor as rate_factor
