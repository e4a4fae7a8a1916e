"""Training: one loop for every task and every strategy, from a configuration to a trained run folder.

Order to read: ``session.py`` (one call trains a configuration), ``loop.py`` (a step, and what comes between steps),
``build.py``, ``optim.py``, ``state.py`` (what a checkpoint holds) and ``checkpoint/``; ``guards.py`` and
``preemption.py`` for what goes wrong; ``meter.py``, ``timing.py``, ``flops.py`` and ``profiling.py`` for speed;
``trackers/`` for what a run writes. How work is spread over ranks belongs in :mod:`mmtrain.parallel`, what a model
learns in :mod:`mmtrain.tasks`, what a run folder is in :mod:`mmtrain.runs`.
"""
