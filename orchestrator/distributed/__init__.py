"""All that is Ray's: joining a cluster, the workers of a job, their events, processes that run a frozen body.

In: a Plan and what its workers get. Out: the same run that one process would have made. Nothing outside of this wing
imports Ray. This file imports none of its modules: the process of the event queue would load torch with them.

    cluster     joining, resources, the trainer
    events      what workers tell the driver, and whether they are to stop
    extractors  a pool of processes that run a frozen body for the workers
"""
