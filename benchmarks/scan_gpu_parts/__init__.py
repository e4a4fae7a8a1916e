"""The parts of ``benchmarks/scan_gpu.py``, one file each."""
