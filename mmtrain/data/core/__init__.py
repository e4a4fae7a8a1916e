"""The parts that all data sources share: the order of samples, the interface of a source, and the loaders.

``order`` computes which sample comes at which stream position. ``source`` defines the interface of a data source and
the log of damaged samples. ``loader`` yields batches for any rank and world size, ``workers`` runs the loading
processes, and ``buffers`` reuses memory. Nothing in this package depends on the content of a sample.
"""
