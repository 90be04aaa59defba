"""All on Ray but Ray Tune: joining a cluster, the workers of a job, their events, processes that run a frozen body.

In: a Plan and what its workers get. Out: the same run that one process would have made. Only this wing and
`tuning` import Ray. This file imports none of its modules: the process of the event queue would load torch with them.

    cluster     the workers of a job, and following them to their end
    trainer     Ray Train's trainer, run to its end
    places      what Ray has set aside for workers, and giving it back
    joining     joining a cluster, or starting one here
    offer       what a cluster has to give: devices, threads, waiting
    waiting     waiting for a place on a cluster, shown and with an end
    failures    why workers ended, in a few words
    leaving     the notice that a node is taken away
    events      what workers tell the driver, and whether they are to stop
    shared_storage  whether all nodes see the directory that a run lies in
    between_nodes  a backbone's files from a node that has them
    extractors  a pool of processes that run a frozen body for the workers

Beside a cluster, from a laptop, without Ray:

    head        a cluster's head over HTTP: jobs, their output, what is delivered
    address     where the head is, and the token for it
    wheels      the code of a job, as it travels
    leftovers   what Ray leaves behind where its driver is killed
    request     what a job is asked for, delivered with it
    telling     events as lines of a job's output, and back
    following   the lines of a job from the first one to the last
    preflight   what the nodes must have, and which lacks what
    preflight_job  asking them, on the cluster
    nodes       what a node has
    fetching    a run brought home, through its storage or through the cluster
    fetch_job   sending it, on the cluster
"""

import os

# Read by Ray when it is imported.
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")  # of the 10 s that a pod has, 5 are too many
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Of a worker that died the driver tells itself, in a line.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^A worker died or was killed while executing a task")
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a trainer whose Ray was shut down would start another one
