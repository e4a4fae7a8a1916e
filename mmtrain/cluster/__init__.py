"""Jobs of runs: the Slurm batch script, the task, requeueing, stopping, and several processes on one machine.

Nothing here imports torch before a process trains. How a run trains is in ``mmtrain.train``; what it leaves on disk,
and the questions to Slurm about it, are in ``mmtrain.runs``.
"""
