"""Reading of FFCV's ``.beton`` files in the same order of samples as other data.

``format`` reads and checks the structure of a file, ``augment`` builds the transforms, ``engine`` decodes with compiled
code, and ``source`` is the data source. ``format`` needs only NumPy and torch. ``engine`` needs the extra ``ffcv`` and
is imported when a source is first read. ``data.prepare`` writes betons.
"""
