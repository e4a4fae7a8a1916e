"""What a run needs around its training: its jobs on Slurm or here, and whether they come back. Imports no torch."""
