"""Parts of ``benchmarks/trainer.py``, one file each."""
