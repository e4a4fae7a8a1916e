"""The parts of the data benchmark, one file each."""
