"""Data: everything between files on disk and batches on the device.

``core`` has the order of samples and the loaders, whose only state is the number of samples consumed. ``images``,
``ffcv`` and ``series`` are sources that are read by index; ``open`` opens what a configuration names. ``prepare`` makes
data sets, ``download`` fetches public ones. Models, training and the command line do not belong here.
"""
