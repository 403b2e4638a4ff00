"""Training as a service: jobs in a durable store, and engines that run them.

jobs         values: what is submitted, and the states of a job
tables store the database: every change of a state is one transaction
scheduling   which queued jobs may start
controller   starts jobs, follows them, and settles those that ended
engines/     run a job's processes: local, slurm, kubernetes
methods      what callers of the service do; servicer (gRPC) and rest/ (HTTP) translate
commands     `convoy jobs`
"""
