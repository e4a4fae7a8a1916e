"""What every data source shares: the order of samples, the interface of a source, and the loaders.

``order`` is the data clock, ``source`` the interface and the log of faults, ``loader`` the batches for any rank and
world size, ``workers`` the processes behind it, ``buffers`` memory that is used again. Nothing here knows what a sample
holds.
"""
