"""The trainer: one loop for every task."""
