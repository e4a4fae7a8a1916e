"""Launching and stopping runs: Slurm jobs and their requeueing, and several processes on one machine.

These modules import torch only in a process that trains. ``mmtrain.train`` contains the training itself,
``mmtrain.runs`` the files of a run folder and the queries to Slurm.
"""
