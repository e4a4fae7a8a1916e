"""FFCV's ``.beton`` files on the data clock: ``format``, ``augment``, compiled decoding (``engine``) and ``source``.

``format`` needs numpy and torch alone. ``engine`` needs the extra ``ffcv`` and is imported when a source is first read.
Betons are written in ``data.prepare``.
"""
