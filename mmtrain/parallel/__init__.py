"""How a training state is spread over processes: ranks and their collectives, strategies (DDP, FSDP2, ZeRO), watchdog.

Here belongs what knows of process groups and of other ranks. Here does not belong what trains: the loop, checkpoints
and metrics are in :mod:`mmtrain.train`, which reaches every strategy through ``strategy.Strategy``. Order to read:
``ranks.py``, ``strategy.py`` (the interface, one process, DDP), ``fsdp.py`` or ``zero.py``, ``build.py``.
"""
