"""Distribute a training state over processes: ranks and collectives, strategies (DDP, FSDP2, ZeRO), and a watchdog.

This package contains the code that uses process groups. The train loop, checkpoints and metrics are in
:mod:`mmtrain.train`, which uses every strategy through the interface ``strategy.Strategy``. Read the modules in this
order: ``ranks.py``, ``strategy.py`` (the interface, one process, DDP), ``fsdp.py`` or ``zero.py``, ``build.py``.
"""
