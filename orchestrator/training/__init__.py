"""What one worker does: the loop over steps and epochs, its checkpoints, figures and records, and the exported model.

In: a Plan, a run to write, a worker. Out: a finished run: metrics, checkpoints, results, a Hugging Face directory.
The same in one process and on many; knows nothing of Ray.

    loop        what one worker does, stage after stage
    phase       one phase of the recipe: steps, ends of epochs, checkpoints
    state       where a run stands, and what a worker holds
    best        which epoch's weights are kept
    budget      how many epochs fit into what a job may take
    losses      what a step's loss is of: the task, or which samples are alike
    fitted      a head that is fitted at once, by the probe: to stored features, or to what the body gives by now
    softening   that head, made less sure before the body is trained behind it
    refit       training anew on training and validation samples
    rates       the schedule of the learning rate
    batches     which samples a step takes, and how they get onto the device
    evaluate    a network's predictions for a split
    averaging   an exponential moving average of the weights
    patience    early stopping
    nonfinite   a loss that is no number: whose fault it is
    convergence  whether a run has learnt anything, and why not
    finish      the stages behind the last step: final figures, export, results
    assembly    the network with its weights, and the samples
    handed_over  the backbone's files on each node, downloaded once or had from another node
    checkpoint  save, newest whole one, restore; safetensors and JSON
    audit       which samples each step took, on which worker
    outbox      a thread that uploads checkpoints while the loop goes on
    record      metrics.jsonl, TensorBoard's events, lineage.json
    loaded      a finished run in memory, for new inputs
    export      the Hugging Face directory
    card        its model card
"""

from orchestrator.training.assembly import WorkerSpec as WorkerSpec, assembled as assembled
from orchestrator.training.audit import Taken as Taken, read_audit as read_audit
from orchestrator.training.batches import epoch_batches as epoch_batches
from orchestrator.training.checkpoint import STATE_FILE as STATE_FILE, checkpoint_name as checkpoint_name
from orchestrator.training.finish import FINAL_FIGURES as FINAL_FIGURES
from orchestrator.training.loaded import LoadedRun as LoadedRun, load_run as load_run
from orchestrator.training.loop import run_worker as run_worker
from orchestrator.training.rates import rate_factor as rate_factor
