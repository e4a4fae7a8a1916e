"""Write and read checkpoints. A checkpoint is either complete or does not exist.

``store.py`` manages the checkpoints of a run folder: it saves, verifies, selects and deletes them. ``tensor_files.py``
writes and reads the tensors of one checkpoint, and copies them for asynchronous saves. ``metadata.py`` reads and writes
the index of the tensors. The contents of a training state are defined in ``train/state.py``.
"""
