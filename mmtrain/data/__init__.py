"""Data: everything between files on disk and batches on the device.

``core`` defines the order of samples and the loaders, whose only state is the number of samples consumed. ``images``,
``ffcv`` and ``series`` are data sources, which are read by sample index. ``open`` opens the data source of a
configuration. ``prepare`` writes data sets, and ``download`` fetches public ones. Models, training and the command line
do not belong here.
"""
