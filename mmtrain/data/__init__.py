"""Data: indexable sources, one clock (``order``), and loaders whose only state is the number of samples consumed."""
