"""What a run is on disk: its folder, configuration, code, journal, logs and status.

Nothing here imports torch: a table of runs must come quickly. What writes metrics and checkpoints is in
``mmtrain.train``; what shows runs as a page is ``mmtrain.report``.
"""
