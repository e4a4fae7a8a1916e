"""What every data source shares: the order of samples, the interface of a source, the loader, faults, buffers."""
