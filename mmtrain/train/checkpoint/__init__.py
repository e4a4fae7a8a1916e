"""Checkpoints that are complete or do not exist: the store, its manifest, and the files of tensors."""
