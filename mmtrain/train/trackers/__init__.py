"""What a run writes down while it trains: ``tracker.py`` decides what and when, ``sinks.py`` has the places.

A further place for metrics is a :class:`~mmtrain.train.trackers.sinks.MetricSink`, opened in ``open_sinks``. Reading a
run that was written belongs in :mod:`mmtrain.runs`, pictures of it in :mod:`mmtrain.plotting`.
"""
