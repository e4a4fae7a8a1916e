"""Checkpoints that are complete or do not exist.

``store.py`` has the checkpoints of a run folder: when one is whole, which are kept, which is loaded.
``tensor_files.py`` has the tensors of one checkpoint, on disk and in the copy that a thread writes. What a training
state consists of is not known here but in ``train/state.py``.
"""
