"""`make chaos`: real processes, hurt at random moments, fault after fault, and started again until they are done.

- work: one job as a user starts it: its process, how far it is, its processes on Ray, what its weights hash to
- faults: what can be done to a job
- rows: the table: a name, how the job runs, and which faults it must survive
- __main__: the rounds, and the JSON line at their end
"""
