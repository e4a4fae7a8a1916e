"""Parts of the benchmarks of the data loaders."""
