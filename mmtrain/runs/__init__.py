"""The run folder: configuration, code version, journal, logs, and the status of a run.

This package does not import torch, so that commands such as `mmtrain runs` start quickly. :mod:`mmtrain.train` writes
metrics and checkpoints. :mod:`mmtrain.report` renders runs as a page.
"""
