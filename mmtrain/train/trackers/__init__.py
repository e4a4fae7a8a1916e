"""Log metrics during training. ``tracker.py`` decides what to log and when, ``sinks.py`` writes it.

To log to another destination, subclass :class:`~mmtrain.train.trackers.sinks.MetricSink` and create it in
``open_sinks``. :mod:`mmtrain.runs` reads the metrics of a run, :mod:`mmtrain.plotting` plots them.
"""
