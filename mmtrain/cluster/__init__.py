"""Jobs of runs: the Slurm batch script, the task, requeueing, stopping, and several processes on one machine."""
