"""Training: one loop for every task and every strategy. It takes a configuration and leaves a trained run folder.

Read the modules in this order: ``session.py`` (trains one configuration), ``loop.py`` (one step, and the work between
steps), ``build.py``, ``optim.py``, ``state.py`` (the contents of a checkpoint) and ``checkpoint/``. ``guards.py`` and
``preemption.py`` handle failures. ``meter.py``, ``timing.py``, ``flops.py`` and ``profiling.py`` measure speed.
``trackers/`` writes metrics. :mod:`mmtrain.parallel` distributes the work over ranks, :mod:`mmtrain.tasks` defines
models and losses, and :mod:`mmtrain.runs` defines the run folder.
"""
