"""The parts of ``benchmarks/trainer.py``, one file each."""
