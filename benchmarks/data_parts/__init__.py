"""Parts of ``benchmarks/data.py``, one file each."""
